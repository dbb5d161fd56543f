"""A config.json that follows the surgery: block counts and every per-layer list, by name and never by guess."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dropformer.prune.architecture import KIND_NAMES, of_images
from dropformer.prune.block_map import BlockMap, MappedBlock, new_index, skipped_modules
from dropformer.prune.errors import ArchitectureError
from dropformer.prune.files.config_json import BLOCK_COUNTS, PREDICTING
from dropformer.prune.outline import Outline, StackOutline
from dropformer.prune.surgery.block_numbers import APART, OTHERS, PAIRS, BlockNumbers, names_blocks
from dropformer.prune.surgery.patterns import settled_patterns

# Numbers of blocks by stage, of which each is a stack.
STAGES = ("depths", "block_sizes")
# One entry a block: the entries of blocks that stay.
_BLOCK = "layer_types attention_layers layers_block_type block_types no_rope_layers indexer_types layer_rope_theta"
PER_BLOCK = {*_BLOCK.split(), "attn_layers", "num_attention_heads_per_layer", "attention_window"}
NOT_THE_DECODERS = {"attention_window"}  # LED's sparse windows are its encoder's alone
# One letter a block.
PATTERNS = {"hybrid_override_pattern"}
# One entry a block, following the MLP.
PER_MLP = {"mlp_layer_types", "moe_layer_freq", "intermediate_size", "activation_sparsity_pattern"}
# Indices of blocks: those that stay, renumbered.
INDICES = {"mlp_only_layers": "mlp", "moe_layers": "mlp", "attn_layer_indices": "source", "hybrid_layer_ids": "source"}
INDICES |= {"full_attn_idxs": "source", "cross_attention_layers": "source", "global_attn_indexes": "source"}
# Dictionaries keyed by block.
KEYED = {"per_layer_config", "pruned_heads"}
# A number of leading blocks: how many of those stay.
LEADING = {"first_k_dense_replace": "mlp", "num_dense_layers": "mlp", "moe_layer_start_index": "mlp"}
# A number of trailing blocks.
TRAILING = {"num_kv_shared_layers": "source"}
# The number of a last block.
LAST = {"moe_layer_end_index": "mlp"}
# Settings of engines and quantizers, which no code here reads.
QUANTIZED = re.compile(r"quant|compress|sparsity")
# Fields that may hold the number of one block: unless known they keep the blocks where they are.
ONE_BLOCK = re.compile(r"(^|_)(layer|block)(_(id|idx|index|number|num))?$")


def pruned_config(config: dict[str, Any], outline: Outline, block_map: BlockMap) -> dict[str, Any]:
    """The config of the pruned model: a stock one when it packs, else of model_type `dropformer`.

    `config` is config.json as read.  Raises ArchitectureError for a per-block list that it does not know.
    """
    numbers = BlockNumbers(outline, block_map)
    new, shortened = numbers.follow(copy.deepcopy(config)), False
    for stack in outline.stacks:
        blocks = block_map.stacks[stack.name]
        if any(b.source != i or b.mlp != i for i, b in enumerate(blocks)) or len(blocks) != stack.blocks:
            if of_images(stack.name) and "vision_feature_layer" in new:
                raise ArchitectureError("blocks stay where they are: vision_feature_layer counts them")
            for section in _sections(new, stack):
                _check_numbers(section, stack, numbers)
            _shorten(new, stack, blocks)
            shortened = True
    if shortened:
        new, _ = settled_patterns(new)
    encoder, decoder = (new.get(key) for key in ("num_layers", "num_decoder_layers"))
    if shortened and isinstance(encoder, int) and isinstance(decoder, int) and encoder < decoder:
        raise ArchitectureError("blocks stay where they are: transformers sizes the decoder's cache by the encoder")
    return new if block_map.packed else _as_pruned(new, outline, block_map)


def completed(config: dict[str, Any], full: dict[str, Any], outline: Outline) -> dict[str, Any]:
    """config.json with what transformers derives for each block written out, before a block gets another number.

    `full` is the config object's own dictionary: its counts and lists by block, where the file has none
    (Gemma 2's layer_types are every other block unless they are listed).
    """
    new = copy.deepcopy(config)
    for stack in outline.stacks:
        mine, theirs = _section(new, stack), _section(full, stack)
        for key, value in theirs.items():
            if mine.get(key) is None and (key in _counts(theirs, stack) or _follower(key, value, stack)):
                mine[key] = copy.deepcopy(value)
    return new


def without_heads(config: dict[str, Any], outline: Outline, stacks: set[str]) -> dict[str, Any]:
    """config.json of a model without its stacks' multi-token prediction heads."""
    new = copy.deepcopy(config)
    for section in (section for stack in outline.stacks if stack.name in stacks for section in _sections(new, stack)):
        section |= dict.fromkeys(section.keys() & set(PREDICTING), 0)
    return new


def _sections(config: dict[str, Any], stack: StackOutline) -> list[dict[str, Any]]:
    """The parts of a config that may describe the stack: its own section, and the top level around it."""
    own = _section(config, stack)
    return [own] if own is config else [own, config]


def _check_numbers(section: dict[str, Any], stack: StackOutline, numbers: BlockNumbers) -> None:
    """Follow pairs of a block and something of it; raise ArchitectureError for unknown nested numbers of blocks."""
    for key, value in section.items():
        if key in PAIRS and isinstance(value, list):
            section[key] = numbers.pairs(key, value)
        elif isinstance(value, dict) and QUANTIZED.search(key):
            numbers.check_settings(value, key)
        elif key not in KEYED and not (isinstance(value, dict) and (_of_a_model(value) or OTHERS.search(key))):
            numbers.check_unknown(key, value)
            if isinstance(value, (dict, str)) and key not in APART:
                numbers.check_settings(value, "", key)
            if value is True and "layer_idx" in key:
                raise ArchitectureError(f"blocks stay where they are: {key} makes them act by their numbers")
            if type(value) is int and ONE_BLOCK.search(key) and not OTHERS.search(key) and key not in LAST:
                _check_one(key, value, stack, numbers)


def _of_a_model(section: dict[str, Any]) -> bool:
    """Is a part of a config that of a model within the model, whose stacks are looked at by themselves?"""
    return "model_type" in section or any(key in section for keys in BLOCK_COUNTS.values() for key in keys)


def _check_one(key: str, value: int, stack: StackOutline, numbers: BlockNumbers) -> None:
    """Raises ArchitectureError where a whole number that may be a block's is that of one that moves."""
    blocks = numbers.block_map.stacks[stack.name]
    last = value < 0 and len(blocks) != stack.blocks
    if last or (value < stack.blocks and not (value < len(blocks) and blocks[value].source == value)):
        raise ArchitectureError(f"blocks stay where they are: {key} ({value}) may be the number of one")


def _section(config: dict[str, Any], stack: StackOutline) -> dict[str, Any]:
    """The part of a composite config that describes the stack."""
    texts = ("text_config", "language_config", "llm_config", stack.name, f"{stack.name}_config")
    for key in ("vision_config",) if of_images(stack.path) else texts:
        if isinstance(config.get(key), dict) and (stack.name in ("", "decoder") or key.startswith(stack.name)):
            return config[key]
    return config


def _shorten(whole: dict[str, Any], stack: StackOutline, blocks: tuple[MappedBlock, ...]) -> None:
    config = _section(whole, stack)
    if stage := next((key for key in STAGES if isinstance(config.get(key), list)), None):
        raise ArchitectureError(f"blocks stay where they are: config.json counts them by stage (`{stage}`)")
    counts = _counts(config, stack)
    if not counts and not any(len(config.get(key) or ()) == stack.blocks for key in PER_BLOCK | PATTERNS):
        raise ArchitectureError(
            f"config.json does not say in a known field that {stack.path} has {stack.blocks} blocks"
        )
    for section in _sections(whole, stack):
        for key in _counts(section, stack):
            section[key] = len(blocks)
        for key, value in list(section.items()):
            if follow := _follower(key, value, stack, blocks):
                section[key] = follow(value, blocks)
        for key in KEYED & section.keys():
            if by_block := section[key]:  # the entry of a dropped block is removed, the last one too
                kept = {str(new): str(b.source) for new, b in enumerate(blocks) if str(b.source) in by_block}
                section[key] = {new: by_block[source] for new, source in kept.items()}


def stated_counts(config: dict[str, Any], stack: StackOutline) -> dict[str, int]:
    """What a config says of the number of a stack's blocks, by field, right or wrong."""
    names = [stack.name] if stack.name in BLOCK_COUNTS else []
    if not stack.name:
        names = [n for n in ("decoder", "encoder") if n in stack.path.split(".")] or [""]
    section = _section(config, stack)
    found = {k: section[k] for name in names for k in BLOCK_COUNTS[name] if isinstance(section.get(k), int)}
    return found if not stack.name or stack.blocks in found.values() or len(found) == 1 else {}


def _counts(config: dict[str, Any], stack: StackOutline) -> list[str]:
    """The fields that count the stack's blocks.  The only stack may be half of an encoder-decoder, and says so in
    its path."""
    names = [stack.name] if stack.name else [n for n in ("decoder", "encoder") if n in stack.path.split(".")] + [""]
    found = ([k for k in BLOCK_COUNTS.get(name, BLOCK_COUNTS[""]) if config.get(k) == stack.blocks] for name in names)
    return next(filter(None, found), [])


Follow = Callable[[Any, Sequence[MappedBlock]], Any]


def _follower(key: str, value: Any, stack: StackOutline, blocks: Sequence[MappedBlock] = ()) -> Follow | None:
    if key in NOT_THE_DECODERS and stack.name == "decoder":
        return None
    if key in INDICES and isinstance(value, list):
        part = INDICES[key]
        return lambda v, blocks: [new for new, b in enumerate(blocks) if getattr(b, part) in v]
    if key in LEADING and isinstance(value, int):
        part = LEADING[key]
        return lambda v, blocks: sum(getattr(b, part) < v for b in blocks)
    if key in TRAILING and type(value) is int:
        part = TRAILING[key]
        return lambda v, blocks: sum(getattr(b, part) >= stack.blocks - v for b in blocks)
    if key in LAST and type(value) is int and value >= 0:
        part = LAST[key]
        return lambda v, blocks: sum(getattr(b, part) <= v for b in blocks) - 1
    if key in PATTERNS and isinstance(value, str):
        return lambda v, blocks: "".join(v[b.source] for b in blocks)
    if not isinstance(value, list) or stack.blocks < 2:
        return None
    if key in PER_BLOCK and len(value) == stack.blocks:
        return lambda v, blocks: [v[b.source] for b in blocks]
    if key in PER_MLP and len(value) == stack.blocks:
        return lambda v, blocks: [v[b.mlp] for b in blocks]

    def stays(found: Iterable[int]) -> bool:
        return all(v < len(blocks) and blocks[v].source == blocks[v].mlp == v for v in found)

    if len(value) in (stack.blocks, stack.blocks * stack.caches) or names_blocks(key, value, stack.blocks, stays):
        raise ArchitectureError(
            f"config.json has a list `{key}` by block, and dropformer does not know how it follows a drop"
        )
    return None


def _as_pruned(config: dict[str, Any], outline: Outline, block_map: BlockMap) -> dict[str, Any]:
    """Give the config our own model_type, so that no stock loader fills the gaps with random weights.

    Engines go by the architecture, not the type: vLLM would read a `LlamaForCausalLM` as the dense one.
    """
    remote = _needs_own_code(config)
    if remote:
        config["base_auto_map"] = config["auto_map"]
    config["base_model_type"] = config["model_type"]
    names = config.get("architectures") or []
    config["architectures"] = [n if n.startswith("Dropformer") else f"Dropformer{n}" for n in names]
    config["model_type"] = "dropformer_remote" if remote else "dropformer"
    config["dropformer_modules"] = skipped_modules(outline, block_map)
    main = next((s for s in outline.stacks if s.name in ("", "decoder")), outline.stacks[0])
    blocks = block_map.stacks[main.name]
    skips = {i: sorted(KIND_NAMES[k].lower() for k in b.skipped) for i, b in enumerate(blocks) if b.skipped}
    mapped = {new_index(block_map, layer) for layer in block_map.mapped if layer.stack == main.name}
    _check_two_caches(_section(config, main), main, skips)
    two = any(branch.kind == "cross" for branch in main.branches)  # two caches: see modeling.number_attentions
    silent = [] if two else sorted(mapped | {i for i, names in skips.items() if "attention" in names})
    config["dropformer_no_cache"] = [entry for i in silent for entry in range(i * main.caches, (i + 1) * main.caches)]
    layers = config.get("per_layer_config") or {}
    merged = {str(i): {**layers.get(str(i), {}), "skip": names} for i, names in skips.items()}
    config["per_layer_config"] = {**layers, **merged}
    return config


def _needs_own_code(config: dict[str, Any]) -> bool:
    if not isinstance(config.get("auto_map"), dict):
        return False
    from dropformer.prune.loading.own_code import needs_own_code  # imports transformers: most configs do without

    return needs_own_code(config)


def _check_two_caches(config: dict[str, Any], stack: StackOutline, skips: dict[int, list[str]]) -> None:
    """Raise ArchitectureError where attentions that move up in a decoder's cache would use entries of another type."""
    several = len(set(config.get("layer_types") or ())) > 1
    if several and stack.name == "decoder" and any("attention" in names for names in skips.values()):
        raise ArchitectureError(
            "the attentions of this decoder are of several kinds, of which transformers' cache of an encoder-decoder "
            "cannot leave one out; drop other layers"
        )
