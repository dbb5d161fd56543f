"""A model over two GPUs: what measures, chooses and repairs gives what it gives on a CPU, and waits seldom.

The GPUs are not there (`fake_gpus`): tensors say that they lie on one, and operations across two of them fail as
CUDA's do.
"""

import pytest
import torch
from fake_gpus import fake_gpus, gpu, spread

from dropformer import api
from dropformer.eval.quality.perplexity import all_side_by_side, token_losses
from dropformer.eval.tasks.scorer import Scorer, ScoreRequest
from dropformer.metrics.analysis.analyze import analyze_model, measuring, proven
from dropformer.metrics.analysis.window_loss import window_losses
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import scored_windows
from dropformer.metrics.repair.distill import Distilling, fit_blocks
from dropformer.metrics.search.improve import Improver
from dropformer.metrics.search.strategy import Strategy, Target
from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.window import Window

IDS = torch.randint(3, 64, (12, 24), generator=torch.Generator().manual_seed(0))


def model(tiny):
    """A tiny Llama whose layers do something."""
    found = tiny("llama")
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                parameter.mul_(4)
    return found


def data(ids=IDS):
    return scored_windows(Calibration("made up", len(ids), ids.shape[1]), ids, torch.ones_like(ids).bool(), ids > 0)


def similarity(dense):
    return [layer.similarity for layer in analyze_model(dense, IDS.split(4)).layers]


def losses(dense):
    return [float(each.sum()) for each in token_losses(dense, IDS)]


def divergence(dense):
    plan = api.plan_unscored(ModelRef(name="tiny"), api.outline(dense), "attn=1,mlp=2", (), None)
    return [side.divergence.value for side in all_side_by_side(dense, [api.drop(dense, plan)], IDS)]


def windows(dense):
    return list(window_losses(dense, api.outline(dense), [{"input_ids": IDS}], Window(4, 1)).values())


def leave_one_out(dense):
    return list(Improver(dense, [data()], Strategy(metric="loo-kl")).choose_forms(Target("attn:1"))[2].values())


def repaired(*names):
    def repair(dense):
        improver = Improver(dense, [data()], Strategy(repair=names))
        found, _ = improver.repair([Layer("attn", 1), Layer("mlp", 2)], data(IDS[:4]))
        return [gate.after for gate in found.gates]

    return repair


def searched(dense):
    improver = Improver(dense, [data()], Strategy(select="greedy", repair=("refit",)))
    layers, *_ = improver.choose_forms(Target("attn:1"))
    found, _ = improver.repair(layers, data(IDS[:4]))
    return [layers[0].index, len(improver.fitted_on) < len(improver.parts), *(gate.after for gate in found.gates)]


def distilled(dense):
    context = Improver(dense, [data()], Strategy(repair=("refit",))).context([Layer("attn", 1), Layer("mlp", 2)])
    said: list[str] = []
    object.__setattr__(context, "tell", said.append)
    fit_blocks(context, Distilling(epochs=0))  # these GPUs know no gradients
    return [float(line.split("error ")[1].split()[0]) for line in said]


def scored(dense):
    asked = [ScoreRequest((5, 6, 7, 8), (9,)), ScoreRequest((5, 6, 7, 8), (10,)), ScoreRequest((5, 6, 9), (3, 4))]
    return [score.logprob for score in Scorer(dense).score(asked)]


@pytest.mark.parametrize(
    "measured",
    [similarity, losses, divergence, windows, leave_one_out, repaired("refit", "refit-all"), repaired("linear"),
     searched, distilled, scored],
    ids=lambda function: function.__qualname__.partition(".")[0],
)  # fmt: skip
def test_over_two_gpus_the_figures_are_those_of_a_cpu(measured, tiny, monkeypatch):
    if measured is not searched:  # a relative error is a mean over batches
        monkeypatch.setattr("dropformer.metrics.search.calibration.BUSY_GPU", 1)
    expected = measured(model(tiny))
    with fake_gpus():
        over_two = spread(model(tiny), "model.layers")
        assert {str(p.device) for p in over_two.parameters()} == {gpu(0), gpu(1)}
        assert measured(over_two) == pytest.approx(expected, rel=1e-3, abs=1e-5) and expected


def test_a_tensor_on_another_gpu_is_an_error_here_too():
    with fake_gpus(), pytest.raises(RuntimeError, match="one device"):
        torch.ones(3, device=gpu(0)) + torch.ones(3, device=gpu(1))


def test_on_a_gpu_the_states_of_a_short_text_share_their_kernels(tiny):
    """What similarity launches beside a bare pass does not grow with the number of layers."""
    launched = []
    for blocks in (2, 6):
        with fake_gpus() as gpus:
            dense = tiny("llama", num_hidden_layers=blocks).to(gpu(0))
            architecture = proven(dense)
            with measuring(dense, architecture) as run:
                gpus.operations = 0
                run(IDS[:1].to(gpu(0)), None)
                seen = gpus.operations
            gpus.operations = 0
            with torch.inference_mode():
                dense.model(IDS[:1].to(gpu(0)), use_cache=False)
            launched.append(seen - gpus.operations)
    assert launched[0] == launched[1]


def test_perplexity_waits_for_the_gpu_once_a_batch_and_not_once_a_window(tiny):
    with fake_gpus() as gpus:
        dense, counts = model(tiny).to(gpu(0)), []
        for rows in (2, 12):
            gpus.waits.clear()
            token_losses(dense, IDS[:rows])
            counts.append(len(gpus.waits))
    assert counts[0] == counts[1]
