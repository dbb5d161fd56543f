"""`prune compare`: parse, call, print.  Everything heavy is imported when the command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dropformer.prune.files.output_paths import check_out, given_path

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from dropformer.eval.compare.comparison import Comparison

Text = str | None
CHECKPOINTS = "Folders, Hub ids or id@revision, .gguf files, recipes, or the folder of a training run (checkpoint-N)."


def compare(
    checkpoints: Annotated[list[str], typer.Argument(help=CHECKPOINTS)],
    drop: Annotated[Text, typer.Option("--drop", "-d", help="What to choose in each: attn:8, joint:25%, ...")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for compare.json, the pictures, the page.", parser=given_path, metavar="PATH"),
    ] = None,
    revisions: Annotated[Text, typer.Option(help="Revisions of one Hub model, by commas: step1000,step10000.")] = None,
    tokenizer: Annotated[Text, typer.Option(help="Cut the text with this one's tokenizer, not the first's.")] = None,
    keep: Annotated[str, typer.Option(help="Blocks that --drop leaves whole, such as 0,1,-1.")] = "",
    keep_downloads: Annotated[bool, typer.Option("--keep-downloads", help="Leave fetched weights on disk.")] = False,
    calibration: Annotated[Text, typer.Option(help="builtin, c4, wikitext, or a text file.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration windows.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens in a window.")] = None,
    seed: Annotated[int | None, typer.Option(help="Which windows are drawn.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows run at once.")] = 1,
    dtype: Annotated[Text, typer.Option(help="Computation: float32, bfloat16, float16, auto.")] = None,
    device: Annotated[Text, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    device_map: Annotated[Text, typer.Option(help="Passed to accelerate, for large models: auto.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """How redundancy and the layers to drop change over training, or between pruned variants."""
    from dropformer import preflight
    from dropformer.metrics.calibration.text import check_name
    from dropformer.prune.spec import parse_keep, parse_spec
    from dropformer.recipes.source import short_name

    if drop:
        parse_spec(drop)
    texts = preflight.texts(calibration)
    for name in texts:
        check_name(name)
    folder = out or Path(f"{short_name(checkpoints[0])}-compare")
    check_out(folder, "compare.json")
    from dropformer import console
    from dropformer.eval.compare import output
    from dropformer.eval.compare.compare import CompareRequest
    from dropformer.eval.compare.compare import compare as run
    from dropformer.job import Overrides
    from dropformer.recipes.opening import Placement
    from dropformer.recipes.recipe import recipe_of, recipes

    known = recipes().get(checkpoints[0]) or recipe_of(checkpoints[0].partition("@")[0])
    request = CompareRequest(
        checkpoints, drop, parse_keep(keep), [r for r in (revisions or "").replace(" ", "").split(",") if r], tokenizer,
        Overrides(next(iter(texts), None), samples, length, seed).of(known), batch_size,
        Placement(dtype, device, device_map, trust_remote_code), keep_downloads,
    )  # fmt: skip
    found = run(request, console.Terminal(quiet))
    page = output.write(found, folder)
    if as_json:
        sys.stdout.write(found.to_json())
        return
    console.out.print(comparison_table(found))
    for line in (
        output.headline(found),
        *output.notes(found),
        f"wrote {page} and {folder}/compare.json",
    ):
        console.out.print(line, markup=False)


def comparison_table(found: Comparison) -> Table:
    """A row a checkpoint; of each kind the mean similarity and the rank correlation with the last checkpoint."""
    from rich.table import Table
    from rich.text import Text

    from dropformer.eval.compare.output import decimals, kind_title, listed, title

    table = Table(title=Text(title(found)), title_justify="left", caption_justify="left", caption=CAPTION)
    table.add_column(
        "step" if found.steps else "checkpoint", justify="right" if found.steps else "left", overflow="fold"
    )
    for kind in found.kinds:
        table.add_column(kind_title(kind), justify="right")
    if found.overlap:
        table.add_column("overlap", justify="right")
        table.add_column(Text(found.spec or ""))
    for i, c in enumerate(found.checkpoints):
        row = [str(c.step) if found.steps else c.label]
        row += [f"{decimals(c.mean[k], 3)} {decimals(found.spearman_to_last(k)[i], 2)}" for k in found.kinds]
        row += [f"{found.overlap[i][-1]:.2f}", listed(c.chosen or [])] if found.overlap else []
        table.add_row(*map(Text, row))
    return table


CAPTION = "of each kind: mean similarity, rank correlation with the last checkpoint"
