"""transformers: the default format after `import dropformer`, or by the code beside the weights."""

from __future__ import annotations

from dropformer.prune.engines.facts import REMOTE, CheckpointFacts
from dropformer.prune.engines.registry import Answer
from dropformer.prune.files.config_json import auto_class_name

LOAD = "from transformers import {auto} as A; A.from_pretrained({folder!r})"
KNOWN = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForImageClassification")


def answer(facts: CheckpointFacts) -> Answer:
    folder = str(facts.folder)
    auto_map = facts.config.get("auto_map") or {}
    autos = auto_map if facts.format == "dropformer" else KNOWN
    auto = auto_class_name(facts.architecture, autos) if facts.architecture else KNOWN[0]
    load = LOAD.format(auto=auto, folder=folder)
    if facts.format == "dropformer":
        if facts.config.get("model_type") == REMOTE:
            return Answer(True, load.replace(")", ", trust_remote_code=True)"), saves=facts.saves)
        command = "import dropformer; " + load
        return Answer(True, command, "or trust_remote_code=True where dropformer is not installed", "", facts.saves)
    if facts.format == "deci":
        command = f"import dropformer; dropformer.load({folder!r})"
        return Answer(True, command, "transformers alone has no model class for DeciLM", "", facts.saves)
    if facts.stock:
        return Answer(True, load, saves=facts.saves)
    if facts.format == "gguf" and facts.family != "deci":
        command = f"{load[:-1]}, gguf_file={facts.file!r})"
        return Answer(True, command, "it dequantizes the weights", "", facts.saves)
    return Answer(False, why=f"reads no {facts.format} file of this kind", instead="export with --format dropformer")
