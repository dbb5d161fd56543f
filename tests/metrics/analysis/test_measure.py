"""An analysis may be killed, shared among processes or stopped early: the numbers are the same."""

import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dropformer.metrics.analysis.analyze import analyze_model
from dropformer.metrics.analysis.measure import Measuring, measure
from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.metrics.calibration.windows import Windows
from dropformer.prune.artifact import ModelRef
from dropformer.prune.choosing import choose
from dropformer.prune.loading.load import load

REF = ModelRef(name="tiny", fingerprint="f" * 64)


def data(samples=12, length=16, seed=0):
    ids = torch.randint(3, 64, (samples, length), generator=torch.Generator().manual_seed(seed))
    everything = torch.ones_like(ids).bool()
    ref = CalibrationRef(name="x", samples=samples, length=length, seed=seed, packed=True, skip_first=0, hash=f"{seed}")
    return Windows(ids, everything, everything, ref)


@pytest.fixture
def forwards(monkeypatch):
    """How many batches the trunk has run."""
    import dropformer.metrics.analysis.measure as module

    ran = []
    real = module.measuring

    class Counting:
        def __init__(self, *args):
            self.inner = real(*args)

        def __enter__(self):
            run = self.inner.__enter__()
            return lambda *batch: (ran.append(1), run(*batch))[1]

        def __exit__(self, *args):
            return self.inner.__exit__(*args)

    monkeypatch.setattr(module, "measuring", Counting)
    return ran


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch):
    """Windows run one by one where a test does not say how many at once: it counts them."""
    monkeypatch.setattr("dropformer.metrics.analysis.measure.samples_at_once", lambda model, data: 1)


@pytest.mark.parametrize("size", [1, 5])
def test_measuring_gives_the_scores_of_a_plain_pass(tiny, size):
    scores = measure(tiny("llama"), data(), REF, Measuring(batch_size=size))
    plain = analyze_model(tiny("llama"), data().batches(4), ref=REF)
    assert scores.similarity() == pytest.approx(plain.similarity(), abs=1e-6)
    assert scores.stderr() == pytest.approx(plain.stderr(), abs=1e-6)
    assert (scores.windows, scores.tokens, scores.calibration) == (12, 192, data().ref)


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from conftest import build
from test_measure import REF, data
from dropformer.metrics.analysis.measure import Measuring, measure
def killed(done, tokens):
    if done >= 6:
        os.kill(os.getpid(), signal.SIGKILL)
measure(build("llama"), data(), REF, Measuring(batch_size=2, rows=Path(sys.argv[3])), killed)
"""


def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_numbers(tiny, tmp_path, elsewhere, forwards):
    here, kept = Path(__file__).parent, tmp_path / "kept" / "rows.jsonl"
    assert elsewhere(CHILD, here, here.parents[1], kept).returncode == -signal.SIGKILL
    resumed = measure(tiny("llama"), data(), REF, Measuring(batch_size=2, rows=kept))
    assert len(forwards) == 3  # six of twelve windows, two at a time
    assert resumed == measure(tiny("llama"), data(), REF, Measuring(batch_size=2))
    assert not kept.exists()


def interrupt(done, _tokens):
    if done >= 6:
        raise KeyboardInterrupt


def interrupted(model, kept, windows=None):
    with pytest.raises(KeyboardInterrupt):
        measure(model, windows or data(), REF, Measuring(rows=kept), interrupt)
    assert kept.exists()


def test_going_on_counts_no_tokens_that_an_earlier_run_measured(tiny, tmp_path):
    told = []
    interrupted(tiny("llama"), tmp_path / "rows.jsonl")
    measure(tiny("llama"), data(), REF, Measuring(rows=tmp_path / "rows.jsonl"), lambda *both: told.append(both))
    assert told[0] == (6, 0) and told[-1] == (12, 6 * 16)


def test_a_torn_line_is_measured_again(tiny, tmp_path, forwards):
    kept = tmp_path / "rows.jsonl"
    interrupted(tiny("llama"), kept)
    kept.write_text(kept.read_text()[:-30])
    forwards.clear()
    resumed = measure(tiny("llama"), data(), REF, Measuring(rows=kept))
    assert len(forwards) == 7
    assert resumed == measure(tiny("llama"), data(), REF)


@pytest.mark.parametrize("change", ["weights", "calibration", "dtype", "file"])
def test_rows_of_anything_else_are_not_used(change, tiny, tmp_path, forwards):
    kept, model, windows, ref = tmp_path / "rows.jsonl", tiny("llama"), data(), REF
    interrupted(model, kept)
    if change == "weights":
        ref = ModelRef(name="tiny", fingerprint="e" * 64)
    elif change == "calibration":
        windows = data(seed=1)
    elif change == "dtype":
        model = model.bfloat16()
    else:
        kept.write_bytes(b"\xff\x00 not ours\n")
    forwards.clear()
    measure(model, windows, ref, Measuring(rows=kept))
    assert len(forwards) == 12


def test_while_one_run_writes_another_measures_without_the_file(tiny, tmp_path):
    kept, inner = tmp_path / "rows.jsonl", []

    def meanwhile(done, _tokens):
        if done == 6:
            inner.append(measure(tiny("llama"), data(), REF, Measuring(rows=kept)))
            assert kept.exists()

    outer = measure(tiny("llama"), data(), REF, Measuring(rows=kept), meanwhile)
    assert inner == [outer]


def differing(tiny):
    """A model whose middle layers hardly do anything, so that what to drop is clear."""
    model = tiny("llama", num_hidden_layers=5)
    with torch.no_grad():
        for index, scale in ((1, 1e-3), (3, 1e-2)):
            model.model.layers[index].self_attn.o_proj.weight.mul_(scale)
    return model


def test_stopping_early_drops_the_same_and_says_how_many_windows_it_took(tiny, forwards):
    early = measure(differing(tiny), data(48), REF, Measuring(until_stable="attn:2"))
    assert early.settled and early.windows == early.settled.windows == len(forwards) < 48
    assert early.tokens == early.settled.tokens == 16 * early.windows
    full = measure(differing(tiny), data(48), REF)
    assert full.settled is None
    assert choose(early.outline, "attn:2", early.similarity()) == choose(full.outline, "attn:2", full.similarity())
    assert "attn:2 is settled after" in str(early.settled)


def test_what_is_never_settled_runs_all_windows_and_no_more(tiny, forwards):
    scores = measure(tiny("llama"), data(20), REF, Measuring(until_stable="attn:2"))
    assert scores.settled is None and scores.windows == len(forwards) == 20


def test_a_full_run_goes_on_where_a_settled_one_stopped(tiny, tmp_path, forwards):
    kept = tmp_path / "rows.jsonl"
    early = measure(differing(tiny), data(24), REF, Measuring(until_stable="attn:2", rows=kept))
    again = measure(differing(tiny), data(24), REF, Measuring(until_stable="attn:2", rows=kept))
    assert early == again and len(forwards) == early.windows
    full = measure(differing(tiny), data(24), REF, Measuring(rows=kept))
    assert len(forwards) == 24 and full == measure(differing(tiny), data(24), REF)


def test_scores_of_fewer_windows_are_never_taken_for_the_whole(tiny):
    early = measure(differing(tiny), data(48), REF, Measuring(until_stable="attn:2"))
    full = measure(differing(tiny), data(48), REF)
    assert full.matches(REF, data(48).ref) and not early.matches(REF, data(48).ref)


LAUNCHED = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import torch
torch.set_num_threads(1)
from conftest import build
from test_measure import REF, data
from dropformer.metrics.analysis import distributed
from dropformer.metrics.analysis.measure import Measuring, measure
distributed.join("cpu")
for name, rounds in (("fresh", [4, 8, 12]), ("resumed", [6, 10, 12])):
    ran, kept = [], Path(sys.argv[3]) / f"{name}.jsonl"
    scores = measure(build("llama"), data(), REF, Measuring(batch_size=2, rows=kept), lambda done, _: ran.append(done))
    scores.write(Path(sys.argv[3]) / f"{name}{distributed.rank()}.json")
    assert ran == rounds, ran
torch.distributed.destroy_process_group()
"""


def test_two_processes_give_the_scores_of_one(tiny, tmp_path, elsewhere):
    interrupted(tiny("llama"), tmp_path / "resumed.jsonl")
    here = Path(__file__).parent
    for done in elsewhere.launched(LAUNCHED, here, here.parents[1], tmp_path, processes=2, port=free_port()):
        assert done.returncode == 0, done.stderr[-3000:]
    one = measure(tiny("llama"), data(), REF, Measuring(batch_size=2))
    for how in ("fresh", "resumed"):
        both = [Scores.read(tmp_path / f"{how}{rank}.json") for rank in (0, 1)]
        assert both[0] == both[1]
        assert both[0].similarity() == pytest.approx(one.similarity(), abs=1e-6)
        assert both[0].stderr() == pytest.approx(one.stderr(), abs=1e-6)
        assert (both[0].windows, both[0].tokens) == (one.windows, one.tokens)


def free_port() -> int:
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def test_a_model_spread_by_a_device_map_gives_the_same_scores(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    whole = measure(load(tmp_path / "model"), data(), REF)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    places |= {"model.layers.3": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload"), dtype=torch.float32
    )
    assert any(p.is_meta for p in model.parameters())  # on disk, as accelerate keeps it
    assert measure(model, data(), REF).similarity() == pytest.approx(whole.similarity(), abs=1e-6)
