"""llama.cpp: the .gguf that `--format gguf` cuts from the dense model's, or one that its own converter makes."""

from __future__ import annotations

from dropformer.prune.engines.facts import CheckpointFacts
from dropformer.prune.engines.registry import TRANSFORMERS, Answer

ANY_LAYER = ("llama", "mistral", "qwen2")  # whose .gguf files lose any layer
PACKED = (  # whose .gguf files are pruned where the plan packs, or hold zeros: transformers reads them
    *("qwen2_moe", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "gpt2", "falcon", "bloom", "stablelm"),
    *("starcoder2", "nemotron", "gpt_oss", "minimax_m2"),
)
CONVERT = "python convert_hf_to_gguf.py {folder}"


def answer(facts: CheckpointFacts) -> Answer:
    if facts.format == "gguf":
        command = f"llama-cli -m {facts.path} -fa on"
        note = "without flash attention a dropped layer still costs half of its cache" if facts.family == "deci" else ""
        return Answer(True, command, note, "", facts.saves)
    if facts.stock:
        command = CONVERT.format(folder=facts.path)
        return Answer(True, command, "then as any model, where its converter has the family", "", facts.saves)
    if not facts.lacks_alone:
        why = "it has no attention window, agents or linear map by layer"
        return Answer(False, why=why, instead=TRANSFORMERS)
    cut = "prune --model DENSE.gguf --plan plan.json --format gguf"
    dense = "export with --format dense and convert that, which saves nothing"
    if facts.family in ANY_LAYER:
        dense = f"{cut}; or {dense}"
    elif facts.family in PACKED:
        dense = f"{cut} --dense, which saves nothing; or {dense}"
    return Answer(False, why="its converter does not know models with missing layers", instead=dense)
