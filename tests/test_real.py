"""The main job on a real pretrained model, SmolLM2-135M: what a drop costs, and that it is a real drop."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import dropformer
from dropformer import api, job, scoring
from dropformer.eval.quality.perplexity import perplexity
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import windows
from dropformer.prune.plan import Plan
from dropformer.request import ReportOptions, Request, SelectionOptions, Target

pytestmark = pytest.mark.real

DATA = Path(os.environ.get("DROPFORMER_DATA", Path(__file__).parents[2] / "shared" / "data"))
WIKITEXT = DATA / "wikitext-2" / "valid.txt"
# Perplexity over dense that an independent measurement found for attention dropped by similarity, and the slack
# that other windows of the same text need.
COST = {2: (1.1, 0.08), 4: (1.3, 0.12), 8: (1.85, 0.3)}


@pytest.fixture(scope="module")
def dense() -> api.LoadedModel:
    return api.open_model("smollm2-135m")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> tuple[str, str]:
    """Text to calibrate on and held-out text: two halves of wikitext-2 where it is at hand."""
    if not WIKITEXT.is_file():
        return "builtin", "heldout"
    folder, whole = tmp_path_factory.mktemp("text"), WIKITEXT.read_text(encoding="utf-8")
    middle = whole.index("\n = ", len(whole) // 2)
    for name, part in (("first.txt", whole[:middle]), ("second.txt", whole[middle:])):
        (folder / name).write_text(part, encoding="utf-8")
    return str(folder / "first.txt"), str(folder / "second.txt")


@pytest.fixture(scope="module")
def scores(dense, text) -> dropformer.api.Scores:
    return api.analyze(dense, calibration=Calibration(text[0], samples=6, length=256))


def test_dropping_by_similarity_costs_what_an_independent_measurement_found(dense, text, scores):
    held_out = windows(Calibration(text[1], samples=4, length=256), dense.tokenizer).ids
    base = perplexity(dense.model, held_out).value
    found = {}
    for count in COST:
        plan = dropformer.plan(scores, f"attn:{count}")
        found[count] = perplexity(dropformer.drop(dense, plan), held_out).value / base
    for count, (ratio, slack) in COST.items():
        assert found[count] == pytest.approx(ratio, abs=slack), found
    assert list(found.values()) == sorted(found.values())


def test_cached_generation_equals_uncached_with_the_first_attention_gone(dense):
    plan = api.plan_unscored(dense.ref, api.outline(dense.model), "attn=0,12,25", (), None)
    small = dropformer.drop(dense, plan)
    ids = dense.tokenizer("The capital of France is", return_tensors="pt").input_ids
    fields = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(small.generate(ids, **fields), small.generate(ids, use_cache=False, **fields))


@pytest.fixture(scope="module")
def outcome(scores, tmp_path_factory) -> Iterator[job.Outcome]:
    """The main job: four attention layers dropped, evaluated on two windows of held-out text."""
    folder = tmp_path_factory.mktemp("job")
    scores.write(folder / "scores.json")
    chosen, report = SelectionOptions(scores=folder / "scores.json"), ReportOptions(seconds=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(scoring, "HELD_OUT", Calibration("heldout", samples=2, length=128))
        yield job.run(Request("smollm2-135m", Target("attn:4"), chosen, report=report))


def test_the_checkpoint_is_smaller_by_exactly_the_dropped_tensors(dense, outcome):
    prefixes = tuple(
        f"model.layers.{layer.index}.{part}."
        for layer in outcome.plan.layers
        for part in ("self_attn", "input_layernorm")
    )
    with safe_open(dense.path / "model.safetensors", "pt") as file:
        names = list(file.keys())
        gone = sum(file.get_tensor(n).nbytes for n in names if n.startswith(prefixes))
        kept = sum(file.get_tensor(n).nbytes for n in names) - gone
    with safe_open(outcome.out / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(n).nbytes for n in file.keys()) == kept  # noqa: SIM118
    assert outcome.exported.copied.bytes_dropped == gone > 0
    record = json.loads((outcome.out / "dropformer.json").read_text())
    assert record["dropped"]["attention"] == sorted(layer.index for layer in outcome.plan.layers)
    assert record["after"]["kv_bytes_per_token"] * 30 == record["before"]["kv_bytes_per_token"] * 26


def test_the_report_compares_both_on_text_that_was_not_calibrated_on(outcome):
    assert outcome.out == Path("smollm2-135m-attn4")
    report = outcome.report
    assert (report.text.windows, report.text.length) == (2, 128)
    assert report.pruned.perplexity > report.dense.perplexity > 1
    assert report.pruned.decode_tokens_per_s > 0
    assert Plan.read(outcome.out / "plan.json").layers == outcome.plan.layers
