"""Acceptance on what the dense model writes, against the draft and the dense model run by hand."""

import copy

import pytest
import torch

from dropformer import api
from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.draft.acceptance import DEPTH, Acceptance, DenseText, Rounds, shortened, shortest, spread
from dropformer.metrics.draft.formula import one_step
from dropformer.metrics.draft.search import DraftSearch, Rung, draft_in_place, surgery_in_place
from dropformer.prune.architecture import Layer
from dropformer.prune.draft.generation import set_drafting, speculation
from dropformer.prune.errors import CalibrationError, PlanError
from dropformer.prune.window import Window

PLACES = [8, 20, 33]


def text(rows=2, length=50, name="a"):
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids, dtype=torch.bool)
    ref = CalibrationRef(name=name, samples=rows, length=length, seed=0, packed=True, skip_first=0, hash="")
    return Windows(ids, real, real, ref)


@pytest.fixture(scope="module")
def dense(tiny):
    return tiny("llama", initializer_range=0.3)


def layer(name):
    return Layer.parse(name)


def test_the_first_tokens_acceptance_is_the_overlap_behind_the_dense_models_cache(dense):
    """Computed by hand: the dense model reads up to the place, and the draft one token behind a copy of its cache."""
    data = text()
    draft, sources = draft_in_place(dense, api.outline(dense), [layer("mlp:1")], {})
    found = DenseText(dense, [data], PLACES).acceptance(draft, sources)
    with torch.no_grad():
        for n, row in enumerate(data.ids):
            for i, place in enumerate(PLACES):
                cache = dense(row[None, :place], use_cache=True).past_key_values
                q = draft(row[None, place : place + 1], past_key_values=cache).logits[0, -1].softmax(-1)
                p = dense(row[None, : place + 1]).logits[0, -1].softmax(-1)
                assert float(found.overlap[n, i, 0]) == pytest.approx(float(torch.minimum(p, q).sum()), abs=2e-3)
                assert bool(found.agreement[n, i, 0]) == bool(p.argmax() == q.argmax())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_draft_that_is_the_dense_model_is_always_accepted(tiny, family):
    same = tiny(family, initializer_range=0.3)
    outline = api.outline(same)
    wide = {} if family == "gemma3_text" else {layer("attn:0"): Window(100, 4)}
    draft, sources = draft_in_place(same, outline, [], wide)
    found = DenseText(same, [text(1), text(1, name="b")], PLACES).acceptance(draft, sources)
    assert found.overlap.shape == (2, 3, DEPTH) and found.mean == pytest.approx(1, abs=2e-3)
    assert found.by_domain == pytest.approx({"a": 1, "b": 1}, abs=2e-3) and list(found.by_position) == PLACES
    assert found.rounds(3).tokens == pytest.approx(4, abs=0.01)


def test_padding_is_not_read(dense):
    whole = text(2)
    real = whole.padding.clone()
    real[1, 40:] = False
    draft, sources = draft_in_place(dense, api.outline(dense), [layer("mlp:1")], {})
    padded = Windows(whole.ids.where(real, torch.zeros(())).long(), real, real, whole.ref)
    read = DenseText(dense, [padded], PLACES)
    assert [row.shape[1] for row in read.rows] == [50, 40] and shortest([padded]) == 40
    found = read.acceptance(draft, sources)
    assert found.mean == pytest.approx(DenseText(dense, [whole], PLACES).acceptance(draft, sources).mean, abs=1e-6)
    with pytest.raises(CalibrationError, match="windows of 40 tokens end before 46"):
        DenseText(dense, [padded], [45])


def test_at_temperature_0_acceptance_is_greedy_agreement(dense):
    draft, sources = draft_in_place(dense, api.outline(dense), [layer("mlp:1")], {})
    found = DenseText(dense, [text()], PLACES, temperature=0).acceptance(draft, sources)
    assert torch.equal(found.accepted, found.agreement) and found.mean < 1


def test_what_is_predicted_of_greedy_rounds_is_what_assisted_decoding_gives(dense):
    data, drafted = text(3), 3
    layers, rounds = [layer("mlp:1")], []
    draft, sources = draft_in_place(dense, api.outline(dense), layers, {})
    read = DenseText(dense, [data], PLACES, temperature=0)
    found = read.acceptance(draft, sources).rounds(drafted)
    set_drafting(draft, drafted)
    how = {"do_sample": False, "max_new_tokens": DEPTH, "min_new_tokens": DEPTH, "eos_token_id": None}
    surgery = surgery_in_place(api.outline(dense), layers, {})
    for row, (cache, *_) in zip(data.ids, read.kept, strict=True):
        for place in PLACES:
            past = shortened(cache, place)
            drafting = speculation(draft, surgery, rounds)
            dense.generate(
                row[None, : place + 1], past_key_values=past, custom_generate=drafting, pad_token_id=0, **how
            )
    rounds = [(tokens, good) for tokens, good in rounds if tokens]
    accepted = sum(good for _, good in rounds)
    judged = accepted + sum(good < tokens for tokens, good in rounds)
    assert 0.2 < accepted / judged < 0.95  # later rounds read the dense model's keys of what was verified, so nearly:
    assert found.count == pytest.approx(len(rounds), rel=0.05) and found.judged == pytest.approx(judged, rel=0.05)
    assert found.acceptance == pytest.approx(accepted / judged, abs=0.03)


def test_rounds_of_chances_are_the_mean_of_those_that_are_drawn():
    chances = torch.tensor([[[0.9, 0.2, 0.6, 1.0, 0.5, 0.7]]], dtype=torch.float64)
    expected = Acceptance(chances, chances, torch.tensor([1]), ("a",)).rounds(2)
    drawn = (torch.rand(20_000, 1, 6, generator=torch.Generator().manual_seed(0)) < chances).double()
    found = Acceptance(drawn, drawn, torch.tensor([1]), ("a",) * len(drawn)).rounds(2)
    for name in ("count", "accepted", "judged"):
        assert getattr(found, name) / len(drawn) == pytest.approx(getattr(expected, name), rel=0.01)
    sure = torch.tensor([[[1.0, 0, 1, 1, 1]]])
    assert Acceptance(sure, sure, torch.tensor([1]), ("a",)).rounds(2) == Rounds(2, 3, 4)


def test_tokens_behind_a_place_are_drawn_from_the_dense_model_at_its_temperature(dense):
    hot, again = (DenseText(dense, [text(1)], PLACES, temperature=1.0).kept[0][1] for _ in range(2))
    greedy = DenseText(dense, [text(1)], PLACES, temperature=0).kept[0][1]
    assert torch.equal(hot, again) and torch.equal(hot[:, 0], greedy[:, 0]) and not torch.equal(hot, greedy)


def test_windows_that_end_before_the_places_are_refused(dense):
    with pytest.raises(CalibrationError, match="end before"):
        DenseText(dense, [text(length=33)], PLACES)
    assert spread(100, 4, 20)[0] == 20 and spread(100, 4, 20)[-1] == 100 - DEPTH


def test_the_search_finds_the_best_of_all_counts(dense):
    outline = api.outline(dense)
    read = DenseText(dense, [text(1)], PLACES)
    rungs = [
        Rung("mlp", (layer("mlp:2"), layer("mlp:1"))),
        Rung("window", tuple(layer(f"attn:{i}") for i in (1, 3, 0)), Window(6, 2)),
    ]
    search = DraftSearch(read, outline, lambda gone, seen: 1 - 0.02 * len(gone) - 0.3 * len(seen), lambda n: 1.0)
    found = search(rungs)
    assert found.speedup == max(candidate.speedup for candidate in search.tried.values())
    others = [search.measured([], dict.fromkeys(rungs[1].ranking[:n], Window(6, 2))).speedup for n in (1, 2, 3)]
    assert found.speedup >= max(others) and len(search.tried) > 5
    with pytest.raises(PlanError, match="no layer"):
        DraftSearch(read, outline, search.cost, search.verify, most=0)([rungs[0]])


def test_acceptance_in_bfloat16_is_that_of_float32_for_every_draft_that_a_search_tries(dense):
    halved = copy.deepcopy(dense).bfloat16()
    outline, tried = api.outline(dense), []
    for model in (copy.deepcopy(halved).float(), halved):
        search = DraftSearch(
            DenseText(model, [text(1)], PLACES[:2]), outline, lambda gone, _: 1 - 0.1 * len(gone), one_step
        )
        search(
            [
                Rung("mlp", tuple(reversed(outline.layers("mlp")))),
                Rung("w", tuple(outline.layers("attn")), Window(8, 2)),
            ]
        )
        tried.append({key: (one.acceptance, one.speedup) for key, one in search.tried.items()})
    shared = tried[0].keys() & tried[1].keys()
    assert len(shared) > 4
    for key in shared:
        assert tried[1][key] == pytest.approx(tried[0][key], abs=0.03)
