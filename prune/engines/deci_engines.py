"""SGLang and TensorRT-LLM: both run Nemotron's DeciLM, and models as they are.  Read, not run."""

from __future__ import annotations

from dropformer.prune.engines.facts import CheckpointFacts
from dropformer.prune.engines.registry import TRANSFORMERS, Answer

READ = "read, not run: compare its first answers"


def sglang(facts: CheckpointFacts) -> Answer:
    """SGLang 0.5.23."""
    command = f"python -m sglang.launch_server --model-path {facts.path} --trust-remote-code"
    return _answer(facts, command, bias=None)


def tensorrt_llm(facts: CheckpointFacts) -> Answer:
    """TensorRT-LLM."""
    return _answer(facts, f"trtllm-serve {facts.path} --trust_remote_code", bias="leaves out attention biases")


def _answer(facts: CheckpointFacts, command: str, bias: str | None) -> Answer:
    """`bias`: what the engine does wrong with biases in attention, None where it has them."""
    if facts.stock:
        return Answer(True, command.rpartition(" ")[0], "where it has the base model", "", facts.saves)
    if facts.format == "deci":
        if why := _unable(facts, bias):
            return Answer(False, why=why, instead="export with --format dense")
        return Answer(True, command, READ, "", facts.saves)
    if facts.format != "dropformer":
        return Answer(False, why=f"was not tried with {facts.format} files", instead="export with --format dense")
    instead = "export with --format dense" if facts.lacks_alone else TRANSFORMERS
    if facts.fits_deci:
        instead = f"export with --format deci, or {instead.removeprefix('export with ')}"
    why = "of models with missing layers it has DeciLM alone"
    if not facts.lacks_alone:
        why = "the architecture is dropformer's own, and DeciLM, which it has, holds missing layers alone"
    return Answer(False, why=why, instead=instead)


def _unable(facts: CheckpointFacts, bias: str | None) -> str | None:
    """What in this DeciLM the engine would refuse or compute wrongly."""
    config = facts.config
    if any("ffn_mult" not in block["ffn"] for block in config["block_configs"]):
        return f"takes MLPs whose width is a multiple of 256, not {config['intermediate_size']}"
    if config.get("mlp_bias"):
        return "leaves out the MLP's biases"
    if config.get("attention_bias") and bias:
        return bias
    if config.get("sliding_window"):
        return f"knows no sliding window here: right up to {config['sliding_window']} tokens only"
    return None
