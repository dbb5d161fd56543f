"""`sweep`: quality and speed for every number of drops, against the dense model whatever the range begins with."""

import math

import pytest

from dropformer import job
from dropformer.eval.cost.timing import Setting
from dropformer.eval.quality.drop_range import parse_range
from dropformer.eval.quality.sweep import Sweep, draw, find_cliff, table
from dropformer.progress import Silent
from dropformer.prune.errors import PlanError
from dropformer.request import CalibrationOptions, Request, Target


@pytest.fixture(scope="module")
def folder(tiny, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.llama(num_hidden_layers=4).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DROPFORMER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(job, "SWEEP", Setting(prompt=16, new=2))
        request = Request(str(folder), Target("attn:3"), calibration=CalibrationOptions(["builtin"], 3, 32))
        return job.sweep(request, "attn:{}", [2, 3], (2, 32), Silent(), speed=True)


def test_the_dense_model_comes_first_even_if_the_range_begins_later(found):
    assert [point.drops for point in found.points] == [0, 2, 3]
    assert found.points[0].kl == 0 and found.points[0].layers == [] and found.points[0].decode_bound == 1
    assert set(found.points[1].layers) < set(found.points[2].layers)


def test_every_point_has_its_measured_speed_and_what_its_work_allows(found):
    assert found.points[0].decode == (1, 1, 1)
    for point in found.points[1:]:
        assert point.decode[0] <= point.decode[1] <= point.decode[2] and point.decode_bound > 1
    head, rows = table(found)
    assert head[-1] == "decode measured" and len(rows) == 3 and all(len(row) == len(head) for row in rows)


def test_a_sweep_survives_its_json_and_is_drawn(found, tmp_path):
    read = Sweep.read(found.write(tmp_path / "sweep.json"))
    assert read == found
    steep = read.model_copy(update={"cliff": 3})
    assert draw(steep, tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_the_cliff_is_looked_for_in_log_perplexity(found):
    values = [10.0, 10.5, 11.0, 40.0]
    points = [
        found.points[0].model_copy(update={"drops": i, "perplexity": v, "window_nll": []}) for i, v in enumerate(values)
    ]
    assert find_cliff(points) == 3
    assert find_cliff([p.model_copy(update={"perplexity": 10 * math.exp(0.1 * p.drops)}) for p in points]) is None


@pytest.mark.parametrize(
    "text", ["attn:4", "attn:2..1", "attn:1..2..0", "attn", "attn:1..x", "attn:0..2@8", "window:0..2"]
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(PlanError, match="is no range of drops"):
        parse_range(text)


def test_numbers_of_windows_are_swept_on_text_that_is_longer(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DROPFORMER_CACHE", str(tmp_path))
    spec, counts = parse_range("window:0..4..2@8+1")
    request = Request(str(folder), Target(spec.format(4)), calibration=CalibrationOptions(["builtin"], 2, 64))
    swept = job.sweep(request, spec, counts, (2, 48), Silent())
    assert [point.drops for point in swept.points] == [0, 2, 4] and swept.of == "window@8+1"
    assert swept.points[0].kl == 0 < swept.points[1].kl
    assert draw(swept, tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(PlanError, match="larger --length"):
        job.sweep(request, spec, counts, (2, 9), Silent())
