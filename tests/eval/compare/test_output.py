"""What a comparison writes: files, table and words."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dropformer.cli import app
from dropformer.eval.compare.comparison import CheckpointScores, Comparison, KnownFrom, spearman
from dropformer.eval.compare.output import JSON, headline, listed, notes, write
from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import OutputError
from dropformer.prune.files.output_paths import check_out

CALIBRATION = CalibrationRef(name="t", samples=1, length=8, seed=0, packed=True, skip_first=0, hash="0")


def comparison(count: int = 3, steps: bool = True, spec: str | None = "attn:2", blocks: int = 4) -> Comparison:
    rows = [
        CheckpointScores(
            label=f"step<{i}>",
            step=10**i if steps else None,
            model=ModelRef(name="org/m", revision=f"r{i}", fingerprint=str(i)),
            similarity={
                "attn": [None if (i, b) == (1, 2) else 0.9 - 0.01 * ((b + i) % blocks) for b in range(blocks)],
                "mlp": [0.5] * blocks,
            },
            mean={"attn": 0.9, "mlp": 0.5},
            chosen=["attn:0", f"attn:{1 + i % 2}"] if spec else None,
        )
        for i in range(count)
    ]
    columns = {kind: [row.similarity[kind] for row in rows] for kind in ("attn", "mlp")}
    return Comparison(
        spec=spec,
        calibration=CALIBRATION,
        checkpoints=rows,
        spearman={kind: [[spearman(a, b) for b in values] for a in values] for kind, values in columns.items()},
        overlap=[[1.0 if i == j else 0.5 for j in range(count)] for i in range(count)] if spec else None,
        overlap_by_chance=0.2 if spec else None,
        known_from=KnownFrom(label=rows[1].label, step=10, index=1) if spec else None,
    )


@pytest.mark.parametrize("found", [comparison(), comparison(20, steps=False), comparison(2, spec=None)])
def test_every_comparison_gives_pictures_a_page_and_its_json(found: Comparison, tmp_path: Path) -> None:
    page = write(found, tmp_path / "out").read_text(encoding="utf-8")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "agreement.png", "compare.html", "compare.json", "heatmaps.png", "training.png"
    }  # fmt: skip
    assert Comparison.read(tmp_path / "out" / "compare.json") == found
    assert page.count("data:image/png;base64,") == 3
    assert "step&lt;1&gt;" in page and "step<1>" not in page


def test_an_earlier_comparison_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(comparison(), out)
    write(comparison(2), out)
    assert len(json.loads((out / "compare.json").read_text())["checkpoints"]) == 2
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is not empty and holds no"):
        check_out(tmp_path, JSON)
    with pytest.raises(OutputError, match="is a file"):
        check_out(tmp_path / "file", JSON)


def test_the_headline_says_since_when_the_drop_set_is_known() -> None:
    found = comparison()
    assert headline(found) == "The 2 layers that attn:2 drops from step<2> are known from step<1> on."
    first = found.model_copy(update={"known_from": KnownFrom(label="step<0>", index=0)})
    assert headline(first).endswith("are known from the first checkpoint on.")
    last = found.model_copy(update={"known_from": KnownFrom(label="step<2>", index=2)})
    assert "was not known before" in headline(last) and "overlap of 0.50" in headline(last)


def test_the_headline_of_pruned_variants_says_what_they_lack() -> None:
    found = comparison()
    pruned = found.checkpoints[1].model_copy(update={"gone": ["attn:7", "block:2"]})
    changed = found.model_copy(update={"checkpoints": [found.checkpoints[0], pruned], "known_from": None})
    assert headline(changed) == "step<1> lacks attention 7; block 2."


def test_equal_weights_are_noted() -> None:
    found = comparison()
    twin = found.checkpoints[1].model_copy(update={"same_weights_as": "step<0>"})
    changed = found.model_copy(update={"checkpoints": [found.checkpoints[0], twin, found.checkpoints[2]]})
    assert notes(changed)[0] == "step<1> has the same weights as step<0>."


def test_layers_are_listed_by_kind() -> None:
    assert listed(["attn:10", "attn:9"]) == "9, 10"
    assert listed(["attn:3", "mlp:1", "attn:2"]) == "attention 2, 3; MLP 1"
    assert listed(["encoder.attn:3"], full=True) == "encoder attention 3"
    assert listed([]) == ""


def test_a_wrong_argument_is_answered_before_any_model_is_opened(tmp_path: Path) -> None:
    for arguments, said in (
        (["--drop", "attention:3"], "cannot be read"),
        (["--calibration", "nothing"], "text `nothing` is unknown"),
        (["--keep", "x"], "--keep `x` cannot be read"),
    ):
        result = CliRunner().invoke(app, ["compare", "a", "b", "--out", str(tmp_path / "new"), *arguments])
        assert said in str(result.exception)
    assert not (tmp_path / "new").exists()
