"""vLLM, as it is and with dropformer installed beside it (`vllm_plugin.py`, `vllm_model.py`)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from dropformer.prune.engines.facts import CheckpointFacts
from dropformer.prune.engines.registry import TRANSFORMERS, Answer
from dropformer.prune.surgery.patterns import counted_wrongly

TRIED = Path(__file__).with_name("vllm_families.json")  # written by benchmarks/engines.py
NO_SINKS = {
    "first tokens": "its attention has no window that keeps the first tokens",
    "constants": "its sinks are constants from the first token on, and folded windows have them once those are gone",
}
WINDOWS_TRIED = ("llama", "granite", "qwen3")
INSTALL = "pip install --no-deps dropformer beside vLLM"


@cache
def tried() -> dict[str, Any]:
    """What benchmarks/engines.py found: `version` of vLLM; families that are `right`, `refused`, `wrong`, and why."""
    return json.loads(TRIED.read_text(encoding="utf-8"))


def stock(facts: CheckpointFacts) -> Answer:
    """vLLM without dropformer."""
    if facts.format == "dropformer":
        instead = f"{INSTALL}{_or_deci(facts)}" if with_plugin(facts).loads else TRANSFORMERS
        return Answer(False, why="the architecture is dropformer's own", instead=instead)
    if facts.format == "deci":
        return Answer(True, f"vllm serve {facts.path} --trust-remote-code", "", "", facts.saves)
    return _plain(facts)


def with_plugin(facts: CheckpointFacts) -> Answer:
    """vLLM with dropformer installed, whose plugin knows both formats."""
    if facts.format == "deci":
        return Answer(True, f"vllm serve {facts.path}", "", "", facts.saves)
    if facts.format != "dropformer":
        return _plain(facts)
    known, version = tried(), f"vLLM {tried()['version']}"
    if facts.sinks:
        return Answer(False, why=NO_SINKS[facts.sinks], instead=f"{TRANSFORMERS}, or give windows without sinks")
    if facts.agents:
        return Answer(False, why="agents are not carried over", instead=TRANSFORMERS)
    if facts.maps:
        return Answer(False, why="linear maps are not carried over", instead=TRANSFORMERS)
    if moved := moved_windows(dict(facts.config), facts.family):
        return Answer(False, why=moved, instead="drop an even number of blocks between any two that stay")
    if why := {**known["refused"], **known["wrong"]}.get(facts.family):
        return Answer(False, why=f"with {version}: {why}", instead=f"export with --format dense{_or_deci(facts)}")
    note = f"tried with {version}"
    if facts.family not in known["right"]:
        note = f"not tried with {version}: it loads where vLLM has the family; compare its first answers"
    if facts.windows and facts.family not in WINDOWS_TRIED:
        note += f"; windows were tried with {', '.join(WINDOWS_TRIED)}: compare its first answers"
    return Answer(True, f"vllm serve {facts.path}", note, "", facts.saves)


def _plain(facts: CheckpointFacts) -> Answer:
    if moved := moved_windows(dict(facts.config), facts.family):
        return Answer(False, why=moved, instead="drop an even number of blocks between any two that stay")
    if facts.stock:
        return Answer(True, f"vllm serve {facts.path}", "where it has the base model", "", facts.saves)
    return Answer(False, why=f"does not load {facts.format} files", instead="export with --format dropformer or deci")


def moved_windows(config: dict[str, Any], family: str) -> str:
    """Why vLLM would give windows to the wrong blocks of a pruned model; "" where it would not."""
    if family != "gpt_oss" or not counted_wrongly(config, 2):
        return ""
    return "it gives windows to every second block by its number, and the dropped blocks moved them"


def _or_deci(facts: CheckpointFacts) -> str:
    return ", or export with --format deci" if facts.fits_deci else ""
