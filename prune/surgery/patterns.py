"""Fields from which transformers derives `layer_types`: they must say the same as the list once blocks are renumbered.

transformers reads the list; vLLM, SGLang and llama.cpp read the field of some families.

    sliding_window_pattern 3, block 0 dropped of S S F S S F:   S F S S F has no such pattern, and a note says so
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Is block i of full attention, by the value of each field?
FULL: dict[str, Callable[[int, int], bool]] = {
    "sliding_window_pattern": lambda i, n: (i + 1) % n == 0,
    "_sliding_window_pattern": lambda i, n: (i + 1) % n == 0,
    "full_attention_interval": lambda i, n: (i + 1) % n == 0,
    "global_attn_every_n_layers": lambda i, n: i % n == 0,
    "max_window_layers": lambda i, n: i < n,
}


def settled_patterns(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A pruned config whose pattern fields say what its `layer_types` say, and a note for each that cannot."""
    new, notes = dict(config), []
    for key, value in config.items():
        if isinstance(value, dict):
            new[key], found = settled_patterns(value)
            notes += found
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or len(set(kinds)) < 2:
        return new, notes
    full = [kind == "full_attention" for kind in kinds]
    for key in FULL.keys() & config.keys():
        if type(config[key]) is not int or config[key] < 1:
            continue
        right = [
            n for n in (config[key], *range(1, len(full) + 1)) if [FULL[key](i, n) for i in range(len(full))] == full
        ]
        if right:
            new[key] = right[0]
        else:
            notes.append(
                f"no value of `{key}` gives the windows that are left: transformers, which reads `layer_types`, is "
                "right; vLLM, SGLang and llama.cpp, where they read the pattern, are not"
            )
    return new, notes
