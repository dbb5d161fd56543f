"""The README.md of an exported checkpoint: what it is, what is missing, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dropformer.prune.plan import Plan

_KINDS = {
    "attention": "attention layers",
    "mlp": "MLP layers",
    "blocks": "blocks",
    "cross_attention": "cross-attentions",
}


def model_card(plan: Plan, record: dict[str, Any], loading: str, results: list[str] | None = None) -> str:
    """Markdown with the metadata that the Hub reads: base model, licence, dropped layers, costs and savings.

    `loading` says how the checkpoint is loaded.
    """
    front: dict[str, Any] = {"tags": ["dropformer", "pruned"], "library_name": "transformers"}
    front |= {"base_model": plan.model.hub} if plan.model.hub else {}
    front |= {"license": plan.model.license} if plan.model.license else {}
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", ""]
    name = plan.model.hub or Path(plan.model.name).name
    lines += [f"# {name}, pruned ({plan.spec})", "", _dropped(record["dropped"]), ""]
    if plan.model.file:
        lines += [f"The weights come from the quantized `{plan.model.file}`, not the base model's files.", ""]
    if record["maps"]:
        lines += [f"Linear maps are in place of {', '.join(record['maps'])}.", ""]
    if plan.windows:
        fold = ", fold: fitted constants in place of first tokens" if plan.folded else ""
        lines += [f"Attention windows (last tokens + first tokens{fold}): {_by_rung(plan.windows)}.", ""]
    if plan.agents:
        agents = {layer: str(count) for layer, count in plan.agents.items()}
        lines += ["Agents (averaged queries between queries and keys): " + _by_rung(agents) + ".", ""]
    lines += ["| | before | after |", "|---|---:|---:|"]
    for key in record["before"]:
        lines.append(f"| {key.replace('_', ' ')} | {record['before'][key]:,} | {record['after'][key]:,} |")
    if plan.repairs:
        lines += ["", "Repaired: " + "; ".join(plan.repairs) + "."]
    if plan.not_repaired:
        lines += ["", "Not repaired: " + "; ".join(plan.not_repaired) + "."]
    if results:
        lines += ["", *results]
    lines += ["", loading, *(f"Note: {note}." for note in record["notes"])]
    if record["command"]:
        lines += ["", f"Made with dropformer {record['dropformer']}: `{record['command']}`"]
    return "\n".join(lines) + "\n"


def _by_rung(rungs: dict[str, str]) -> str:
    """`512+4 in attn:3, attn:7; 1024 in attn:9`."""
    found: dict[str, list[str]] = {}
    for layer, rung in rungs.items():
        found.setdefault(rung, []).append(layer)
    return "; ".join(f"{rung} in {', '.join(layers)}" for rung, layers in found.items())


def _dropped(dropped: dict[str, Any]) -> str:
    stacks = dropped if all(isinstance(v, dict) for v in dropped.values()) else {"": dropped}
    parts = [
        f"{_KINDS[kind]} {', '.join(map(str, indices))}" + (f" of the {stack}" if stack else "")
        for stack, kinds in stacks.items()
        for kind, indices in kinds.items()
        if indices
    ]
    return "Dropped, in the base model's numbering: " + ("; ".join(parts) or "no layer") + "."
