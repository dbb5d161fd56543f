"""The whole analysis of a model on calibration windows.

Shared among processes, written to disk window by window, and stopped early where that was asked for and is safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dropformer.metrics.analysis import distributed
from dropformer.metrics.analysis.analyze import calibrated, joined, measuring, proven, scores_of
from dropformer.metrics.analysis.capture import WindowScores
from dropformer.metrics.analysis.resume import Header, RowsFile
from dropformer.metrics.analysis.scores import Scores, Settled
from dropformer.metrics.analysis.stability import Stopper, first
from dropformer.metrics.calibration.batching import Fitting, samples_at_once
from dropformer.metrics.calibration.data import CalibrationData
from dropformer.metrics.calibration.windows import by_length
from dropformer.progress import Tick
from dropformer.prune.architecture import Architecture
from dropformer.prune.artifact import ModelRef
from dropformer.prune.discovery.summarize import summarize

STOPS_AFTER = 4  # windows at once where the analysis may stop before the last


@dataclass(frozen=True)
class Measuring:
    """How to run an analysis.

    `batch_size`: windows at once (None: as many as keep the device busy and fit); fewer once memory runs out.
    `until_stable`: a drop spec; stop once the layers that it drops are settled.  `rows`: a file to keep
    the windows' rows in until all are measured, so that a killed run resumes.  `architecture`: proven already.
    """

    batch_size: int | None = None
    until_stable: str | None = None
    keep: tuple[int, ...] = ()
    rows: Path | None = None
    architecture: Architecture | None = None

    def size(self, model: nn.Module, data: CalibrationData) -> int:
        """Windows at once; few where it may stop early, which is seen after each round."""
        chosen = samples_at_once(model, data)
        return self.batch_size or (min(chosen, STOPS_AFTER) if self.until_stable else chosen)


def measure(
    model: nn.Module, data: CalibrationData, ref: ModelRef, how: Measuring | None = None, progress: Tick | None = None
) -> Scores:
    """Scores of a model on calibration windows, the same whatever the number of processes.

    Started again after a kill, it resumes at the first missing window.  Raises
    ArchitectureError, CalibrationError, or PlanError for a spec that the model cannot satisfy.
    """
    how = how or Measuring()
    architecture = how.architecture or proven(model)
    size = how.size(model, data)
    stopper = None
    if how.until_stable:
        outline = summarize(model, architecture)
        stopper = Stopper(outline, architecture.layers(), how.until_stable, len(data), how.keep)
    with ExitStack() as stack:
        done, kept = _earlier(model, data, ref, how, architecture, stack)
        rows, settled = _run(model, architecture, data, done, _Watch(stopper, kept, progress), size)
        if kept and not settled:
            kept.remove()
    scores = calibrated(scores_of(model, architecture, rows, ref), data)
    return scores.model_copy(update={"settled": settled})


def _earlier(
    model: nn.Module, data: CalibrationData, ref: ModelRef, how: Measuring, architecture: Architecture, stack: ExitStack
) -> tuple[dict[int, WindowScores], RowsFile | None]:
    """What an earlier run left, in every process, and the file that process 0 adds to."""
    if how.rows is None or ref.fingerprint is None:
        return {}, None
    dtype = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    layers = tuple(map(str, architecture.layers()))
    file = RowsFile(how.rows, Header(fingerprint=ref.fingerprint, calibration=data.ref, dtype=dtype, layers=layers))
    if distributed.rank() > 0:
        return file.parse(distributed.first_says("")), None
    stack.enter_context(file)
    distributed.first_says(file.text())
    return file.done, file


@dataclass
class _Watch:
    """What happens after each round of windows."""

    stopper: Stopper | None
    kept: RowsFile | None
    progress: Tick | None
    measured: int = 0  # tokens of this run alone, so that a rate counts none that an earlier one measured

    def see(self, done: Mapping[int, WindowScores], new: Mapping[int, WindowScores]) -> Settled | None:
        if self.kept:
            self.kept.add(new)
        self.measured += sum(row.total() for row in new.values())
        if self.progress:
            self.progress(len(done), self.measured)
        return self.stopper.settled(_in_order(done)) if self.stopper else None


def _run(
    model: nn.Module,
    architecture: Architecture,
    data: CalibrationData,
    earlier: dict[int, WindowScores],
    watch: _Watch,
    size: int,
) -> tuple[WindowScores, Settled | None]:
    """Measure the windows that are missing, each process its batch a round, until all are or the set is settled."""
    done = dict(earlier)
    settled = watch.see(done, {}) if done else None
    with measuring(model, architecture) as run:
        fitting = Fitting(lambda rows: run(*data.batch(rows)))
        missing = [i for i in range(len(data)) if i not in done]
        if watch.stopper is None:  # else the first windows are needed first
            lengths = data.lengths()
            missing = [missing[i] for i in by_length([lengths[window] for window in missing])]
        for batches in _rounds(missing, size):
            if settled:
                break
            mine = batches[distributed.rank()] if distributed.rank() < len(batches) else []
            rows = joined(list(fitting(mine))) if mine else None
            new = exchanged(mine, rows, size, len(architecture.layers()))
            done |= new
            settled = watch.see(done, new)
    rows = _in_order(done)
    return (first(rows, settled.windows), settled) if settled else (rows, None)


def _rounds(windows: Sequence[int], size: int) -> Iterator[list[list[int]]]:
    """Batches of `size` windows, as many at a time as there are processes."""
    batches = [list(windows[i : i + size]) for i in range(0, len(windows), size)]
    for start in range(0, len(batches), distributed.world()):
        yield batches[start : start + distributed.world()]


def exchanged(windows: Sequence[int], rows: WindowScores | None, size: int, layers: int) -> dict[int, WindowScores]:
    """Every process's rows of this round, by window, in every process."""
    table = torch.full((size, 1 + 2 * layers), -1, dtype=torch.float64)
    if rows is not None:
        table[: len(rows)] = torch.cat([torch.tensor(windows)[:, None].double(), rows.sums, rows.tokens.double()], 1)
    found = [row for row in distributed.gather(table) if row[0] >= 0]
    return {int(row[0]): WindowScores(row[None, 1 : 1 + layers], row[None, 1 + layers :].long()) for row in found}


def _in_order(done: Mapping[int, WindowScores]) -> WindowScores:
    return joined([done[window] for window in sorted(done)])
