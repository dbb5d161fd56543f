"""The output of a comparison: compare.json, three plots, and one HTML page."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup, escape

from dropformer.eval.compare.checkpoints import TRAINER
from dropformer.eval.compare.comparison import Comparison, kind_title
from dropformer.eval.compare.pictures import agreement, heatmaps, over_training
from dropformer.eval.html import Section, page, paragraph, picture, table
from dropformer.prune.architecture import KIND_NAMES
from dropformer.prune.files.folder import new_files
from dropformer.prune.files.output_paths import check_out

JSON = "compare.json"
CAPTION = "per kind: mean similarity, rank correlation with the last checkpoint"
PICTURES = {"heatmaps.png": heatmaps, "training.png": over_training, "agreement.png": agreement}


def write(found: Comparison, out: Path) -> Path:
    """Write all files into `out` together; returns the page's path.  Raises OutputError."""
    check_out(out, JSON)
    with new_files(out) as folder:
        for name, draw in PICTURES.items():
            draw(found, folder / name)
        (folder / "compare.html").write_text(html(found, folder), encoding="utf-8")
        found.write(folder / JSON)
    return out / "compare.html"


def terminal_rows(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and body of the terminal's table: a row per checkpoint; per kind the mean similarity and the rank
    correlation with the last checkpoint."""
    overlaps = ["overlap", found.spec or ""] if found.overlap else []
    head = ["step" if found.steps else "checkpoint", *map(kind_title, found.kinds), *overlaps]
    body = []
    for i, c in enumerate(found.checkpoints):
        row = [str(c.step) if found.steps else c.label]
        row += [f"{decimals(c.mean[k], 3)} {decimals(found.spearman_to_last(k)[i], 2)}" for k in found.kinds]
        row += [f"{found.overlap[i][-1]:.2f}", listed(c.chosen or [])] if found.overlap else []
        body.append(row)
    return head, body


def headline(found: Comparison) -> str:
    """The result in a sentence: from which checkpoint on the drop set is known, or which layers are dropped."""
    last = found.checkpoints[-1]
    if any(checkpoint.gone for checkpoint in found.checkpoints):
        return " ".join(f"{c.label} lacks {listed(c.gone, full=True)}." for c in found.checkpoints if c.gone)
    if not found.spec or not found.known_from:
        return f"{len(found.checkpoints)} checkpoints, the last is {last.label}."
    known, count = found.known_from, len(last.chosen or [])
    if known.index == len(found.checkpoints) - 1:
        before = found.overlap[-2][-1] if found.overlap else 0.0
        return (
            f"The drop set of {last.label} for {found.spec} was not known before: the checkpoint before it, "
            f"{found.checkpoints[-2].label}, gives a set with an overlap of {before:.2f}."
        )
    since = "from the first checkpoint on" if known.index == 0 else f"from {known.label} on"
    return f"The {count} layers that {found.spec} drops from {last.label} are known {since}."


def notes(found: Comparison) -> list[str]:
    """Caveats to the numbers."""
    said = []
    for checkpoint in found.checkpoints:
        if checkpoint.same_weights_as:
            said.append(f"{checkpoint.label} has the same weights as {checkpoint.same_weights_as}.")
    if found.overlap_by_chance is not None:
        said.append(f"Two random sets of that size overlap by {found.overlap_by_chance:.2f} on average.")
    return said


def html(found: Comparison, pictures: Path) -> str:
    """The HTML page, with the plots in the folder `pictures`."""
    calibration = found.calibration
    lead = (
        f"{len(found.checkpoints)} checkpoints, each scored on the same {calibration.samples} windows of "
        f"{calibration.length} tokens of {calibration.name} (seed {calibration.seed})."
    )
    sections = [
        Section("Result", [*map(paragraph, [headline(found), *notes(found)]), checkpoint_table(found)]),
        Section("Over training", [picture(pictures / "training.png", "Similarity and agreement by step", OVER)]),
        Section("Layer by layer", [picture(pictures / "heatmaps.png", "Importance by layer and checkpoint", LAYERS)]),
        Section("Pairwise agreement", [picture(pictures / "agreement.png", "Agreement matrices", AGREEMENT)]),
        Section("Method", [paragraph(MEASURED), models_table(found)]),
    ]
    return page(title(found), sections, lead)


OVER = (
    "Left: similarity of the residual stream before and after a layer, averaged over the layers of a kind; near 1 "
    "the layers change little. Right: rank correlation of the layers' similarity with the last checkpoint's, and the "
    "Jaccard overlap of the drop sets."
)
LAYERS = "Importance on a logarithmic scale; a dot marks a layer in the drop set, grey a layer that is already dropped."
AGREEMENT = (
    "Spearman's rank correlation of similarity between each two checkpoints, over the layers that both have, and the "
    "Jaccard overlap of their drop sets. Grey: fewer than three layers in common."
)
MEASURED = (
    "Similarity is the cosine between the residual stream before and after a layer, in float32 per token, averaged "
    "over all tokens (arXiv 2406.15786, eq. 1 to 4); importance is 1 - similarity. Layers of pruned models have the "
    "indices of their dense model."
)


def title(found: Comparison) -> str:
    """Names the Hub model or training run if all checkpoints share one."""
    names = {checkpoint.model.name for checkpoint in found.checkpoints}
    parents = {Path(name).parent.name if TRAINER.fullmatch(Path(name).name) else None for name in names}
    one = names if len(names) == 1 else parents
    return f"Checkpoints of {one.pop()}" if len(one) == 1 and None not in one else "Checkpoints compared"


def cells(found: Comparison, index: int) -> list[str]:
    """One checkpoint as a row: label, step, per kind mean and rank correlation with the last, drop set."""
    checkpoint = found.checkpoints[index]
    row = [checkpoint.label]
    if _some_step(found):
        row.append("" if checkpoint.step is None else str(checkpoint.step))
    for kind in found.kinds:
        row += [decimals(checkpoint.mean[kind], 4), decimals(found.spearman_to_last(kind)[index], 2)]
    if found.overlap:
        row += [decimals(found.overlap[index][-1], 2), escape(listed(checkpoint.chosen or []))]
    return row


def columns(found: Comparison) -> list[str]:
    names = [name for kind in found.kinds for name in (kind_title(kind), "rank corr.")]
    return [
        "checkpoint",
        *(["step"] if _some_step(found) else []),
        *names,
        *(["overlap", found.spec or ""] if found.overlap else []),
    ]


def _some_step(found: Comparison) -> bool:
    return any(checkpoint.step is not None for checkpoint in found.checkpoints)


def checkpoint_table(found: Comparison) -> Markup:
    return table(columns(found), [cells(found, i) for i in range(len(found.checkpoints))])


def models_table(found: Comparison) -> Markup:
    rows = [
        (c.label, c.model.name, c.model.revision, code(c.model.fingerprint), listed(c.gone, full=True))
        for c in found.checkpoints
    ]
    head = ("checkpoint", "model", "revision", "fingerprint", "layers dropped")
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return table([head[i] for i in used], [[row[i] for i in used] for row in rows])


def code(fingerprint: str | None) -> Markup:
    return Markup("<code>{}</code>").format((fingerprint or "")[:12])


def listed(layers: list[str], full: bool = False) -> str:
    """attn:3, attn:4, mlp:1 -> attention 3, 4; MLP 1.  With one kind only the numbers."""
    kinds: dict[str, list[int]] = {}
    for layer in layers:
        kind, _, index = layer.rpartition(":")
        kinds.setdefault(kind, []).append(int(index))
    if len(kinds) == 1 and not full:
        return ", ".join(map(str, sorted(*kinds.values())))
    named = {k: f"{k.rpartition('.')[0]} {KIND_NAMES[k.rpartition('.')[2]]}".strip() for k in kinds}
    return "; ".join(f"{named[kind]} {', '.join(map(str, sorted(found)))}" for kind, found in kinds.items())


def decimals(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
