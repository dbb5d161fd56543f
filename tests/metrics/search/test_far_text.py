"""KL of rungs at the end of long texts."""

import pytest
import torch

from dropformer import api
from dropformer.metrics.blockwise.divergence import kl_divergence
from dropformer.metrics.draft.search import draft_in_place
from dropformer.metrics.search.far_text import FarText, tail_of
from dropformer.prune.architecture import Layer
from dropformer.prune.draft.shared_cache import view_of
from dropformer.prune.window import Window

LENGTH = 200


@pytest.fixture(params=["llama", "gemma3_text"])
def read(request, tiny):
    model = tiny(request.param, initializer_range=0.3, max_position_embeddings=LENGTH)
    ids = torch.randint(3, 64, (LENGTH,), generator=torch.Generator().manual_seed(1))
    return FarText(model, api.outline(model), ids, [Window(8, 2), Window(64, 2), Window(LENGTH)])


def test_a_candidate_is_read_behind_the_dense_cache_as_a_model_of_its_own_would_be(read):
    for layer in read.damages:
        for actions in ({layer: Window(8, 2)}, {layer: None}, dict.fromkeys(read.damages, Window(8, 2))):
            gone = [one for one, action in actions.items() if action is None]
            windows = {one: action for one, action in actions.items() if action}
            own, sources = draft_in_place(read.model, read.outline, gone, windows)
            with torch.inference_mode():
                view = view_of(read.cache, own, sources)
                logits = own(input_ids=read.tail, past_key_values=view, use_cache=True).logits[0]
            expected = float(kl_divergence(read.dense, logits.log_softmax(-1)).mean())
            assert read.kl(actions) == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert expected > 1e-6


def test_a_window_as_long_as_the_text_costs_nothing_and_a_wider_one_changes_less(read):
    for layer, damages in read.damages.items():
        assert damages[Window(8, 2)] > damages[Window(64, 2)] > damages[Window(LENGTH)] == pytest.approx(0, abs=1e-9)
        assert read.kl({layer: Window(LENGTH)}) == pytest.approx(0, abs=1e-6)


def test_what_was_read_is_counted_in_passes(read):
    before, last = read.work, Layer("attn", read.outline.stacks[0].blocks - 1)
    if last in read.damages:
        read.kl({last: Window(8, 2)})
        assert 0 < read.work - before < 3 * tail_of(LENGTH) / LENGTH
