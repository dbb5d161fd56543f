"""The kind of a branch by the names of its modules; where none fits, `discover` decides by experiment."""

from __future__ import annotations

import re

from dropformer.prune.architecture import BranchKind

NORM_NAMES = re.compile(r"\w*norm\w*|\bln_?\w*", re.I)
CROSS_NAMES = re.compile(r"cross|encoder_attn|encdec|encoder_decoder", re.I)
ATTENTION_NAMES = re.compile(r"attn|attention|mamba|ssm|lstm|recurrent|temporal|rwkv|delta|retention|lru", re.I)
MLP_NAMES = re.compile(r"mlp|ffn|feed_?forward|\bff\b|moe|expert|dense|intermediate|fc\d?|channel_mix", re.I)
CONVOLUTION_NAMES = re.compile("conv", re.I)  # says least: short convolutions occur in either kind


def kind_by_name(names: str) -> BranchKind | None:
    """The kind that the names of a branch's modules tell, norms aside; None where they do not."""
    text = NORM_NAMES.sub(" ", names)
    patterns: tuple[tuple[re.Pattern[str], BranchKind], ...] = (
        (CROSS_NAMES, "cross"),
        (ATTENTION_NAMES, "attn"),
        (MLP_NAMES, "mlp"),
        (CONVOLUTION_NAMES, "attn"),
    )
    return next((kind for pattern, kind in patterns if pattern.search(text)), None)
