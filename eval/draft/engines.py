"""The commands that run a draft beside its dense model in vLLM and llama.cpp, or why an engine cannot."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dropformer.prune.engines.facts import read_facts
from dropformer.prune.engines.llamacpp import ANY_LAYER
from dropformer.prune.engines.registry import engines
from dropformer.prune.plan import Plan


def engine_lines(model: str, folder: Path, plan: Plan, tokens: int) -> list[str]:
    """A line for each engine.  model: as for `--model`; folder: the draft's checkpoint; tokens: drafted at a time."""
    answers = engines(folder)["engines"]
    return [_vllm(answers, model, folder, plan, tokens), _llamacpp(answers["llama.cpp"], model, folder, tokens)]


def _vllm(answers: Mapping[str, Any], model: str, folder: Path, plan: Plan, tokens: int) -> str:
    if not answers["vllm-plugin"]["loads"]:
        return f"vLLM: not with this draft: {answers['vllm-plugin']['why']}"
    beside = "" if answers["vllm"]["loads"] else " with dropformer installed"
    config = json.dumps({"method": "draft_model", "model": str(folder), "num_speculative_tokens": tokens})
    return f"vLLM{beside}: vllm serve {_served(model, plan)} --speculative-config {shlex.quote(config)}"


def _llamacpp(answer: Mapping[str, Any], model: str, folder: Path, tokens: int) -> str:
    facts = read_facts(folder)
    dense = shlex.quote(model) if Path(model).expanduser().is_file() else "MODEL.gguf"
    made = answer["command"]
    if facts.family in ANY_LAYER and facts.lacks_alone and not facts.stock:
        made = f"prune --model {dense} --plan {shlex.quote(str(folder / 'plan.json'))} --format gguf"
    if not made:
        return f"llama.cpp: not with this draft: {answer['why']}"
    drafting = f"--spec-type draft-simple --spec-draft-n-max {tokens}"
    return f"llama.cpp: llama-server -m {dense} -md DRAFT.gguf {drafting} (DRAFT.gguf: by {made})"


def _served(model: str, plan: Plan) -> str:
    """The dense model as `vllm serve` takes it: its folder, or its Hub id at the revision that was pruned."""
    ref, path = plan.model, Path(model).expanduser()
    if path.is_dir():
        return shlex.quote(str(path))
    if not ref.hub:
        return "MODEL"
    return shlex.quote(ref.hub) + (f" --revision {shlex.quote(ref.revision)}" if ref.revision else "")
