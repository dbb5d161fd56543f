"""A checkpoint that lacks layers already is not pruned again, by no way in."""

import pytest

import dropformer
from dropformer import api
from dropformer.prune.errors import PlanError
from dropformer.prune.formats.export_plan import write_by_plan


@pytest.fixture
def pruned(llama_folder, tmp_path):
    opened = dropformer.open_model(llama_folder)
    plan = api.plan_unscored(opened.ref, api.outline(opened.model), "attn=1", (), None)

    def made(format):
        out = tmp_path / format
        dropformer.save(dropformer.drop(opened, plan), out, format)
        return out

    return made


@pytest.mark.parametrize("format", ["dropformer", "deci"])
def test_a_pruned_checkpoint_is_not_pruned_again(pruned, format, tmp_path):
    folder = pruned(format)
    again = dropformer.open_model(folder)
    plan = api.plan_unscored(again.ref, api.outline(again.model), "mlp=2", (), None)
    with pytest.raises(PlanError, match="is pruned already; prune the dense model"):
        dropformer.drop(again, plan)
    with pytest.raises(PlanError, match="is pruned already"):
        write_by_plan(plan, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dense_checkpoint_with_zeros_keeps_its_blocks_in_the_record(llama_folder, tmp_path):
    opened = dropformer.open_model(llama_folder)
    plan = api.plan_unscored(opened.ref, api.outline(opened.model), "block=1", (), None)
    made = dropformer.save(dropformer.drop(opened, plan), tmp_path / "dense", "dense")
    assert made.record["original_blocks"] == {str(i): i for i in range(4)} and made.record["packed"] is False
