"""Perplexity relative to dense after each way of choosing and repairing, on three domains.

    python benchmarks/quality.py [--quick] [--wikitext FILE] [--drops attn:8,block:4] [--methods refit,best]
        [--model M] [--device cuda] [--samples 64] [--self 64] [--epochs 4] [--rank 64] [--rows FILE]
    python benchmarks/quality.py --page ROWS... > TABLE.md

Calibration: half wikitext, half the builtin topics.  Validation: other parts of both, and a domain that is not in
the calibration at all, source code of Python's standard library.  Repairs are gated on a fourth domain, docstrings
of torch.  Without a wikitext file that half is left out.  `--self`: calibration windows that the model itself
generates, beside the others.  `--page`: a Markdown page of rows that earlier runs wrote to `--rows`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from quality_table.page import page
from quality_table.rows import DROPS, METHODS, Row, rows_in
from quality_table.texts import texts

from dropformer import api
from dropformer.metrics.blockwise.divergence import DenseReference, Divergence
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.blockwise.variant import Variant
from dropformer.metrics.calibration.generated import Writer, written_windows
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.offload.keeper import Keeper
from dropformer.metrics.offload.process_memory import peak
from dropformer.metrics.repair.registry import Training
from dropformer.metrics.search.improve import Improver, improve
from dropformer.metrics.search.strategy import Target
from dropformer.prune.artifact import ModelRef
from dropformer.recipes.placement import Placement

WIKITEXT = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "wikitext-2" / "valid.txt"


class Judge:
    """Divergence of a variant on the validation texts; one without repairs is measured once per set of drops."""

    def __init__(self, improver: Improver, judged: dict[str, Windows]) -> None:
        self.names = list(judged)
        self.dense = {}
        self.judged: dict[frozenset[str], dict[str, Divergence]] = {}
        for name, data in judged.items():
            batches = [inputs for inputs, _ in data.batches(1)]
            runner = BlockRunner(improver.model, improver.architecture, batches, keeper=Keeper(host=1 << 30))
            self.dense[name] = DenseReference(runner)

    def __call__(self, variant: Variant) -> dict[str, Divergence]:
        dropped: frozenset[str] = frozenset() if variant.tensors else frozenset(variant.dropped)
        if dropped in self.judged:
            return self.judged[dropped]
        found = {name: dense.compare_each([variant])[0] for name, dense in self.dense.items()}
        if dropped:
            self.judged[dropped] = found
        return found


def measure(improver: Improver, judge: Judge, gate: Windows, method: str, drop: str, ref: ModelRef) -> Row:
    improver.quality = replace(
        METHODS[method],
        stride=improver.quality.stride,
        cost_windows=improver.quality.cost_windows,
        width=improver.quality.width,
        training=improver.quality.training,
    )
    start = time.process_time()
    spent = improver.work.spent
    plan, repair, variant = improve(improver, ref, Target(drop), gate)
    seconds = time.process_time() - start
    passes = (improver.work.spent - spent) / (improver.work.blocks * improver.work.tokens)
    damage = judge(variant)
    logs = {name: damage[name].nll - judge.dense[name].divergence.nll for name in judge.names}
    means = {name: float(log.mean()) for name, log in logs.items()}
    variance = sum(float(log.var(correction=len(log) > 1)) / len(log) for log in logs.values()) / len(logs) ** 2
    mean = math.exp(sum(means.values()) / len(means))
    return Row(
        method,
        drop,
        [str(layer) for layer in plan.layers],
        {name: round(math.exp(value), 4) for name, value in means.items()},
        round(mean, 4),
        round(mean * variance**0.5, 4),
        round(sum(d.mean_kl for d in damage.values()) / len(damage), 4),
        round(seconds, 1),
        [str(g) for g in repair.gates],
        round(passes, 2),
        round(peak() / 2**30, 2),
    )


def drops_in(text: str) -> list[str]:
    """Drop specs by commas; a bare number belongs to the list before it, as in attn:8,block=5,12."""
    found: list[str] = []
    for part in text.split(","):
        if part.isdecimal() and found:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def show(row: Row) -> None:
    ratios = "  ".join(f"{name} {value:.3f}" for name, value in row.ratios.items())
    print(
        f"{row.drop:9} {row.method:22} {ratios}  mean {row.mean:.3f} ± {row.stderr:.3f}  KL {row.kl:.3f}"
        f"  {row.seconds:.0f} s  {row.passes:.1f} passes  {row.peak_gib:.1f} GiB  {','.join(row.layers)}",
        flush=True,
    )
    for line in row.gates:
        print(f"{'':10}{line}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few tokens, two drops, within a minute")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu", help="where to compute, in float32 (default cpu)")
    parser.add_argument("--wikitext", type=Path, default=WIKITEXT)
    parser.add_argument("--samples", type=int, help="calibration windows (default 32)")
    parser.add_argument("--judged", type=int, help="windows judged of each text (default 8)")
    parser.add_argument("--length", type=int, help="tokens a window (default 512)")
    parser.add_argument("--cost-windows", type=int, default=4, help="windows on which searches measure (default 4)")
    parser.add_argument("--self", type=int, default=0, dest="own", help="calibration windows that the model writes")
    parser.add_argument("--epochs", type=int, help="passes of trained repairs over the calibration")
    parser.add_argument("--rank", type=int, help="rank of adapters")
    parser.add_argument("--rows", type=Path, help="a file of rows, one JSON object a line: added to, not repeated")
    parser.add_argument("--page", type=Path, nargs="+", metavar="ROWS", help="write a Markdown page of these rows")
    parser.add_argument("--drops", help="comma-separated (default: the whole table)")
    parser.add_argument("--methods", help=f"comma-separated, of {', '.join(METHODS)}")
    said = parser.parse_args(arguments)
    if said.page:
        print(page(row for file in said.page for row in rows_in(file)))
        return
    samples, judged, length = (2, 1, 128) if said.quick else (32, 8, 512)
    samples, judged, length = said.samples or samples, said.judged or judged, said.length or length
    drops = drops_in(said.drops) if said.drops else (["attn:4"] if said.quick else list(DROPS))
    quick = ["similarity", "refit", "best"]
    methods = said.methods.split(",") if said.methods else (quick if said.quick else list(METHODS))
    if unknown := [method for method in methods if method not in METHODS]:
        parser.error(f"method `{unknown[0]}` is unknown; expected one of {', '.join(METHODS)}")
    opened = api.open_model(said.model, placement=Placement(device=said.device, dtype="float32"))
    found = texts(opened.tokenizer, said.wikitext, samples, judged, length)
    told = partial(print, file=sys.stderr, flush=True)
    if said.own:
        settings = Calibration("self", samples=said.own, length=length, seed=1)
        found.calibration.append(written_windows(settings, Writer(opened.model, opened.tokenizer, tell=told)))
    improver = Improver(opened.model, found.calibration, tell=told)
    judge = Judge(improver, found.judged)
    training = Training(said.epochs, said.rank)
    improver.quality = replace(improver.quality, cost_windows=said.cost_windows, training=training)
    rows = rows_in(said.rows)
    done = {(row.method, row.drop) for row in rows}
    for method, drop in ((m, d) for d in drops for m in methods if (m, d) not in done):
        rows.append(measure(improver, judge, found.gate, method, drop, opened.ref))
        show(rows[-1])
        if said.rows:
            with said.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(rows[-1])) + "\n")
    summary = {
        "benchmark": "quality",
        "calibration_tokens": sum(w.ids.numel() for w in found.calibration),
        "judged_tokens": {name: w.ids.numel() for name, w in found.judged.items()},
        "dense_perplexity": {name: round(dense.divergence.perplexity, 3) for name, dense in judge.dense.items()},
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
