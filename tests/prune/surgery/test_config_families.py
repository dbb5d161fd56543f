"""Every family: each field that counts or names blocks is, after a drop, what a shorter model's config says."""

import sys
from pathlib import Path

import pytest
from transformers.models.auto import modeling_auto

from dropformer.prune.architecture import Layer
from dropformer.prune.block_map import map_blocks
from dropformer.prune.errors import ArchitectureError
from dropformer.prune.loading.described import config_from
from dropformer.prune.outline import BranchOutline, Outline, StackOutline
from dropformer.prune.surgery.config import pruned_config

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from families import tiny_models

BLOCKS, DROPPED = tiny_models.LAYERS, 1
COUNTS = [name for value, names in tiny_models._SIZES if value == BLOCKS for name in names.split() if "layer" in name]

OTHERS = ("vision", "audio", "encoder", "qformer", "perceiver", "depth")  # sections that describe other stacks


def stack(name, path):
    made = {"attn": "self_attn", "mlp": "mlp"}
    branches = [
        BranchOutline(kind=kind, blocks=list(range(BLOCKS)), modules={module: "zeros"}, parameters=1)
        for kind, module in made.items()
    ]
    return StackOutline(name=name, path=path, blocks=BLOCKS, branches=branches)


def config_of(family, blocks):
    """A tiny config of the family with this many blocks; None where the family does not allow it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_models, "LAYERS", blocks)
        patch.setattr(tiny_models, "SMALL", {**tiny_models.SMALL, **dict.fromkeys(COUNTS, blocks)})
        try:
            return tiny_models.tiny_config(family)
        except Exception:  # whatever transformers raises for a config that it cannot build
            return None


def fields(config, place=""):
    """Every field of a config by its path, those of other stacks apart."""
    for key, value in config.items():
        if isinstance(value, dict) and not key.startswith(
            ("vision", "audio", "encoder", "qformer", "perceiver", "depth")
        ):
            yield from fields(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value


def check(family):
    """Drop a middle block of a family's config; what was checked, by field, or why its blocks stay."""
    dense, short = config_of(family, BLOCKS), config_of(family, BLOCKS - 1)
    if dense is None or getattr(dense.get_text_config(decoder=True), "num_hidden_layers", None) != BLOCKS:
        return None
    if getattr(short and short.get_text_config(decoder=True), "num_hidden_layers", None) != BLOCKS - 1:
        short = None  # its defaults list four blocks
    two = getattr(dense, "is_encoder_decoder", False)
    stacks = [stack(name, f"model.{name}.layers") for name in ("encoder", "decoder")] if two else []
    outline = Outline(stacks=stacks or [stack("", "model.layers")], parameters=9)
    dropped = [Layer("block", DROPPED, name) for name in (("encoder", "decoder") if two else ("",))]
    try:
        new = pruned_config(dense.to_dict(), outline, map_blocks(outline, dropped))
        after = dict(fields(config_from(new).to_dict()))
    except ArchitectureError as error:
        return str(error)
    except ValueError as error:  # transformers refuses what surgery then does not write either
        return str(error)
    shorter = dict(fields(short.to_dict())) if short is not None else {}
    checked = {}
    for place, value in fields(dense.to_dict()):
        if short is None and value == BLOCKS and place.rpartition(".")[2] in COUNTS:
            checked[place] = BLOCKS - 1
        elif short is None and isinstance(value, list) and len(value) == BLOCKS and place.endswith("block_type"):
            checked[place] = [v for i, v in enumerate(value) if i != DROPPED]
        elif isinstance(value, list) and len(value) == BLOCKS and isinstance(shorter.get(place), list):
            if len(shorter[place]) == BLOCKS - 1 and "_ids" not in place and "ind" not in place and "idx" not in place:
                checked[place] = [v for i, v in enumerate(value) if i != DROPPED]
        elif type(value) is int and value == BLOCKS and shorter.get(place) == BLOCKS - 1:
            checked[place] = BLOCKS - 1
    assert checked, family
    for place, want in checked.items():
        if place.rpartition(".")[2] != "moe_layers":  # numbers of blocks: 0 1 2 3 without 1 are 0 1 2
            assert after[place] == want, (family, place)
    return checked


FAMILIES = sorted({*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES})
FAMILIES += ["t5", "pegasus", "whisper", "nllb-moe", "switch_transformers", "llava", "qwen3_vl", "llama4"]


def test_fields_that_count_or_name_blocks_are_those_of_a_shorter_model():
    found = {family: check(family) for family in FAMILIES}
    stay = {family: reason for family, reason in found.items() if isinstance(reason, str)}
    assert sum(isinstance(value, dict) for value in found.values()) > 0.85 * len(found)
    known = ("blocks stay", "does not say in a known field", "does not know how it follows", "validat")
    assert all(any(part in reason for part in known) for reason in stay.values()), stay
