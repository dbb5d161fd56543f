"""The page that `architectures.py` writes: what became of each family, in a table, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass

import transformers
from transformers.models.auto import modeling_auto

OTHERS = ("MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "TEXT_TO_WAVEFORM")
DOCUMENT = """# Architectures

Every causal language model of transformers {version}, tried by `python benchmarks/architectures.py`:
a tiny random model of the family is analyzed; attention layers, MLP layers and blocks are dropped; each
pruned model equals the dense one with these branches silenced, generates with its cache what it generates
without, and is the same after export and reload.

Of {families} families {works} work, {partly} work in part, {refused} are refused, {wrong} are wrong.
Of those that are text decoders and nothing else, {share} work.
Families marked unbuildable do not build from their default config here and are not counted.

## How a drop leaves the model

Blocks that lose everything go, and the others get new numbers.  For that, every field of the config that
speaks of blocks must follow: counts, lists with one entry a block, lists of block indices, numbers of leading
blocks.  dropformer knows these by name (`prune/config.py`).  A list that it does not know, with one entry a
block or holding what may be block indices, is never guessed at: the blocks then stay where they are, empty and
free, and the surgery says why.  The same happens where a block built at its new place would be another one, which is
found by building the shortened model without weights and comparing every module's class, shapes and
settings with those of the block that is to stand there, and the shapes of what lies around the stack; the table
says where that is so.  Lists
that transformers derives by position and that a config.json leaves out (Gemma 2's `layer_types`) are written out
before blocks get other numbers.

A block with norms after its sums (BERT, BART) or scales of its stream is not gone when its branches are:
`attn=3,mlp=3` leaves its norms, `block=3` takes the whole.  A block of which a part cannot be dropped stays.
A branch that makes something for other blocks (the keys and values that Gemma 4's last blocks share) stays too.

A multi-token prediction head that counts on as one block too many (DeepSeek V3, GLM 4.5) keeps its place in the
files while no block gets another number; else it goes, since transformers leaves it out by its very number.

## Why some are refused

- Residual streams side by side (hyper-connections of DeepSeek V4 and HY V4, AltUp of Gemma 3n): a branch reads a
  mixture of the streams and writes to all of them, so there is no stream that a drop leaves unchanged.
- Blocks that run several times with the same weights (HRM): none can go from one of the passes alone.
- Reformer splits its stream in two reversible halves, and XLM keeps the parts of a block in lists apart:
  their sums lie outside of any block.
- RWKV divides its weights by block number on the first pass and BigBird exchanges its attention by the length
  of the input; both can be switched off in the config, and the message says how.
- The text parts of Emu3, Mllama and MusicGen have configs of their own that transformers' Auto classes do not
  know, so a checkpoint of such a part alone cannot be loaded by anybody.
- Inkling keeps the states of its short convolutions, before and after attention and MLP, in the cache entry of the
  attention, and X-MOD adds the output of its adapters to that of the MLP: these kinds stay, the others work.

## Families

{table}
"""


@dataclass(frozen=True)
class Verdict:
    """What became of one family: works, refused, wrong or unbuildable, and what there is to say about it."""

    family: str
    result: str
    said: str = ""


def table(verdicts: list[Verdict]) -> str:
    rows = [f"| {v.family} | {v.result} | {v.said.replace('|', '/')} |" for v in verdicts]
    return "\n".join(["| family | result | |", "|---|---|---|", *rows])


def decoder_only(family: str) -> bool:
    """Is the family a text decoder and nothing else: in none of the tables of other kinds of model?"""
    return not any(family in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES") for kind in OTHERS)


def count(verdicts: list[Verdict]) -> dict[str, int]:
    results = [v.result for v in verdicts]
    counts = {"families": sum(r != "unbuildable" for r in results)}
    return counts | {result: results.count(result) for result in ("works", "partly", "refused", "wrong")}


def document(verdicts: list[Verdict]) -> str:
    every, decoders = count(verdicts), count([v for v in verdicts if decoder_only(v.family)])
    return DOCUMENT.format(version=transformers.__version__, table=table(verdicts), share=_share(decoders), **every)


def _share(counts: dict[str, int]) -> str:
    return f"{counts['works']} of {counts['families']} ({counts['works'] / max(1, counts['families']):.0%})"
