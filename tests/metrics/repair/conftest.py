"""Tiny models whose layers matter, opened for repairs."""

import pytest
import torch
from family_sizes import SIZES

from dropformer.metrics.blockwise.divergence import DenseReference
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.blockwise.variant import Changes, variant
from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.repair.independent import IndependentRefit
from dropformer.metrics.repair.ridge import token_weights
from dropformer.metrics.repair.slots import branch_outputs, projections
from dropformer.metrics.search.improve import Improver
from dropformer.prune.discovery.discover import discover

REF = CalibrationRef(name="ids", samples=8, length=24, seed=0, packed=True, skip_first=0, hash="0")


@pytest.fixture
def windows():
    return torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(3))


def strengthen(model):
    """A random model's branches add almost nothing: make them matter."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "embed" not in name:
                p *= 6
    return model


class Opened:
    """A model, its architecture and outputs, on two batches of windows."""

    def __init__(self, model, windows):
        self.model, self.architecture = model, discover(model)
        self.outputs = branch_outputs(model, self.architecture)
        self.slots = projections(self.outputs)
        self.runner = BlockRunner(model, self.architecture, [{"input_ids": windows[:4]}, {"input_ids": windows[4:]}])
        self.groups = [0] * len(self.runner)

    def variant(self, gone, tensors=None, maps=None):
        return variant(self.model, self.architecture, gone, Changes(tensors or {}, maps or {}))

    def independent(self, targets, penalties=(1e-4,)):
        """Parameters by name from independent fits of these targets, and the fits by path and layers lost."""
        refit = IndependentRefit(self.runner, self.outputs, range(len(self.runner)), self.groups, penalties)
        refit.run(targets)
        return {name: t for fit in refit.fits.values() for name, t in fit.tensors.items()}, refit.fits

    def stream_error(self, found, dense=None):
        """Error of the stream after the last block, weighted as the fits weigh it."""
        dense, total = dense or DenseReference(self.runner), 0.0
        with torch.inference_mode(), self.standing(found):
            for batch in range(len(self.runner)):
                goal = dense.streams[batch][-1].float()
                end = self.runner.run(0, batch, self.runner.start(batch)).float()
                total += float(((end - goal).square().sum(-1) * token_weights(goal)).sum())
        return total

    def standing(self, found):
        from dropformer.prune.loading.parts import replaced

        return replaced(self.model, found.modules())


@pytest.fixture
def opened(tiny, windows):
    def made(family="llama", dtype=torch.float32, **fields):
        return Opened(strengthen(tiny(family, **{**SIZES.get(family, {}), **fields})).to(dtype), windows)

    return made


@pytest.fixture
def improver(tiny, windows):
    def made(quality, family="llama", dtype=torch.float32, rows=8, **fields):
        model = strengthen(tiny(family, **{**SIZES.get(family, {}), **fields})).to(dtype)
        ones = torch.ones_like(windows, dtype=torch.bool)
        data = [Windows(part, ones[: len(part)], ones[: len(part)], REF) for part in windows[:rows].split(4)]
        return Improver(model, data, quality)

    return made
