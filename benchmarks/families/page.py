"""The page that `architectures.py` writes: what became of each family, in a table, with the reasons."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers.models.auto import modeling_auto

OTHER_KINDS = ("MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "TEXT_TO_WAVEFORM")
CAUSAL_PART, OTHERS_PART = "## Causal language models", "## Encoders, encoder-decoders, vision models"
COUNTS = """\
Of {families} causal families {works} work, {partly} work in part, {refused} are refused, {wrong} are wrong.
Of those that are text decoders and nothing else, {share} work.
Of {others[families]} models of other kinds {others[works]} work, {others[partly]} work in part, {others[refused]} are \
refused, {others[wrong]} are wrong.
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
    """Write the new verdicts of one part, the counts and the version into the page; its prose and the rest stay."""
    page = path.read_text(encoding="utf-8")
    parts = {part: {(v.family, v.model): v for v in kept(page, part)} for part in (CAUSAL_PART, OTHERS_PART)}
    parts[OTHERS_PART if are_others else CAUSAL_PART] |= {(v.family, v.model): v for v in verdicts}
    path.write_text(document(page, *(list(part.values()) for part in parts.values())), encoding="utf-8")


def document(page: str, causal: list[Verdict], others: list[Verdict]) -> str:
    decoders = count([v for v in causal if decoder_only(v.family)])
    counts = COUNTS.format(share=_share(decoders), others=count(others), **count(causal))
    page = re.sub(r"(?<=of transformers )[\d.]+(?=, )", transformers.__version__, page, count=1)
    page = re.sub(
        r"^Of \d+ causal families .*?^Of \d+ models of other kinds [^\n]*\n",
        lambda _: counts,
        page,
        count=1,
        flags=re.M | re.S,
    )
    tables = f"{CAUSAL_PART}\n\n{table(causal)}\n\n{OTHERS_PART}\n\n{table(others)}\n"
    return page.partition(CAUSAL_PART)[0] + tables


def _share(counts: dict[str, int]) -> str:
    return f"{counts['works']} of {counts['families']} ({counts['works'] / max(1, counts['families']):.0%})"
