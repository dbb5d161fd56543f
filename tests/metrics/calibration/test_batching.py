"""How many windows run at once: what keeps the device busy, what fits, and what is done where that was wrong."""

from itertools import chain

import pytest
import torch

from dropformer.eval.quality import perplexity as perplexities
from dropformer.eval.quality.perplexity import all_side_by_side, token_losses, tokens_read
from dropformer.metrics.analysis.analyze import analyze_model, proven
from dropformer.metrics.analysis.measure import Measuring, measure
from dropformer.metrics.calibration import batching
from dropformer.metrics.calibration.batching import BUSY_CPU, BUSY_GPU, Fitting, activation_bytes, windows_at_once
from dropformer.metrics.calibration.settings import Calibration, CalibrationRef
from dropformer.metrics.calibration.windows import Windows, alike, computed_tokens, scored_windows
from dropformer.metrics.search import calibration as search
from dropformer.prune.artifact import ModelRef


def on_gpu(monkeypatch, free: int) -> None:
    """Have models count as lying on a GPU with so many bytes free."""
    monkeypatch.setattr(batching, "input_device", lambda model: torch.device("cuda:0"))
    monkeypatch.setattr(batching, "gpus_of", lambda model: [torch.device("cuda:0")])
    monkeypatch.setattr(batching, "free_bytes", lambda gpu: free)


def test_a_cpu_runs_as_many_windows_as_fill_256_tokens(tiny):
    assert [windows_at_once(tiny("llama"), length) for length in (32, 128, 512)] == [BUSY_CPU // 32, 2, 1]


def test_a_gpu_runs_as_many_windows_as_keep_it_busy_or_fit(tiny, monkeypatch):
    model = tiny("llama")
    on_gpu(monkeypatch, 1 << 40)
    assert windows_at_once(model, 512) == BUSY_GPU // 512
    on_gpu(monkeypatch, 2 * 3 * 512 * activation_bytes(model, 512))
    assert windows_at_once(model, 512) == 3
    on_gpu(monkeypatch, 0)
    assert windows_at_once(model, 512) == 1


def test_eager_attention_counts_its_scores(tiny):
    model = tiny("llama")
    model.set_attn_implementation("eager")
    assert activation_bytes(model, 4096) > activation_bytes(model, 512) + 4 * 4 * 3000


def test_an_analysis_that_may_stop_early_looks_after_few_windows(tiny):
    windows = data(torch.ones(64, 8, dtype=torch.long))
    assert Measuring().size(tiny("llama"), windows) == BUSY_CPU // 8
    assert Measuring(until_stable="attn:1").size(tiny("llama"), windows) == 4
    assert Measuring(batch_size=7, until_stable="attn:1").size(tiny("llama"), windows) == 7


def short_of_memory(limit: int, seen: list[int]):
    def run(rows):
        seen.append(len(rows))
        if len(rows) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return list(rows)

    return run


def test_what_does_not_fit_runs_in_halves_from_then_on():
    seen: list[int] = []
    fitting = Fitting(short_of_memory(3, seen))
    assert list(chain(*fitting(range(10)))) == list(range(10)) and seen == [10, 5, 2, 2, 2, 2, 2]
    assert list(chain(*fitting(range(4)))) == list(range(4)) and seen[7:] == [2, 2]


def test_one_window_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        list(Fitting(short_of_memory(0, []))(range(4)))


def data(ids):
    return scored_windows(Calibration("made up", len(ids), ids.shape[1]), ids, torch.ones_like(ids).bool(), ids > 0)


def test_an_analysis_goes_on_with_fewer_windows_where_memory_runs_out(tiny, monkeypatch):
    model, ids = tiny("llama"), torch.randint(3, 64, (6, 12), generator=torch.Generator().manual_seed(0))
    block, sizes = model.model.layers[1], []

    def fail(_module, args):
        sizes.append(len(args[0]))
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("out of memory")

    expected, found = analyze_model(model, ids.split(1)), proven(model)
    block.register_forward_pre_hook(fail)
    monkeypatch.setattr("dropformer.metrics.analysis.measure.proven", lambda model: found)
    scores = measure(model, data(ids), ModelRef(name="m"), Measuring(batch_size=6))
    assert sizes[:8] == [6, 3, 1, 1, 1, 1, 1, 1]
    for one, other in zip(scores.layers, expected.layers, strict=True):
        assert one.similarity == pytest.approx(other.similarity, abs=1e-6)


@pytest.mark.parametrize("counted", [None, "some"])
def test_losses_and_divergence_are_the_same_in_batches(tiny, monkeypatch, counted):
    dense, other = tiny("llama"), tiny("llama", num_hidden_layers=3)
    ids = torch.randint(3, 64, (5, 12), generator=torch.Generator().manual_seed(0))
    scored = None if counted is None else torch.rand(5, 12, generator=torch.Generator().manual_seed(1)) > 0.5
    found = []
    for size in (1, 3):
        monkeypatch.setattr("dropformer.eval.quality.perplexity.windows_at_once", lambda m, length, n=size: n)
        found.append((token_losses(dense, ids, 2, scored), all_side_by_side(dense, [other], ids, scored)[0]))
    (one, alone), (three, together) = found
    torch.testing.assert_close(three, one, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.losses[1], alone.losses[1], atol=1e-5, rtol=1e-5)
    assert together.divergence.value == pytest.approx(alone.divergence.value, abs=1e-6)
    assert together.divergence.tokens == alone.divergence.tokens


def documents(count=160, longest=120):
    """Windows of lengths drawn evenly, as documents of their own have."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(4, longest, (count,), generator=draw).tolist()
    made = torch.randint(3, 64, (count, longest), generator=draw)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    ref = CalibrationRef(name="x", samples=count, length=longest, seed=0, packed=False, skip_first=0, hash="x")
    return Windows(made.masked_fill(~real, 0), real, real, ref)


def computed_tokens_unsorted(data, size=8):
    lengths = data.lengths()
    return sum(size * max(lengths[i : i + size]) for i in range(0, len(lengths), size))


def test_documents_of_their_own_lengths_run_near_what_they_need_and_it_is_said(tiny, monkeypatch):
    """Analysis, perplexity and searches at eight windows at once: within a tenth; unsorted they take over half more."""
    model, data = tiny("llama"), documents()
    needed, read = sum(data.lengths()), []
    hook = model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: read.append(args[0].numel()))
    reference = token_losses(model, data.ids, scored=data.partly_scored)
    monkeypatch.setattr(perplexities, "windows_at_once", lambda *_: 8)
    read.clear()
    found = token_losses(model, data.ids, scored=data.partly_scored)
    assert needed <= sum(read) < 1.1 * needed
    assert f"tokens computed for {needed:,} needed" in tokens_read(model, data.ids, data.partly_scored)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, reference, strict=True))
    read.clear()
    measure(model, data, ModelRef(name="x"), Measuring(batch_size=8, architecture=proven(model)))
    hook.remove()
    assert needed <= sum(read) < 1.1 * needed
    monkeypatch.setattr(search, "BUSY_GPU", 8 * 120)
    batches = search.batches_of([data], torch.device("cuda"))
    computed = sum(batch.inputs["input_ids"].numel() for batch in batches)
    assert needed <= computed < 1.3 * needed < computed_tokens_unsorted(data)
    assert search.tokens_read(batches) == f"tokens: {computed:,} computed for {needed:,} needed in a pass"


def test_few_documents_of_very_different_lengths_run_with_little_padding():
    """Thirty-two documents at eight at once: 2,443 tokens are needed; in fixed eights a third more would be padding."""
    data = documents(32, 150)
    needed = sum(data.lengths())
    read = [inputs["input_ids"].numel() for inputs, _ in data.batches(8)]
    assert needed <= sum(read) == computed_tokens(data.lengths(), 8) < 1.13 * needed
    fixed = sorted(data.lengths())
    assert sum(8 * max(fixed[i : i + 8]) for i in range(0, 32, 8)) > 1.15 * needed
    assert [s.stop - s.start for s in alike([100, 110, 300], 3)] == [2, 1]
    assert [s.stop - s.start for s in alike([64] * 20, 8)] == [8, 8, 4]
