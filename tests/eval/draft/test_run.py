"""A draft's repaired weights, read from the checkpoint beside its plan."""

import copy

import pytest
import torch

from dropformer import api
from dropformer.eval.draft.run import stored_repair
from dropformer.metrics.repair.base import Repair
from dropformer.prune.errors import PlanError

NAME = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def repaired(llama_folder):
    """A model, the plan of a draft with a repair, and the tensor that it changes."""
    opened = api.open_model(str(llama_folder))
    plan = api.plan_unscored(opened.ref, api.outline(opened.model), "block=1", (), None)
    new = torch.randn_like(opened.model.get_parameter(NAME))
    return opened, plan.model_copy(update={"repairs": ["refit"]}), new


@pytest.mark.parametrize("format", ["dropformer", "dense"])
def test_repaired_weights_are_found_where_blocks_moved_and_where_they_did_not(repaired, tmp_path, format):
    opened, plan, new = repaired
    api.save(api.drop(opened, plan, Repair({NAME: new})), tmp_path / "out", format)
    found = stored_repair(opened.model, plan, tmp_path / "out" / "plan.json")
    assert found.tensors.keys() == {NAME} and torch.equal(found.tensors[NAME], new)


def test_a_plan_beside_weights_without_its_repairs_is_refused(repaired, tmp_path, llama_folder):
    opened, plan, _ = repaired
    with pytest.raises(PlanError, match="holds no repaired weights"):
        stored_repair(opened.model, plan, llama_folder / "plan.json")
    small = copy.deepcopy(opened.model.config)
    small.num_hidden_layers = 2
    type(opened.model)(small).save_pretrained(tmp_path / "other")
    with pytest.raises(PlanError, match="of another model"):
        stored_repair(opened.model, plan, tmp_path / "other" / "plan.json")
