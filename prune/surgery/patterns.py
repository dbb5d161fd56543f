"""Fields that give by a rule (every Nth block) what a list gives per block: both must agree after renumbering.

transformers reads the list; vLLM, SGLang and llama.cpp read the field of some families.

    sliding_window_pattern 3, block 0 dropped of S S F S S F:   S F S S F has no such pattern, and a note says so
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

KINDS = ("layer_types", "layers_block_type")
PARTIAL = ("sliding", "linear", "chunked", "conv", "local", "mamba")  # kinds of attention that are not full


def _last(i: int, n: int) -> bool:
    return n > 0 and (i + 1) % n == 0


# Which blocks a field marks, by its value.  The list it agrees with: KINDS (marked: full attention) unless named.
MARKS: dict[str, Callable[[int, int], bool]] = {
    **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval"), _last),
    **dict.fromkeys(("global_attn_every_n_layers", "layer_group_size", "no_rope_layer_interval"), _last),
    "interleave_moe_layer_step": _last,
    "window_pattern": lambda i, n: n > 0 and i % n == 0,
    "max_window_layers": lambda i, n: i < n,
    "first_k_dense_replace": lambda i, n: i < n,
}
LISTS = {
    "no_rope_layer_interval": "no_rope_layers",  # 0: without
    "interleave_moe_layer_step": "moe_layers",  # numbers of blocks
    "first_k_dense_replace": "mlp_layer_types",
}
ZERO = ("max_window_layers", "first_k_dense_replace", "interleave_moe_layer_step")  # may be 0: no block
PAIR = ("attn_layer_period", "attn_layer_offset")
# What else may tell blocks by a rule; whether transformers builds blocks by it was seen when they were renumbered.
MAYBE = re.compile(r"(layer|window|attn|attention|rope)\w*_(pattern|interval|period|freq\w*|every\w*)$|every_n")
BUILT = {*PAIR, "expert_layer_period", "moe_layer_freq", "cross_attention_frequency"}

# Engines that count full attention by the number of a block, every Nth one, whatever config.json says (read in the
# sources of llama.cpp, 2026, and of vLLM 0.32).
COUNTED = {
    "gemma2": (2, "llama.cpp"),
    "gemma3": (6, "llama.cpp"),
    "gemma3_text": (6, "llama.cpp"),
    "gemma3n_text": (5, "llama.cpp"),
    "gpt_oss": (2, "vLLM and llama.cpp"),
    "cohere2": (4, "llama.cpp"),
    "olmo3": (4, "llama.cpp"),
    "llama4_text": (4, "llama.cpp"),
}


def settled_patterns(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A pruned config whose pattern fields agree with its lists per block, and a note for each that cannot."""
    new, notes = dict(config), []
    for key, value in config.items():
        if isinstance(value, dict) and not key.startswith(("vision", "audio")):
            new[key], found = settled_patterns(value)
            notes += found
    notes += _counted(config)
    if isinstance(config.get("attention_types"), list) and isinstance(config.get("attention_layers"), list):
        new["attention_types"] = [[config["attention_layers"], 1]]  # GPT-Neo, which expands the one into the other
    for key in config:
        marks = _marked(config, LISTS.get(key, ""))
        if marks is None or (key not in MARKS and not MAYBE.search(key)):
            continue
        right = next(_values(key, config[key], marks), None)
        if right is not None:
            new[key] = right
        elif key not in BUILT and not isinstance(config[key], (list, dict, type(None), bool)):
            notes.append(_note(key, LISTS.get(key) or next(k for k in KINDS if isinstance(config.get(k), list))))
    if all(type(config.get(key)) is int for key in PAIR) and (marks := _marked(config, "")):
        pair = _pair((config[PAIR[0]], config[PAIR[1]]), marks)
        new |= dict(zip(PAIR, pair, strict=True)) if pair else {}
        notes += [] if pair else [_note(PAIR[0], "layers_block_type")]
    return new, notes


def counted_wrongly(config: dict[str, Any], every: int) -> bool:
    """Would an engine that gives full attention to every Nth block by its number differ from the config's list?"""
    marks = _marked(config, "")
    return marks is not None and marks != [_last(i, every) for i in range(len(marks))]


def _counted(config: dict[str, Any]) -> list[str]:
    """A note where an engine derives attention types from block numbers, which pruning has changed."""
    every, engines = COUNTED.get(str(config.get("model_type")), (0, ""))
    if not every or not counted_wrongly(config, every):
        return []
    counted = "every second block" if every == 2 else f"one block in {every}"
    return [
        f"{engines} give full attention to {counted} by its number, which is no longer where `layer_types` has it: "
        "transformers, which reads that list, is right"
    ]


def _pair(ours: tuple[int, int], marks: list[bool]) -> tuple[int, int] | None:
    """A period and an offset that mark these blocks, our own first; None where there is none."""
    every = ((n, k) for n, k in product(range(1, len(marks) + 2), repeat=2) if k < n)
    fits = (p for p in (ours, *every) if p[0] > 0 and [i % p[0] == p[1] for i in range(len(marks))] == marks)
    return next(fits, None)


def _values(key: str, value: Any, marks: list[bool]) -> Iterator[Any]:
    """Values of a field that mark these blocks, its own first."""
    if isinstance(value, str) and value and set(value) <= set("LG"):  # EXAONE 4: LLLG
        letters = "".join("G" if mark else "L" for mark in marks)
        for text in (value, *(letters[:n] for n in range(1, len(letters) + 1))):
            if all(text[i % len(text)] == letter for i, letter in enumerate(letters)):
                yield text
    elif type(value) is int and key in MARKS:
        for n in (value, *range(key not in ZERO, len(marks) + 2)):
            if [MARKS[key](i, n) for i in range(len(marks))] == marks:
                yield n


def _marked(config: dict[str, Any], name: str) -> list[bool] | None:
    """Which blocks a list marks; None where the config has no such list."""
    kinds = config.get(name) if name else next((config[k] for k in KINDS if isinstance(config.get(k), list)), None)
    if not isinstance(kinds, list) or not kinds:
        return None
    if name == "moe_layers":
        count = config.get("num_hidden_layers")
        return [i in kinds for i in range(count)] if isinstance(count, int) else None
    if name == "no_rope_layers":
        return [kind == 0 for kind in kinds]
    if name == "mlp_layer_types":
        return [kind == "dense" for kind in kinds]
    return [not str(kind).startswith(PARTIAL) for kind in kinds]


def _note(field: str, kinds: str) -> str:
    return (
        f"no value of `{field}` tells the blocks that are left: transformers, which reads `{kinds}`, is right; vLLM, "
        f"SGLang and llama.cpp, where they read `{field}`, are not"
    )
