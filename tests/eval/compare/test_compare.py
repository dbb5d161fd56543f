"""Comparing checkpoints, on tiny models whose weights are moved a little from one to the next."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dropformer import api
from dropformer.eval.compare.compare import CompareRequest, compare
from dropformer.eval.compare.comparison import Comparison
from dropformer.metrics.calibration.settings import Calibration
from dropformer.progress import Progress, Silent
from dropformer.prune.errors import CheckpointError, ModelError, PlanError

BLOCKS = 5


class Listener(Silent):
    """Keeps what it hears: what was said, and which stages of work there were."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.stages: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def stage(self, name: str, total: int | None = None):
        self.stages.append(name)
        return super().stage(name, total)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scores are kept here, and the calibration text lies in the working folder."""
    monkeypatch.setenv("DROPFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    words = ["the", "heart", "and", "nerve", "which", "moves", "a", "star", "under", "light"]
    draw = random.Random(0)
    Path("words.txt").write_text(" ".join(draw.choice(words) for _ in range(900)), encoding="utf-8")
    return tmp_path / "cache"


TEXT = Calibration("words.txt", samples=3, length=24)


@pytest.fixture
def checkpoint(tmp_path: Path, tiny: SimpleNamespace, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Write a tiny Llama moved from its first weights by `moved`, with its tokenizer or another, or none.

    The attention of `silent` blocks adds nothing to the residual stream.
    """

    def write(
        name: str,
        moved: float = 0.0,
        tokens: PreTrainedTokenizerFast | None = tokenizer,
        silent: tuple[int, ...] = (),
        **shape: int,
    ) -> Path:
        model = tiny.llama(**{"num_hidden_layers": BLOCKS, **shape})
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(moved * torch.randn_like(parameter))
            for index in silent:
                model.model.layers[index].self_attn.o_proj.weight.zero_()
        folder = tmp_path / name
        model.save_pretrained(folder)
        if tokens is not None:
            tokens.save_pretrained(folder)
        return folder

    return write


def run(*names: Path | str, drop: str | None = "attn:2", progress: Progress | None = None, **fields) -> Comparison:
    return compare(CompareRequest([str(name) for name in names], drop, calibration=TEXT, **fields), progress)


def test_each_checkpoint_has_the_scores_that_analyze_gives_it(checkpoint) -> None:
    first, second = checkpoint("a"), checkpoint("b", 0.1)
    found = run(first, second)
    for folder, row in zip((first, second), found.checkpoints, strict=True):
        scores = api.analyze(str(folder), calibration=TEXT)
        assert [row.similarity[x.kind][x.index] for x in scores.similarity()] == list(scores.similarity().values())
        assert row.model == scores.model
        assert scores.calibration == found.calibration


def test_a_training_run_is_compared_by_step_with_its_final_model(checkpoint, tmp_path) -> None:
    for step, moved in ((0, 0.0), (2, 0.05), (10, 0.1)):
        checkpoint(f"run/checkpoint-{step}", moved)
    shutil.copytree(checkpoint("final", 0.2), tmp_path / "run", dirs_exist_ok=True)
    found = run(tmp_path / "run")
    assert [c.label for c in found.checkpoints] == ["checkpoint-0", "checkpoint-2", "checkpoint-10", "run"]
    assert [c.step for c in found.checkpoints] == [0, 2, 10, None]


def test_what_the_last_checkpoint_drops_is_known_from_the_first_that_always_agrees(checkpoint) -> None:
    silent = {1: (2, 3), 2: (0, 1), 3: (1, 2), 4: (2, 3), 5: (2, 3)}
    found = run(*(checkpoint(f"checkpoint-{step}", step / 100, silent=blocks) for step, blocks in silent.items()))
    assert [set(c.chosen) for c in found.checkpoints] == [{f"attn:{i}" for i in blocks} for blocks in silent.values()]
    assert (found.known_from.label, found.known_from.step, found.known_from.index) == ("checkpoint-4", 4, 3)
    assert [row[-1] for row in found.overlap] == [1.0, 0.0, pytest.approx(1 / 3), 1.0, 1.0]
    assert found.overlap_by_chance == pytest.approx(0.3)  # of 10 pairs 1 is equal, 6 share one of three


def test_without_a_drop_spec_only_the_scores_are_compared(checkpoint) -> None:
    found = run(checkpoint("a"), checkpoint("b", 0.1), drop=None)
    assert found.overlap is found.known_from is None
    assert found.spearman["attn"][0][1] == found.spearman["attn"][1][0]


def test_scores_are_reused_by_weights_and_tokens(checkpoint) -> None:
    names = checkpoint("a"), checkpoint("b", 0.1)
    first, again = Listener(), Listener()
    found = run(*names, progress=first)
    assert run(*names, progress=again) == found
    assert len(first.stages) == 2 and not again.stages
    assert all("reused" in line for line in again.said)


def test_an_interrupted_comparison_goes_on_where_it_stopped(checkpoint) -> None:
    names = [checkpoint("a"), checkpoint("b", 0.1), checkpoint("c", 0.2)]
    heard = Listener()
    heard.stage = lambda name, total=None: _stop() if "2 of 3" in name else Silent.stage(heard, name, total)
    with pytest.raises(KeyboardInterrupt):
        run(*names, progress=heard)
    again = Listener()
    run(*names, progress=again)
    assert again.stages == ["scoring b (2 of 3)", "scoring c (3 of 3)"]


def _stop() -> None:
    raise KeyboardInterrupt


def test_a_damaged_cache_entry_is_measured_again(checkpoint, cache) -> None:
    names = checkpoint("a"), checkpoint("b", 0.1)
    found = run(*names)
    for path in (cache / "scores").iterdir():
        path.write_text("{")
    assert run(*names) == found


def test_equal_weights_under_two_names_are_pointed_out(checkpoint) -> None:
    found = run(checkpoint("step0"), checkpoint("step2"), checkpoint("step4", 0.1))
    assert [c.same_weights_as for c in found.checkpoints] == [None, "step0", None]


@pytest.mark.parametrize(
    ("shape", "difference"),
    [
        ({"num_hidden_layers": BLOCKS + 1}, "number of blocks is 6, not 5"),
        ({"hidden_size": 64}, "hidden_size is 64, not 32"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, not 2"),
    ],
)
def test_another_architecture_is_refused_with_the_difference_before_any_scoring(checkpoint, shape, difference) -> None:
    heard = Listener()
    with pytest.raises(ModelError, match=f"^b cannot be compared with a: its {difference}"):
        run(checkpoint("a"), checkpoint("b", **shape), progress=heard)
    assert not heard.stages


def test_another_family_is_refused(checkpoint) -> None:
    other = checkpoint("b")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    with pytest.raises(ModelError, match="its family is mistral, not llama"):
        run(checkpoint("a"), other)


def test_another_tokenizer_is_refused_with_the_first_difference(checkpoint, tiny) -> None:
    heard = Listener()
    with pytest.raises(ModelError, match=r"texts begin with \[0\] instead of \[\]"):
        run(checkpoint("a"), checkpoint("b", tokens=tiny.tokenizer(bos=True)), progress=heard)
    assert not heard.stages


def from_parts(parts: dict) -> PreTrainedTokenizerFast:
    inner = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def test_a_tokenizer_that_splits_text_otherwise_is_refused_with_the_token(checkpoint, tokenizer) -> None:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["model"]["merges"] = parts["model"]["merges"][:20]
    other = from_parts(parts)
    with pytest.raises(ModelError, match=r"other ids on words\.txt \(\d+ instead of \d+ at token \d+ of text 0\)"):
        run(checkpoint("a"), checkpoint("b", tokens=other))


def test_a_tokenizer_written_otherwise_with_the_same_ids_is_the_same(checkpoint, tokenizer) -> None:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["decoder"] = None  # says nothing about how text becomes ids
    other = from_parts(parts)
    assert len(run(checkpoint("a"), checkpoint("b", 0.1, tokens=other)).checkpoints) == 2


def test_a_checkpoint_without_a_tokenizer_takes_the_others_ids(checkpoint) -> None:
    found = run(checkpoint("a", tokens=None), checkpoint("b", 0.1))
    assert found == run(checkpoint("a"), checkpoint("b", 0.1))


def test_where_no_checkpoint_has_a_tokenizer_one_must_be_given(checkpoint, tokenizer, tmp_path) -> None:
    names = checkpoint("a", tokens=None), checkpoint("b", 0.1, tokens=None)
    with pytest.raises(ModelError, match=r"none of the checkpoints has a tokenizer .*give --tokenizer"):
        run(*names)
    tokenizer.save_pretrained(tmp_path / "tokens")
    assert len(run(*names, tokenizer=str(tmp_path / "tokens")).checkpoints) == 2


def test_ids_that_a_checkpoint_does_not_know_are_refused(checkpoint) -> None:
    with pytest.raises(ModelError, match="it has 50 tokens and the calibration text uses token"):
        run(checkpoint("a"), checkpoint("b", tokens=None, vocab_size=50))


def test_a_spec_that_asks_for_too_much_is_refused_before_any_is_scored(checkpoint) -> None:
    heard = Listener()
    with pytest.raises(PlanError, match="`attn:6` drops 6 layers, but a has 5 of that kind"):
        run(checkpoint("a"), checkpoint("b", 0.1), drop="attn:6", progress=heard)
    assert heard.stages == []


def test_a_spec_that_names_layers_is_refused(checkpoint) -> None:
    with pytest.raises(PlanError, match="give counts, as in attn:8"):
        run(checkpoint("a"), checkpoint("b", 0.1), drop="attn=1,2")


def test_one_checkpoint_is_not_a_comparison(checkpoint) -> None:
    with pytest.raises(ModelError, match="needs two checkpoints or more, and there is 1"):
        run(checkpoint("a"))


def prune(folder: Path, drop: str, out: Path) -> Path:
    opened = api.open_model(folder)
    scores = api.analyze(opened, calibration=TEXT)
    api.save(api.drop(opened, api.plan(scores, drop)), out)
    return out


def test_dense_and_pruned_are_aligned_by_original_index(checkpoint, tmp_path) -> None:
    dense = checkpoint("dense")
    pruned = prune(dense, "block=1,3", tmp_path / "pruned")  # packed: its blocks 0, 1, 2 are 0, 2, 4
    found = run(dense, pruned, drop="attn:1")
    assert found.checkpoints[1].gone == ["block:1", "block:3"]
    assert found.known_from is None  # that is a question about training
    own = api.analyze(str(pruned), calibration=TEXT).similarity()
    for kind in ("block", "attn", "mlp"):
        row = found.checkpoints[1].similarity[kind]
        assert row[1] is row[3] is None
        assert [row[0], row[2], row[4]] == [value for layer, value in own.items() if layer.kind == kind]
    assert found.checkpoints[0].similarity["attn"][0] == found.checkpoints[1].similarity["attn"][0]  # before any drop


def test_two_pruned_variants_compare_the_layers_that_both_have(checkpoint, tmp_path) -> None:
    dense = checkpoint("dense")
    one = prune(dense, "attn=1", tmp_path / "one")  # stays a model with a hole
    two = prune(dense, "mlp=1,attn=2", tmp_path / "two")  # packs: attention of 1 with the MLP of 2
    found = run(one, two, drop="attn:2,mlp:1")
    first, second = found.checkpoints
    assert [i for i, v in enumerate(first.similarity["attn"]) if v is None] == [1]
    assert [i for i, v in enumerate(first.similarity["mlp"]) if v is None] == []
    assert [i for i, v in enumerate(second.similarity["attn"]) if v is None] == [2]
    assert [i for i, v in enumerate(second.similarity["mlp"]) if v is None] == [1]
    assert [i for i, v in enumerate(second.similarity["block"]) if v is None] == [1, 2]
    assert "attn:1" not in first.chosen and not {"attn:2", "mlp:1"} & set(second.chosen)


def test_gone_blocks_are_never_chosen_again(checkpoint, tmp_path) -> None:
    dense = checkpoint("dense")
    pruned = prune(dense, "block=1,3", tmp_path / "pruned")
    assert set(run(pruned, dense, drop="block:2", keep=(0,)).checkpoints[0].chosen) == {"block:2", "block:4"}
    with pytest.raises(PlanError, match="drops more blocks than"):
        run(pruned, dense, drop="block:3", keep=(0,))


def test_a_damaged_dropformer_json_is_named(checkpoint, tmp_path) -> None:
    pruned = prune(checkpoint("dense"), "attn=1", tmp_path / "pruned")
    (pruned / "dropformer.json").write_text('{"dropped": 3}')
    with pytest.raises(CheckpointError, match=r"dropformer\.json does not say which layers are dropped"):
        run(pruned, tmp_path / "dense")
