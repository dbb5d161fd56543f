"""What config.json alone tells of a drop spec: whether it asks for more blocks than there are.  Light: no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dropformer.prune.errors import PlanError
from dropformer.prune.files.config_json import block_count
from dropformer.prune.plan import parse_spec


def check_drop(drop: str | None, config: Mapping[str, Any], name: str) -> None:
    """Raises PlanError where a spec asks for more layers than the config has."""
    blocks = block_count(config)
    for selector in parse_spec(drop) if drop else ():
        limit = blocks and blocks * len(selector.kinds)
        if limit and not selector.percent and selector.count > limit:
            raise PlanError(
                f"`{selector}` drops {selector.count} layers, but {name} has {limit} of that kind; ask for fewer"
            )


def check_stacks(drop: str | None, tensors: Iterable[str], name: str) -> None:
    """Raises PlanError where a spec names a stack that no tensor of the files can belong to.

    A stack's name is a part of its blocks' path, or parts joined by `_`.
    """
    named = {selector.stack for selector in (parse_spec(drop) if drop else ()) if selector.stack}
    if not named:
        return
    paths = {re.sub(r"\W+", "_", re.sub(r"\.\d+(?=\.|$).*", "", tensor)) for tensor in tensors}
    for stack in sorted(named):
        if not any(stack in path for path in paths):
            raise PlanError(
                f"{name} has no stack named `{stack}`; leave the name out where the model has one stack, as in attn:3, "
                "else write a part of its blocks' path before the kind, as in encoder.attn:3"
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
