"""A metric, a selection, a repair, an export format, a probe and a backend of one's own: one entry each."""

import json
import subprocess
import sys

import pytest
import torch
from command import bad, run

from dropformer.metrics.repair.base import Changes
from dropformer.metrics.repair.registry import REPAIRS, RepairEntry
from dropformer.metrics.search.registry import METRICS, SELECTIONS, MetricEntry, SelectionEntry
from dropformer.prune.errors import EvaluationError, OutputError
from dropformer.prune.formats.registry import FORMATS, Format
from dropformer.prune.formats.writing import write_pruned

SMALL = ("--samples", "3", "--length", "16", "--seconds", "0", "--gate", "builtin", "-q")


def shallow_first(context):
    """The first attention layers are the most redundant."""
    return {layer: -float(layer.index) for layer in context.layers()}


def pick_last(improver, free, count, gone):
    return sorted(free, key=lambda layer: -layer.index)[:count]


def halve(context):
    """Half of the last norm before an MLP, which is a change whatever was dropped."""
    name = "model.layers.3.post_attention_layernorm.weight"
    return Changes({name: context.model.get_parameter(name) / 2})


def write_toy(job, folder):
    (folder / "toy.txt").write_text("a toy was here")
    return write_pruned(job, folder)


def check_toy(facts):
    if facts.config and facts.config["model_type"] != "llama":
        raise OutputError("--format toy takes a llama; leave out --format")


TOY = Format(write_toy, "a toy", "Load it as a toy.", help="a toy of one's own", check=check_toy, links=False)


def dropped(here):
    return json.loads((here / "out" / "dropformer.json").read_text())["dropped"]["attention"]


def test_a_metric_is_one_entry(lettered, here, capsys):
    options = ("--drop", "attn:1", "--out", "out", *SMALL[:-3], "-q")
    with METRICS.having("shallow", MetricEntry("the first ones", shallow_first)):
        assert run("--model", lettered, "--metric", "shallow", *options, capsys=capsys)[0] == 0
    assert dropped(here) == [0]
    said = "--metric `shallow` is unknown; expected one of similarity, "
    bad("--model", lettered, "--metric", "shallow", "--drop", "attn:1", capsys=capsys, here=here, said=said)


def test_a_selection_is_one_entry(lettered, here, capsys):
    options = ("--drop", "attn:1", "--out", "out", *SMALL[:-3], "-q")
    with SELECTIONS.having("last", SelectionEntry("the last ones", pick_last)):
        assert run("--model", lettered, "--select", "last", *options, capsys=capsys)[0] == 0
    assert dropped(here) == [3]


def test_a_repair_is_one_entry_and_its_weights_reach_the_checkpoint(lettered, here, capsys):
    from dropformer import load, open_model

    with REPAIRS.having("halve", RepairEntry("half a norm", halve)):
        done = run("--model", lettered, "--drop", "attn=1", "--repair", "halve", "--out", "out", *SMALL, capsys=capsys)
    assert done[0] == 0, done
    plan = json.loads((here / "out" / "plan.json").read_text())
    norm = "model.layers.3.post_attention_layernorm.weight"
    halved = torch.equal(load(here / "out").get_parameter(norm), open_model(lettered).model.get_parameter(norm) / 2)
    assert halved == bool(plan["repairs"])  # the gate keeps it only where it helps


def test_a_format_is_one_entry_with_its_own_checks_and_clashes(lettered, here, capsys):
    options = ("--drop", "attn=1", "--format", "toy", "--out", "out", "--no-measure", "-q")
    with FORMATS.having("toy", TOY):
        said = "--link has no effect with --format toy"
        bad("--model", lettered, *options, "--link", capsys=capsys, here=here, said=said)
        status, out, _ = run("--model", lettered, *options, capsys=capsys)
        assert status == 0 and "(a toy)" in out
        assert (here / "out" / "toy.txt").exists()
        assert json.loads((here / "out" / "dropformer.json").read_text())["format"] == "toy"
        config = json.loads((lettered / "config.json").read_text())
        (lettered / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
        again = ("--drop", "attn=1", "--format", "toy", "--out", "two")
        bad("--model", lettered, *again, capsys=capsys, here=here, said="--format toy takes a llama")
    said = "--format `toy` is unknown; expected one of dropformer, dense"
    bad("--model", lettered, *again, capsys=capsys, here=here, said=said)


def test_help_names_what_the_registries_hold():
    script = (
        "import sys; sys.argv = ['prune', '--help']\n"
        "from dropformer.metrics.repair.registry import REPAIRS, RepairEntry\n"
        "from dropformer.metrics.search.registry import METRICS, MetricEntry\n"
        "from dropformer.prune.formats.registry import FORMATS, Format\n"
        "FORMATS.add('toyformat', Format('m:f', 'a', 'b', help='toyhelp'))\n"
        "METRICS.add('toymetric', MetricEntry('a', 'm:f'))\n"
        "REPAIRS.add('toyrepair', RepairEntry('a', 'm:f'))\n"
        "from dropformer import cli; cli.main()"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert all(name in said for name in ("toyformat", "toyhelp", "toymetric", "toyrepair")), said


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="--format dense is taken"), FORMATS.having("dense", TOY):
        pass


def test_a_probe_is_one_entry(lettered):
    from dropformer import open_model
    from dropformer.eval.quality.probes import PROBES, Probe, Question, run_probes

    opened = open_model(lettered)
    one = Probe("vowels", "", (Question("a b c", (" d", " e")), Question("a b", (" a", " b"))))
    with PROBES.having("vowels", lambda seed: one):
        found = run_probes(opened.model, opened.tokenizer)
    assert [(result.name, result.questions) for result in found if result.name == "vowels"] == [("vowels", 2)]
    with pytest.raises(EvaluationError, match="probe `vowels` is unknown; expected one of copy, addition, needle"):
        run_probes(opened.model, opened.tokenizer, names=["vowels"])


def test_a_backend_is_one_entry(lettered, here, capsys):
    from dropformer.eval.tasks.backends import BACKENDS, BackendEntry

    options = ("evaluate", lettered, "--text", "", "--no-probes", "--backend", "toy")
    with BACKENDS.having("toy", BackendEntry("a toy", "m:f")):
        assert run(*options, "-q", capsys=capsys)[0] == 0
    bad(*options, capsys=capsys, here=here, said="--backend `toy` is unknown; expected one of fast, hf")
