"""SmolLM2 on wikitext-2: the ranking that an independent measurement gave, and its values by another capture."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from dropformer import api
from dropformer.metrics.analysis.analyze import layer_scores, measuring, proven
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import windows
from dropformer.prune.architecture import Layer

DATA = Path(os.environ.get("DROPFORMER_DATA", Path(__file__).parents[4] / "shared" / "data"))
TEXT = DATA / "wikitext-2" / "valid.txt"
ATTENTION = [25, 26, 7, 28, 6, 9, 29, 12, 27, 22]  # most similar first, by an independent measurement
MLP = [17, 16, 13, 15, 14, 12, 25, 3, 26, 11]

pytestmark = [pytest.mark.real, pytest.mark.skipif(not TEXT.is_file(), reason=f"{TEXT} is not there")]


class ByHand:
    """Cosines by hooks on the Llama modules themselves, summed in float64; knows nothing of taps."""

    def __init__(self, model) -> None:
        self.sums: dict[Layer, float] = {}
        self.tokens = 0
        self.handles = []
        for index, block in enumerate(model.model.layers):
            seen: dict[str, torch.Tensor] = {}
            self.handles.append(
                block.self_attn.register_forward_hook(lambda m, a, o, s=seen: s.update(attn=o[0].clone()))
            )
            self.handles.append(
                block.register_forward_hook(lambda m, a, o, s=seen, i=index: self.add(i, a[0], s["attn"], o))
            )

    def add(self, index, x, attention, y) -> None:
        h = x + attention
        for kind, (before, after) in {"attn": (x, h), "mlp": (h, y), "block": (x, y)}.items():
            layer = Layer(kind, index)
            similarity = nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
            self.sums[layer] = self.sums.get(layer, 0.0) + similarity.sum().item()
        self.tokens += x.shape[1] if index == 0 else 0


@pytest.fixture(scope="module")
def measured():
    """Scores by layer, and the same by hand, on 16 windows of 256 tokens, one pass for both."""
    opened = api.open_model("smollm2-135m")
    architecture = proven(opened.model)
    data = windows(Calibration(str(TEXT), samples=16, length=256), opened.tokenizer)
    hand = ByHand(opened.model)
    with measuring(opened.model, architecture) as run:
        rows = run(*data.batch(range(16)))
    for handle in hand.handles:
        handle.remove()
    scores = {Layer.parse(s.layer): s.similarity for s in layer_scores(architecture.layers(), rows)}
    by_hand = {layer: total / hand.tokens / 16 for layer, total in hand.sums.items()}
    return scores, by_hand


def test_values_equal_those_of_another_capture(measured):
    scores, by_hand = measured
    assert scores == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize(("kind", "independent"), [("attn", ATTENTION), ("mlp", MLP)])
def test_the_ranking_is_that_of_an_independent_measurement(kind, independent, measured):
    ranked = sorted((l for l in measured[0] if l.kind == kind), key=lambda l: -measured[0][l])
    order = [layer.index for layer in ranked]
    assert len(set(order[:10]) & set(independent)) >= 9
    ours = torch.tensor([order.index(i) for i in independent], dtype=torch.float64)
    spearman = torch.corrcoef(torch.stack([ours.argsort().argsort().double(), torch.arange(10).double()]))[0, 1]
    assert spearman > 0.8
