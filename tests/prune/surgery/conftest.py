"""A checkpoint of a tiny Llama to drop layers of."""

import pytest

import dropformer
from dropformer import api
from dropformer.prune.formats.export import reference
from dropformer.prune.loading.load import load


@pytest.fixture
def written(tiny, tmp_path):
    """Drops what a spec names from a tiny Llama's checkpoint; the folder of the pruned one."""

    def write(spec):
        dense = tmp_path / "dense"
        tiny("llama").save_pretrained(dense)
        opened = api.LoadedModel(load(dense), None, dense, reference("m", dense), None)
        plan = api.plan_unscored(opened.ref, api.outline(opened.model), spec, (), None)
        dropformer.save(api.drop(opened, plan), tmp_path / "small")
        return tmp_path / "small"

    return write
