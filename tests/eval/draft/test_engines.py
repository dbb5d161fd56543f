"""The commands that run a draft in engines are those that an engine can run, or a reason."""

import json
import shlex

import pytest

from dropformer import api
from dropformer.eval.draft.engines import engine_lines

HUB = {"hub": "org/dense", "revision": "abc123"}


@pytest.fixture
def lines(llama_folder, here):
    """The lines for a draft of the tiny Llama, by its spec."""

    def make(spec, model=None, name="draft", **ref):
        opened = api.open_model(str(llama_folder))
        plan = api.plan_unscored(opened.ref, api.outline(opened.model), spec, (), None)
        api.save(api.drop(opened, plan), here / name)
        plan = plan.model_copy(update={"model": plan.model.model_copy(update=ref)})
        return engine_lines(model or str(llama_folder), here / name, plan, 4)

    return make


@pytest.mark.parametrize(
    ("spec", "vllm", "llamacpp"),
    [
        ("attn=1", "vLLM with dropformer installed: vllm serve ", "--format gguf"),
        ("block=1", "vLLM: vllm serve ", "convert_hf_to_gguf.py"),
        ("window=1@5", "vLLM: vllm serve ", "not with this draft: does not give"),
        ("attn=3,window=1@5", "vLLM with dropformer installed: vllm serve ", "not with this draft: it has no"),
        ("window=1@5+2", "vLLM: not with this draft: its attention", "not with this draft: it has no"),
    ],
)  # fmt: skip
def test_a_draft_has_a_command_where_an_engine_runs_it_and_a_reason_elsewhere(lines, spec, vllm, llamacpp):
    of_vllm, of_llamacpp = lines(spec)
    assert of_vllm.startswith(vllm) and llamacpp in of_llamacpp
    assert ("not with" in of_llamacpp) != ("-md DRAFT.gguf --spec-type draft-simple" in of_llamacpp)


def test_names_with_blanks_and_quotes_are_one_word_of_the_shell(lines, here):
    words = shlex.split(lines("attn=1", name="a draft's")[0])
    config = json.loads(words[words.index("--speculative-config") + 1])
    assert config == {"method": "draft_model", "model": str(here / "a draft's"), "num_speculative_tokens": 4}
    dense = here / "a dense 'one'"
    dense.mkdir()
    assert str(dense) in shlex.split(lines("attn=1", str(dense), "other")[0])


def test_a_model_of_the_hub_is_served_by_its_id_at_the_revision_that_was_pruned(lines):
    assert "vllm serve org/dense --revision abc123 --spec" in lines("attn=1", "org/dense@main", **HUB)[0]


def test_a_gguf_file_is_the_one_that_llama_cpp_serves_and_cuts(lines, here):
    (here / "dense.gguf").write_bytes(b"GGUF")
    of_vllm, of_llamacpp = lines("attn=1", str(here / "dense.gguf"))
    assert "vllm serve MODEL " in of_vllm
    assert of_llamacpp.count(f" {here / 'dense.gguf'} ") == 2
