"""What a window takes from each attention layer, from one forward pass."""

import pytest
import torch

from dropformer import api
from dropformer.metrics.analysis.window_loss import window_losses
from dropformer.prune.architecture import Layer
from dropformer.prune.errors import CalibrationError
from dropformer.prune.window import Window


@pytest.fixture
def batches():
    return [{"input_ids": torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(5))}]


def test_a_layer_that_looks_nowhere_loses_nothing_and_others_lose_what_lies_beyond(tiny, batches):
    model = tiny("llama", initializer_range=0.3)
    with torch.no_grad():  # a layer whose values are all alike gives the same whatever it attends to
        model.model.layers[2].self_attn.v_proj.weight.zero_()
    losses = window_losses(model, api.outline(model), batches, Window(4, 1))
    assert losses[Layer("attn", 2)] == 0.0
    assert all(losses[Layer("attn", i)] > 1e-4 for i in (0, 1, 3))
    assert model.model.layers[0].self_attn.config is model.config and not model.model.layers[0]._forward_pre_hooks


def test_a_wider_window_loses_less(tiny, batches):
    model = tiny("llama", initializer_range=0.3)
    outline = api.outline(model)
    narrow, wide = (sum(window_losses(model, outline, batches, Window(w, 1)).values()) for w in (3, 16))
    assert wide < narrow


def test_windows_of_text_that_are_too_short_are_refused_with_the_length_to_give(tiny, batches):
    model = tiny("llama")
    with pytest.raises(CalibrationError, match="raise --length to about 128"):
        window_losses(model, api.outline(model), batches, Window(32))
