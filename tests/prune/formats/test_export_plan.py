"""Following a plan on the files alone gives what the model in memory gives, without torch and in little memory."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import dropformer
from dropformer import api
from dropformer.prune.errors import DropformerError, ModelError, OutputError, PlanError, VerificationError
from dropformer.prune.files import open_checkpoint
from dropformer.prune.formats.export import reference
from dropformer.prune.formats.export_plan import plain_writing, plan_kept, write_by_plan
from dropformer.prune.formats.writing import ExportOptions
from dropformer.prune.loading.load import load
from dropformer.prune.plan import Plan

CLIENT = """
import sys
from dropformer.cli import main
main_error = None
try:
    main()
except SystemExit as end:
    main_error = end.code
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
print(main_error, peak // 1024, sorted({"torch", "transformers", "numpy"} & sys.modules.keys()))
"""


@pytest.fixture
def planned(tiny, tmp_path):
    """A family's checkpoint in small shards, and the plan for a spec."""

    def make(family, spec, **changes):
        folder = tmp_path / family
        tiny(family, **changes).save_pretrained(folder, max_shard_size="20KB")
        opened = api.LoadedModel(load(folder), None, folder, reference(family, folder), None)
        return opened, api.plan_unscored(opened.ref, api.outline(opened.model), spec, (), None)

    return make


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".md"}


@pytest.mark.parametrize(
    ("family", "spec", "plain"),
    [
        ("llama", "attn=0,2", True),
        ("llama", "block=1", True),  # all blocks alike
        ("gemma2", "block=1", False),  # sliding and global attention by turns
        ("mixtral", "mlp=1", False),  # experts are merged on loading
        ("gpt2", "attn=3", True),
    ],
)
def test_the_files_are_those_that_the_model_in_memory_gives(planned, tmp_path, family, spec, plain):
    opened, plan = planned(family, spec)
    written = write_by_plan(plan, opened.path, tmp_path / "out")
    dropformer.save(api.drop(opened, plan), tmp_path / "same")
    mine, theirs = contents(tmp_path / "out"), contents(tmp_path / "same")
    assert mine.pop("plan.json") and mine == theirs
    assert written.record["after"]["parameters"] < written.record["before"]["parameters"]
    assert (plain_writing(plan, open_checkpoint(opened.path), ExportOptions()) is not None) == plain


def test_neither_torch_nor_transformers_is_needed_and_memory_is_small(planned, tmp_path):
    opened, plan = planned("llama", "attn=1,mlp=2")
    plan.write(tmp_path / "plan.json")
    call = ["prune", "--model", opened.path, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out", "-q"]
    client = f"import sys\nsys.argv = {list(map(str, call))}\n{CLIENT}"
    done = subprocess.run([sys.executable, "-c", client], capture_output=True, text=True, check=True)
    status, peak, imported = done.stdout.splitlines()[-1].split(" ", 2)
    assert (status, imported) == ("0", "[]"), done.stderr
    assert int(peak) < 300
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(load(tmp_path / "out")(ids).logits, api.drop(opened, plan)(ids).logits, rtol=0, atol=0)


def test_names_that_do_not_say_what_goes_are_not_trusted(planned):
    opened, plan = planned("llama", "attn=1")
    source = open_checkpoint(opened.path)
    other = {name.replace("layers.1.", "blocks.1."): span for name, span in source.tensors.items()}
    assert plain_writing(plan, replace_tensors(source, other), ExportOptions()) is None


def replace_tensors(checkpoint, tensors):
    changed = replace(checkpoint)
    object.__setattr__(changed, "tensors", tensors)
    return changed


def test_a_plan_for_other_weights_is_refused_and_nothing_is_written(planned, tmp_path):
    opened, plan = planned("llama", "attn=1")
    other = plan.model_copy(update={"model": plan.model.model_copy(update={"fingerprint": "0" * 64})})
    with pytest.raises(PlanError, match="made for other weights"):
        write_by_plan(other, opened.path, tmp_path / "out")
    with pytest.raises(OutputError, match="add --measure"):
        write_by_plan(plan, opened.path, tmp_path / "out", ExportOptions("onnx"))
    assert not (tmp_path / "out").exists()


def test_a_plan_made_with_repairs_is_followed_without_them(planned, tmp_path):
    opened, plan = planned("llama", "attn=1")
    savings = plan.savings.model_copy(update={"parameters_after": plan.savings.parameters_after + 7})
    repaired = plan.model_copy(update={"repairs": ["linear: kept"], "savings": savings})
    record = write_by_plan(repaired, opened.path, tmp_path / "out").record
    assert record["repairs"] == []
    assert record["after"]["parameters"] == plan.savings.parameters_after


def test_shards_in_which_nothing_changes_are_linked(planned, tmp_path):
    opened, plan = planned("llama", "attn=3")
    write_by_plan(plan, opened.path, tmp_path / "out", ExportOptions(link=True, thorough=True))
    links = [path for path in (tmp_path / "out").glob("*.safetensors") if path.stat().st_nlink == 2]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert links
    assert all(".layers.3." not in name for path in links for name in load_file(path))
    assert not any("layers.3.self_attn" in name for name in index)


class TestAConfigThatDoesNotFit:
    """What is written by files alone is written only where config.json still describes the plan's model."""

    @pytest.mark.parametrize(
        "field, value",
        [
            ("num_hidden_layers", 0),
            ("num_hidden_layers", 10**9),
            ("num_hidden_layers", 5),
            ("model_type", "no_such_type"),
            ("model_type", "mistral"),
            ("hidden_act", "no_such_activation"),
            ("intermediate_size", 7),
            ("vocab_size", 5),
            ("attention_bias", True),
            ("architectures", ["LlamaForSequenceClassification"]),
            ("dtype", "int7"),
            ("dtype", "float8_e4m3fn"),
        ],
    )
    def test_it_is_refused_in_a_line_and_nothing_is_left(self, tiny, tmp_path, field, value):
        tiny("llama").save_pretrained(tmp_path / "dense")
        model = dropformer.load(tmp_path / "dense")
        plan = api.plan_unscored(reference("m", tmp_path / "dense"), api.outline(model), "block=1", (), None)
        path = tmp_path / "dense" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
        with pytest.raises(DropformerError) as error:
            write_by_plan(plan, tmp_path / "dense", tmp_path / "out")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "always", "kind"),
    [
        (VerificationError("logits differ"), False, VerificationError),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"), False, ModelError),
        (OutputError("disk full"), True, OutputError),
    ],
)
def test_a_check_that_fails_keeps_the_plan_and_says_how_to_follow_it(planned, tmp_path, error, always, kind):
    plan = planned("llama", "attn=1")[1]
    with pytest.raises(kind, match=r"--plan .*small-plan\.json"), plan_kept(plan, tmp_path / "small", always):
        raise error
    assert Plan.read(tmp_path / "small-plan.json") == plan


def test_a_plan_that_is_quickly_made_again_is_not_kept(planned, tmp_path):
    plan = planned("llama", "attn=1")[1]
    with pytest.raises(OutputError, match=r"^disk full$"), plan_kept(plan, tmp_path / "small", always=False):
        raise OutputError("disk full")
    assert not (tmp_path / "small-plan.json").exists()
