"""The README.md of an exported checkpoint: what it is, what is missing, how to load it."""

from __future__ import annotations

from typing import Any

import yaml

from dropformer.prune.plan import Plan

_KINDS = {
    "attention": "attention layers",
    "mlp": "MLP layers",
    "blocks": "blocks",
    "cross_attention": "cross-attentions",
}


def model_card(plan: Plan, record: dict[str, Any], results: list[str] | None = None) -> str:
    """Markdown with the metadata that the Hub reads: base model, licence, dropped layers, costs and savings."""
    front = {"base_model": plan.model.name, "tags": ["dropformer", "pruned"], "library_name": "transformers"}
    if plan.model.license:
        front["license"] = plan.model.license
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", ""]
    lines += [f"# {plan.model.name}, pruned ({plan.spec})", "", _dropped(record["dropped"]), ""]
    lines += ["| | before | after |", "|---|---:|---:|"]
    for key in ("parameters", "bytes", "kv_bytes_per_token"):
        lines.append(f"| {key.replace('_', ' ')} | {record['before'][key]:,} | {record['after'][key]:,} |")
    if plan.repairs:
        lines += ["", "Repaired: " + "; ".join(plan.repairs) + "."]
    if results:
        lines += ["", *results]
    lines += ["", *_loading(record["packed"])]
    if record["command"]:
        lines += ["", f"Made with dropformer {record['dropformer']}: `{record['command']}`"]
    return "\n".join(lines) + "\n"


def _dropped(dropped: dict[str, Any]) -> str:
    stacks = dropped if all(isinstance(v, dict) for v in dropped.values()) else {"": dropped}
    parts = [
        f"{_KINDS[kind]} {', '.join(map(str, indices))}" + (f" of the {stack}" if stack else "")
        for stack, kinds in stacks.items()
        for kind, indices in kinds.items()
        if indices
    ]
    return "Dropped, in the base model's numbering: " + "; ".join(parts) + "."


def _loading(packed: bool) -> list[str]:
    if packed:
        return [
            "The layers that remain pair up, so this is a stock, shorter model: it loads wherever the base model does."
        ]
    return [
        "Load it with `import dropformer` before `AutoModelForCausalLM.from_pretrained(...)`, or with",
        "`trust_remote_code=True`, which runs the small `modeling_dropformer.py` in this folder.",
    ]
