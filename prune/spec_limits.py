"""What config.json alone tells of a drop spec: whether it asks for more blocks than there are.  Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dropformer.prune.errors import PlanError
from dropformer.prune.files.config_json import block_count
from dropformer.prune.spec import parse_spec


def check_drop(drop: str | None, config: Mapping[str, Any], name: str) -> None:
    """Raises PlanError where a spec asks for more layers than the config has."""
    blocks = block_count(config)
    for selector in parse_spec(drop) if drop else ():
        limit = blocks and blocks * len(selector.kinds)
        if limit and not selector.percent and selector.count > limit:
            raise PlanError(
                f"`{selector}` drops {selector.count} layers, but {name} has {limit} of that kind; ask for fewer"
            )


def check_keep(keep: Sequence[int], drop: str | None, config: Mapping[str, Any]) -> None:
    """Raises PlanError where --keep names blocks that the config does not have.

    A spec that names stacks is left alone: each stack has a number of blocks of its own.
    """
    blocks = block_count(config)
    if not blocks or any(selector.stack for selector in (parse_spec(drop) if drop else ())):
        return
    for index in keep:
        if not -blocks <= index < blocks:
            raise PlanError(f"--keep names block {index}, but the blocks are 0 to {blocks - 1}")
