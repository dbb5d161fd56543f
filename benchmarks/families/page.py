"""The page that `architectures.py` writes: what became of each family, in a table, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers.models.auto import modeling_auto

OTHER_KINDS = ("MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "TEXT_TO_WAVEFORM")
CAUSAL_PART, OTHERS_PART = "## Causal language models", "## Encoders, encoder-decoders, vision models"
DOCUMENT = """# Architectures

Every causal language model of transformers {version}, tried by `python benchmarks/architectures.py`, and a choice of
its encoders, encoder-decoders, vision and vision-language models, by the same with `--others`:
a tiny random model of the family is analyzed; attention, cross-attention and MLP layers and blocks of each stack are
dropped; each pruned model equals the dense one with these branches silenced, generates with its cache what it generates
without where it generates, keeps its head, and is the same after export and reload, by dropformer and by transformers'
Auto class.

Of {families} causal families {works} work, {partly} work in part, {refused} are refused, {wrong} are wrong.
Of those that are text decoders and nothing else, {share} work.
Of {others[families]} models of other kinds {others[works]} work, {others[partly]} work in part, {others[refused]} are \
refused, {others[wrong]} are wrong.
Those marked unbuildable do not build from their default config here and are not counted.

## How a drop leaves the model

Blocks that lose everything go, and the others get new numbers.  For that, every field of the config that
speaks of blocks must follow: counts, lists with one entry per block, lists of block indices, numbers of leading
blocks.  dropformer knows these by name (`prune/config.py`).  A list that it does not know, with one entry a
block or holding what may be block indices, is never guessed at: the blocks then stay where they are, empty and
free, and the surgery says why.  The same happens where a block built at its new place would be another one, which is
found by building the shortened model without weights and comparing every module's class, shapes and
settings with those of the block that takes its place, and the shapes of what lies around the stack; the table
says where that is so.  Lists
that transformers derives by position and that a config.json leaves out (Gemma 2's `layer_types`) are written out
before blocks get other numbers.

A block with norms after its sums (BERT, BART) or scales of its stream is not the identity without its branches:
`attn=3,mlp=3` leaves its norms, `block=3` takes the whole.  A block of which a part cannot be dropped stays.
A branch that makes something for other blocks (the keys and values that Gemma 4's last blocks share) stays too.

A multi-token prediction head that counts on as one block too many (DeepSeek V3, GLM 4.5) keeps its place in the
files while no block gets another number; else it is dropped too, since transformers leaves it out by its number.

## Why some are refused

- Residual streams side by side (hyper-connections of DeepSeek V4 and HY V4, AltUp of Gemma 3n): a branch reads a
  mixture of the streams and writes to all of them, so there is no stream that a drop leaves unchanged.
- Blocks that run several times with the same weights (HRM): none can go from one of the passes alone.
- XLM keeps the parts of a block in lists apart: their sums lie outside of any block.
- RWKV divides its weights by block number on the first pass; it can be switched off in the config, and the message
  says how.
- The text parts of Emu3, Mllama and MusicGen have configs of their own that transformers' Auto classes do not
  know, so a checkpoint of such a part alone cannot be loaded by anybody.
- Inkling keeps the states of its short convolutions, before and after attention and MLP, in the cache entry of the
  attention, and X-MOD adds the output of its adapters to that of the MLP: these kinds stay, the others work.

## What is no causal language model

- **Names.** A model of one stack has `attn:3`, `mlp:3`, `block:3`.  Of an encoder-decoder the stacks are
  `encoder.attn:3` and `decoder.attn:3`, and the attention of the decoder to the encoder is `decoder.cross:3`.  Where
  blocks come in stages (Swin, Funnel, SegFormer), each stage is a stack with the number of the stage in its name.
- **Heads.** A checkpoint keeps the head that its config.json names in `architectures`, whichever that is: loading never
  falls back to the trunk, nor to another head with random weights.
- **T5** (mT5, LongT5, Switch) computes the bias for relative positions in block 0 and hands it on, so attention and
  cross-attention of block 0 stay; UMT5 has a bias in each block, and every layer can be dropped.
- **ALBERT** runs one block many times with the same weights: no single pass of it can be dropped, but config.json says
  how often it runs (`num_hidden_layers`).  With as many groups as layers each has weights of its own and can go.
- **BigBird** exchanges its sparse attention for full attention on short inputs, for good, while it runs.  Its structure
  is read on a text long enough to be sparse; each window is scored with the attention that its length gets, and pruned
  models run at any length.
- **Reformer** adds its branches to two streams in turn (y1 = x1 + A(x2), y2 = x2 + M(y1)).  A branch is scored on the
  stream that it adds to, a block on both side by side.  It draws its hash functions anew at every pass unless the
  config has a `hash_seed`.  Searches and repairs, which follow one stream, refuse it.
- **Segments.** A model that reads a text segment by segment and keeps memories (Transformer-XL, as a module of your
  own) runs its blocks once for each segment: a drop takes the branch from all, and every segment's tokens count.
- **Stages.** Funnel counts its blocks by stage and Swin alternates shifted windows: their blocks stay in place, empty.
- **Vision-language models.** The language stack is the main one, `attn:3`; the vision tower is left alone unless
  named, as in `vision.attn:3`.

{causal_part}

{table}

{others_part}

{others_table}
"""


@dataclass(frozen=True)
class Verdict:
    """What became of one family: works, refused, wrong or unbuildable, and what there is to say about it."""

    family: str
    result: str
    said: str = ""
    model: str = ""


def table(verdicts: list[Verdict]) -> str:
    rows = [f"| {v.family} | {v.model} | {v.result} | {v.said.replace('|', '/')} |" for v in verdicts]
    return "\n".join(["| family | class | result | |", "|---|---|---|---|", *rows])


def kept(page: str, part: str) -> list[Verdict]:
    """The verdicts of one part of a page that was written before."""
    rows = page.partition(part)[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:5]] for row in rows if row.startswith("| ")][1:]
    return [Verdict(family, result, said, model) for family, model, result, said in cells]


def decoder_only(family: str) -> bool:
    """Is the family a text decoder and nothing else: in none of the tables of other kinds of model?"""
    return not any(family in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES") for kind in OTHER_KINDS)


def count(verdicts: list[Verdict]) -> dict[str, int]:
    results = [v.result for v in verdicts]
    counts = {"families": sum(r != "unbuildable" for r in results)}
    return counts | {result: results.count(result) for result in ("works", "partly", "refused", "wrong")}


def write(path: Path, verdicts: list[Verdict], are_others: bool) -> None:
    """Write the page with the new verdicts of one part; all others that it holds already stay."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = {part: {(v.family, v.model): v for v in kept(page, part)} for part in (CAUSAL_PART, OTHERS_PART)}
    parts[OTHERS_PART if are_others else CAUSAL_PART] |= {(v.family, v.model): v for v in verdicts}
    path.write_text(document(*(list(part.values()) for part in parts.values())), encoding="utf-8")


def document(causal: list[Verdict], others: list[Verdict]) -> str:
    decoders = count([v for v in causal if decoder_only(v.family)])
    return DOCUMENT.format(
        version=transformers.__version__,
        causal_part=CAUSAL_PART,
        table=table(causal),
        others_part=OTHERS_PART,
        others_table=table(others),
        share=_share(decoders),
        others=count(others),
        **count(causal),
    )


def _share(counts: dict[str, int]) -> str:
    return f"{counts['works']} of {counts['families']} ({counts['works'] / max(1, counts['families']):.0%})"
