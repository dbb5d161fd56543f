"""`prune evaluate`, `prune estimate`, `prune sweep`: parse, call, print.  Heavy imports wait until a command runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dropformer.prune.files.output_paths import check_out, given_path

Text = str | None
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Dtype = Annotated[Text, typer.Option(help="Computation: float32, bfloat16, float16, auto.")]
Device = Annotated[Text, typer.Option(help="cpu, cuda, cuda:1, ...")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
BATCH, CONTEXT, NEW, REPEATS = "1", "512", 32, 5


def evaluate(
    models: Annotated[list[str], typer.Argument(help="The dense model, then pruned ones: anything --model takes.")],
    tasks: Annotated[str, typer.Option(help="lm-eval tasks by commas: mmlu,hellaswag,...")] = "",
    shots: Annotated[int | None, typer.Option(min=0, help="Few-shot examples; default: each task's own.")] = None,
    mmlu_data: Annotated[Path | None, typer.Option(help="MMLU's CSV files in the original layout, offline.")] = None,
    include: Annotated[
        Path | None, typer.Option("--include-path", help="Folder of further task files, as for lm-eval.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per task, sampled in proportion.")] = None,
    seed: Annotated[int, typer.Option(help="Which questions and windows are drawn.")] = 0,
    backend: Annotated[str, typer.Option(help="fast, or hf for lm-eval's own.")] = "fast",
    text: Annotated[
        str, typer.Option(help="Text for perplexity and KL, as for --calibration; empty for none.")
    ] = "heldout",
    samples: Annotated[int, typer.Option(min=1, help="Windows of that text.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    probes: Annotated[bool, typer.Option(help="Copying, addition, and a needle in long context.")] = True,
    speed: Annotated[bool, typer.Option("--speed", help="Measure prefill and decode.")] = False,
    batch: Annotated[
        str, typer.Option(help="Batch sizes by commas, or `paper`: 2048 in, 2048 out, largest batch.")
    ] = BATCH,
    context: Annotated[str, typer.Option(help="Prompt lengths by commas.")] = CONTEXT,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after each prompt.")] = NEW,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of every model at every setting.")] = REPEATS,
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Decode through torch.compile too; default: on a GPU."),
    ] = None,
    stream: Annotated[int, typer.Option(min=0, help="Read this many tokens with attention sinks.")] = 0,
    window: Annotated[
        int | None, typer.Option(min=8, help="Tokens that attention sees while it streams; default 1024.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of answers, so that a run cut off goes on.")] = None,
    sweep: Annotated[Path | None, typer.Option(help="A sweep.json of the dense model, for the page.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.json and report.html.", parser=given_path, metavar="PATH")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    device_map: Annotated[Text, typer.Option(help="Passed to accelerate: auto.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What a drop cost and what it saved: tasks, perplexity, probes, speed, memory, side by side."""
    os.environ["TQDM_DISABLE"] = "1"  # before tqdm is there: lm-eval shows a bar for each of MMLU's 57 subjects
    from dropformer import preflight
    from dropformer.metrics.calibration.text import check_name
    from dropformer.prune.errors import EvaluationError

    for model in models:
        preflight.check(model)
    if text:
        check_name(text)
    if out:
        check_out(out, "report.html")
    if backend not in ("fast", "hf"):
        raise EvaluationError(f"backend `{backend}` is unknown; expected fast or hf")
    names = tuple(t for t in tasks.replace(" ", "").split(",") if t)
    _check_used(names, mmlu_data, cache, shots, limit, include)
    if not speed and (batch, context, new_tokens, repeats, compile) != (BATCH, CONTEXT, NEW, REPEATS, None):
        raise EvaluationError("--batch, --context, --new-tokens, --repeats and --compile describe --speed; add it")
    if window and not stream:
        raise EvaluationError("--window describes --stream; give the number of tokens to stream, as in --stream 65536")
    settings = _settings(batch, context, new_tokens) if speed else ()
    from dropformer import api, console
    from dropformer.eval.quality.perplexity import HELD_OUT
    from dropformer.eval.report import evaluation as ev
    from dropformer.eval.report import page as output
    from dropformer.eval.report.prepare import labels
    from dropformer.eval.report.tables import summary
    from dropformer.eval.tasks.results import TaskOptions
    from dropformer.metrics.analysis import distributed
    from dropformer.metrics.calibration.settings import Calibration
    from dropformer.recipes.opening import Placement, open_model

    swept = _swept(sweep)
    if names:
        from dropformer.eval.tasks.registry import find_tasks  # imports lm-eval, which takes seconds

        find_tasks(names, mmlu_data, include)  # a name or data that is not there is said before a model is loaded
    first = distributed.rank() == 0
    progress = console.Terminal(quiet or not first)
    placement = Placement(
        dtype, device if device_map else distributed.own_device(device), device_map, trust_remote_code
    )
    opened = [open_model(name, None, placement, progress.say) for name in models]
    options = ev.EvaluationOptions(
        names,
        TaskOptions(shots, limit, seed, mmlu_data, include, backend, cache=cache),  # type: ignore[arg-type]
        Calibration(text, samples, length, HELD_OUT.seed + seed) if text else None,
        probes, tuple(settings), repeats=repeats, compile=compile, stream=stream, window=window,
    )  # fmt: skip
    named = [
        ev.Candidate(label, o.model, o.tokenizer, api.plan_of(o, opened[0]))
        for label, o in zip(labels(models), opened, strict=True)
    ]
    found = ev.evaluate(named, options, progress)
    if not first:
        return
    if out:
        found.write(out / "report.json")
        pictures = [(o.path / "similarity.png", f"{c.name}: similarity by depth, crosses mark the dropped layers.")
                    for o, c in zip(opened, named, strict=True) if (o.path / "similarity.png").is_file()]  # fmt: skip
        (out / "report.html").write_text(output.html(found, pictures, swept), encoding="utf-8")
    if as_json:
        sys.stdout.write(found.to_json())
        return
    console.out.print(console.plain_table(*summary(found)))
    for line in [*found.warnings, *([f"wrote {out}/report.json and {out}/report.html"] if out else [])]:
        console.out.print(line, markup=False)


def _check_used(names: tuple[str, ...], mmlu_data: Path | None, cache: Path | None, *others: Any) -> None:
    """Raises EvaluationError for what describes tasks where none, or no such ones, are named."""
    from dropformer.prune.errors import EvaluationError

    if not names and any(given is not None for given in (mmlu_data, cache, *others)):
        raise EvaluationError(
            "--shots, --limit, --mmlu-data, --include-path and --cache describe --tasks; name some, as in --tasks mmlu"
        )
    if mmlu_data and not any(name.startswith("mmlu") for name in names):
        raise EvaluationError("--mmlu-data serves the tasks mmlu and mmlu_SUBJECT; name one in --tasks")
    if cache and cache.exists() and not cache.is_dir():
        raise EvaluationError(f"--cache {cache} is a file; give a folder for the answers")


def _swept(path: Path | None) -> Any:
    if path is None:
        return None
    from dropformer.eval.quality.sweep import Sweep

    return Sweep.read(path)


def _settings(batch: str, context: str, new: int) -> list[Any]:
    from dropformer.prune.errors import EvaluationError

    if batch != "paper" and not all(p.isdecimal() and int(p) for p in f"{batch},{context}".split(",")):
        raise EvaluationError(
            f"--batch {batch} --context {context} cannot be read; expected numbers by commas, or --batch paper"
        )
    from dropformer.eval.cost.speed import PAPER, grid

    if batch == "paper":
        return [PAPER]
    return grid([int(b) for b in batch.split(",")], [int(c) for c in context.split(",")], new)


def estimate(
    model: Annotated[str, typer.Argument(help="A recipe, folder or Hub id; only its config is read.")],
    drop: Annotated[str, typer.Option("--drop", "-d", help="attn:40, mlp:25%, joint:12, attn=20,21, ...")],
    hardware: Annotated[
        str, typer.Option(help="cpu (this machine, measured), a6000, a100-80g, h100-sxm, ...")
    ] = "a6000",
    context: Annotated[int, typer.Option(min=2, help="Tokens of prompt and answer together.")] = 4096,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="The last of them, generated; default half.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    as_json: Json = False,
) -> None:
    """Predict from the config alone what a drop saves: bytes, FLOPs, roofline times, speed-up."""
    from dropformer.prune.spec import parse_spec

    parse_spec(drop)
    from dropformer import console
    from dropformer.eval.cost import estimate as es
    from dropformer.eval.cost.hardware import hardware as find
    from dropformer.eval.cost.roofline import Workload
    from dropformer.recipes import recipes

    workload, device, recipe = Workload(context, batch, new_tokens), find(hardware), recipes().get(model)
    found = es.estimate(es.cost_of_name(model), drop, device, workload, recipe.published if recipe else None)
    published = es.published_speedup(recipe, drop)
    if as_json:
        sys.stdout.write(json.dumps({**found.as_dict(), "published_speedup": published}, indent=1) + "\n")
        return
    for line in es.estimate_lines(found, published):
        console.out.print(line, markup=False)


def sweep(
    model: Annotated[str, typer.Argument(help="Anything --model takes.")],
    drop: Annotated[str, typer.Option("--drop", "-d", help="A range of counts: attn:0..12, mlp:0..8..2.")],
    keep: Annotated[str, typer.Option(help="Blocks to leave whole, such as 0,1,-1.")] = "",
    calibration: Annotated[Text, typer.Option(help="Text to rank by: builtin, c4, wikitext, or a file.")] = None,
    text: Annotated[str, typer.Option(help="Text for perplexity, as for --calibration.")] = "heldout",
    samples: Annotated[int, typer.Option(min=1, help="Windows of that text.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    speed: Annotated[bool, typer.Option("--speed", help="Measure speed too, all models interleaved.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for sweep.json and sweep.png.", parser=given_path, metavar="PATH")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quality for every number of drops, the speed-up, and where the cliff is."""
    from dropformer import preflight
    from dropformer.eval.quality.drop_range import parse_range
    from dropformer.metrics.calibration.text import check_name
    from dropformer.prune.files.config_json import read_config
    from dropformer.prune.spec import check_keep, parse_keep, parse_spec
    from dropformer.recipes.source import short_name

    kind, counts = parse_range(drop)
    parse_spec(f"{kind}:{counts[-1]}")
    folder = out or Path(f"{short_name(model)}-sweep")
    check_name(text)
    texts = preflight.texts(calibration)
    local = preflight.check(model, f"{kind}:{counts[-1]}", texts, dense=True)
    if local:
        check_keep(parse_keep(keep), f"{kind}:{counts[-1]}", read_config(local))
    check_out(folder, "sweep.json")
    from dropformer import console, job
    from dropformer.eval.quality import sweep as sw
    from dropformer.recipes.opening import Placement

    request = job.Request(
        model, f"{kind}:{counts[-1]}", keep=parse_keep(keep), calibration=job.Overrides(next(iter(texts), None)),
        placement=Placement(dtype, device, None, trust_remote_code), text=text,
    )  # fmt: skip
    found = job.sweep(request, kind, counts, (samples, length), console.Terminal(quiet), speed)
    found.write(folder / "sweep.json")
    sw.draw(found, folder / "sweep.png")
    if as_json:
        sys.stdout.write(found.to_json())
        return
    console.out.print(console.plain_table(*sw.table(found)))
    beyond = (
        f"cliff: quality leaves its trend at {found.cliff} drops"
        if found.cliff is not None
        else "no cliff in this range"
    )
    console.out.print(f"{beyond}; wrote {folder}/sweep.json and {folder}/sweep.png", markup=False)
