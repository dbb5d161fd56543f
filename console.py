"""Output of the command line: results as tables on stdout, progress on stderr.

Names come from users and checkpoints, so Rich markup is disabled: styles are set with `Text`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dropformer.eval.report.dense_pruned import record_table, relative_change, report_notes, report_table
from dropformer.progress import Tick
from dropformer.prune.formats.registry import FORMATS
from dropformer.prune.rungs.agent import Agents
from dropformer.prune.window import CONTEXT

if TYPE_CHECKING:
    from dropformer.eval.compare.comparison import Comparison
    from dropformer.eval.cost.estimate import Estimate
    from dropformer.eval.quality.sweep import Sweep
    from dropformer.eval.report.evaluation import Evaluation
    from dropformer.job import Outcome
    from dropformer.metrics.analysis.scores import Scores
    from dropformer.prune.formats.writing import Exported
    from dropformer.prune.plan import Plan
    from dropformer.recipes import Recipe

_PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False, "emoji": False}
out = Console(**_PLAIN)
err = Console(stderr=True, **_PLAIN)


class Terminal:
    """Progress on stderr: lines, and bars for long stages; warnings alone if quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def say(self, text: str) -> None:
        if not self.quiet or text.startswith("warning: "):
            err.print(text)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Tick]:
        columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(24), MofNCompleteColumn()]
        columns += [TextColumn("{task.fields[note]}", markup=False), TimeRemainingColumn(elapsed_when_finished=True)]
        short = [SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()]
        with Progress(*(columns if total else short), console=err, disable=self.quiet, transient=False) as progress:
            task = progress.add_task(name, total=total, note="")
            yield lambda done, count: progress.update(task, completed=done, note=_rate(progress, task, count))
            progress.update(task, completed=total or 1, total=total or 1)


def _rate(progress: Progress, task: Any, count: int) -> str:
    elapsed = progress.tasks[task].elapsed
    return f"{count / elapsed:,.0f} tokens/s" if elapsed and count else ""


def show(as_json: str | None, *parts: Table | str) -> None:
    """Print a result: its JSON if given, else these tables and lines."""
    if as_json is not None:
        sys.stdout.write(as_json if as_json.endswith("\n") else as_json + "\n")
        return
    for part in parts:
        out.print(part)


def show_outcome(outcome: Outcome, as_json: bool) -> None:
    """The report and the checkpoint of the main job."""
    report, exported = outcome.report, outcome.exported
    notes = [*report_notes(report, outcome.out), done(outcome.out, exported.record, exported.max_difference)]
    show(report.to_json() if as_json else None, report_table(report), *notes)


def show_export(written: Exported, model: str, as_json: bool) -> None:
    """The checkpoint written by following a plan on the files."""
    notes = [done(written.path, written.record, ran=False)]
    if FORMATS[written.record["format"]].reloads:
        notes.insert(0, f"not measured: `prune evaluate {model} {written.path}` does it, and --measure here")
    show(json.dumps(written.record, indent=1) if as_json else None, record_table(written.record), *notes)


def show_plan(plan: Plan, as_json: bool) -> None:
    show(plan.to_json() if as_json else None, plan_table(plan), savings_line(plan))


def show_sweep(found: Sweep, folder: Path, as_json: bool) -> None:
    from dropformer.eval.quality.sweep import table

    cliff = f"quality leaves its trend at {found.cliff} drops" if found.cliff is not None else "none in this range"
    wrote = f"cliff: {cliff}; wrote {folder}/sweep.json and {folder}/sweep.png"
    show(found.to_json() if as_json else None, plain_table(*table(found)), wrote)


def show_estimate(found: Estimate, published: float | None, as_json: bool) -> None:
    from dropformer.eval.cost.estimate import estimate_lines

    figures = {**found.as_dict(), "published_speedup": published}
    show(json.dumps(figures, indent=1) if as_json else None, *estimate_lines(found, published))


def show_evaluation(found: Evaluation, folder: Path | None, as_json: bool) -> None:
    from dropformer.eval.report.tables import summary

    wrote = [f"wrote {folder}/report.json and {folder}/report.html"] if folder else []
    show(found.to_json() if as_json else None, plain_table(*summary(found)), *found.warnings, *wrote)


def show_comparison(found: Comparison, page: Path, as_json: bool) -> None:
    from dropformer.eval.compare.output import CAPTION, headline, notes, terminal_rows, title

    table = plain_table(*terminal_rows(found), title(found), CAPTION)
    wrote = f"wrote {page} and {page.parent}/compare.json"
    show(found.to_json() if as_json else None, table, headline(found), *notes(found), wrote)


def scores_table(scores: Scores) -> Table:
    """Every layer's similarity by depth, the most redundant of each kind marked with its rank."""
    calibration = scores.calibration
    on = f", {calibration.name}" if calibration else ""
    table = Table(title=f"{scores.model.name}: similarity over {scores.tokens:,} tokens{on}", title_justify="left")
    similarity, stderr = scores.similarity(), scores.stderr()
    columns = list(dict.fromkeys((layer.stack, layer.kind) for layer in similarity))
    table.add_column("block", justify="right")
    rank: dict[Any, int] = {}
    for stack, kind in columns:
        table.add_column(f"{stack}.{kind}" if stack else kind, justify="right")
        rank |= {layer: i + 1 for i, layer in enumerate(scores.ranking(kind, stack))}
    for index in range(max(layer.index for layer in similarity) + 1):
        row: list[str | Text] = [str(index)]
        for stack, kind in columns:
            layer = next((x for x in similarity if (x.stack, x.kind, x.index) == (stack, kind, index)), None)
            row.append("" if layer is None else _cell(similarity[layer], stderr[layer], rank[layer]))
        table.add_row(*row)
    return table


def _cell(value: float, error: float | None, rank: int) -> Text:
    text = f"{value:.4f}" + (f" ±{error:.4f}" if error is not None else "")
    return Text(f"{text} #{rank}", "bold") if rank <= 8 else Text(text)


def plan_table(plan: Plan) -> Table:
    """The layers to drop, in the order of selection, with their scores if they were ranked."""
    table = Table(title=f"{plan.model.name}: {plan.spec}", title_justify="left")
    scored = any(drop.similarity is not None for drop in plan.drops)
    alone = f"by {plan.metric}" if plan.metric else "layer"
    for name in ("layer", plan.metric or "similarity") if scored else (alone,):
        table.add_column(name, justify="right")
    for drop in plan.drops:
        score = "" if drop.similarity is None else f"{drop.similarity:.4f}"
        form = " linear" if drop.layer in plan.maps else ""
        table.add_row(drop.layer + form, *([score] if scored else []))
    for layer, rung in plan.rungs.items():
        what = " agents" if isinstance(rung, Agents) else ""
        table.add_row(f"{layer}@{rung}{what}", *([""] if scored else []))
    return table


def savings_line(plan: Plan) -> str:
    saved = plan.savings
    change = relative_change(saved.parameters, saved.parameters_after)
    text = f"parameters {saved.parameters:,} → {saved.parameters_after:,} ({change})"
    if saved.kv:
        text += f", KV cache {relative_change(saved.kv, saved.kv_after)} per token"
    if plan.windows:
        text += f" beyond the windows, {plan.kv_share(CONTEXT) - 1:+.1%} at {CONTEXT:,} tokens"
    if plan.agents:
        text += f"; agents save time beyond {2 * max(plan.agents.values()):,} tokens, and no weights"
    if plan.packing_cost is not None:
        text += f"; packs into a stock model for {plan.packing_cost:.4f} of mean similarity"
    return text


def done(out: Any, record: Mapping[str, Any], difference: float | None = None, ran: bool = True) -> str:
    """Where the checkpoint is, how it is loaded, and how it was checked; `ran`: reloading was part of the run."""
    form = FORMATS[record["format"]]
    copied = form.checked + (" or its repair's" if record["repairs"] and form.copies else "")
    checked = copied if difference is None else f"reloaded, logits equal to {difference:.1e}"
    if ran and form.reloads and difference is None:
        checked += ", but there was not enough memory to reload it and compare logits"
    notes = "".join(f"\nnote: {note}" for note in record["notes"])
    summary = form.summary(record["packed"], bool(record["notes"]), record["stock_windows"])
    return f"wrote {out} ({summary}); {checked}{notes}"


def plain_table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", caption: str = "") -> Table:
    """A table of text rows; the first column is left-aligned, the others right-aligned."""
    table = Table(title=title or None, caption=caption or None, title_justify="left", caption_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def show_engines(found: Mapping[str, Any], as_json: bool, full: bool = False) -> None:
    """A table; `full`: a line for each engine, its command on one of its own, for copying."""
    if full and not as_json:
        show(None, *full_answers(found["engines"].values()))
        return
    table = Table(title=f"{found['checkpoint']}: {found['format']}, {found['family']}", title_justify="left")
    for name in ("engine", "loads", "how"):
        table.add_column(name, overflow="fold")
    for entry in found["engines"].values():
        how = "\n".join(filter(None, (entry["command"], entry["why"], entry["instead"])))
        table.add_row(entry["title"], "yes" if entry["loads"] else "no", Text(how))
    saves = f"Saved in an engine that loads it: {found['saves']}." if found["saves"] else ""
    show(json.dumps(found, indent=1) if as_json else None, table, *filter(None, [saves]))


def full_answers(answers: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What each engine does with a checkpoint, in lines that are not broken."""
    for entry in answers:
        said = "; ".join(filter(None, (entry["why"], entry["instead"], entry["saves"] and f"saves {entry['saves']}")))
        yield f"{entry['title']}: {'yes' if entry['loads'] else 'no'}{', ' if said else ''}{said}"
        if entry["command"]:
            yield f"    {entry['command']}"


def show_recipes(recipes: Mapping[str, Recipe], as_json: bool) -> None:
    table = Table()
    for name in ("recipe", "model", "calibration", "published lists"):
        table.add_column(name)
    for name, recipe in recipes.items():
        c = recipe.calibration
        lists = ", ".join(f"{kind}:{len(layers)}" for kind, layers in dict(recipe.lists).items())
        table.add_row(name, recipe.model, f"{c.name} {c.windows} x {c.length}", lists)
    text = json.dumps({name: recipe.model_dump(mode="json") for name, recipe in recipes.items()}, indent=1)
    show(text if as_json else None, table)
