"""The grammar of a drop spec, and what config.json alone tells of one.  Light: no torch.

attn:8  mlp:4  block:4      the N most redundant of a kind
attn:25%                    a share of the kind, rounded down
joint:12                    one ranking over attention and MLP layers together
attn=20,21,25               these, in the original model's numbering
published:attn:8            the list a recipe gives
window:12@1024+4            not dropped: twelve attention layers see the last 1,024 tokens and the first 4
window=3,7@512              these see the last 512 tokens
window:12@256+fold          these see the last 256 tokens, and constants fitted to what the first 4 gave
linear:6  linear=3,7        attention layers that become one linear map each, fitted on the calibration text
agent:4@49  agent=3,5@49    attention layers of an encoder that attend through 49 averaged queries
attn:8,mlp:2                combined; encoder.attn:3 names a stack
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dropformer.prune.architecture import Layer
from dropformer.prune.errors import PlanError
from dropformer.prune.files.config_json import block_count
from dropformer.prune.rungs.agent import Agents
from dropformer.prune.window import Window

EXPECTED = (
    "expected for example attn:8, mlp:25%, block:4, joint:12, attn=20,21,25, linear:4 or window:8@1024+4, by commas"
)
_ITEM = re.compile(
    r"(?P<published>published:)?(?:(?P<stack>\w+)\.)?(?P<kind>attn|mlp|cross|block|joint|linear|window|agent)"
    r"(?::(?P<count>\d+)(?P<percent>%)?|=(?P<indices>-?\d+(?:,-?\d+)*))(?:@(?P<rung>\d+(?:\+(?:\d+|fold))?))?"
)
RUNGS: dict[str, tuple[type[Window] | type[Agents], str]] = {
    "window": (Window, "a window names the tokens that it keeps, as in window:8@1024+4"),
    "agent": (Agents, "only agent layers name a number of agents, as in agent:4@49"),
}  # kinds of attention layers that stay: what stands behind @, and what is said where it does not


@dataclass(frozen=True)
class Selector:
    """One item of a drop spec.  Prints as it was written."""

    kind: str
    stack: str = ""
    count: int = 0
    percent: bool = False
    indices: tuple[int, ...] | None = None
    published: bool = False
    rung: Window | Agents | None = None

    def __str__(self) -> str:
        name = ("published:" if self.published else "") + (f"{self.stack}." if self.stack else "") + self.kind
        rung = f"@{self.rung}" if self.rung else ""
        if self.indices is not None:
            return f"{name}={','.join(map(str, self.indices))}{rung}"
        return f"{name}:{self.count}{'%' if self.percent else ''}{rung}"

    @property
    def kinds(self) -> tuple[str, ...]:
        return {"joint": ("attn", "mlp"), **dict.fromkeys(("linear", *RUNGS), ("attn",))}.get(self.kind, (self.kind,))


def parse_spec(text: str) -> tuple[Selector, ...]:
    """The selectors of a drop spec.  Raises PlanError saying what was expected."""
    spec = re.sub(r"\s+", "", text)
    selectors: list[Selector] = []
    position = 0
    while position < len(spec) or not selectors:
        match = _ITEM.match(spec, position)
        if not match or (match.end() < len(spec) and spec[match.end()] != ","):
            raise PlanError(f"drop spec `{text}` cannot be read at `{spec[position:] or text}`; {EXPECTED}")
        selectors.append(_selector(text, match))
        position = match.end() + 1
    return tuple(selectors)


def _selector(text: str, match: re.Match[str]) -> Selector:
    indices = match["indices"]
    selector = Selector(
        match["kind"],
        match["stack"] or "",
        int(match["count"] or 0),
        bool(match["percent"]),
        tuple(int(i) for i in indices.split(",")) if indices else None,
        bool(match["published"]),
        _rung(text, match["kind"], match["rung"]),
    )
    if selector.indices is None and not selector.count:
        raise PlanError(f"drop spec `{text}`: `{selector}` drops nothing; {EXPECTED}")
    if selector.percent and selector.count > 100:
        raise PlanError(f"drop spec `{text}`: `{selector}` is more than all; {EXPECTED}")
    if selector.kind == "joint" and selector.indices is not None:
        raise PlanError(f"drop spec `{text}`: joint takes a count; name layers as attn=20,21 or mlp=3")
    unlisted = selector.kind in ("joint", "linear", *RUNGS)
    if selector.published and (selector.indices is not None or selector.percent or unlisted):
        raise PlanError(f"drop spec `{text}`: a published list takes a count, as in published:attn:8")
    return selector


def _rung(text: str, kind: str, amount: str | None) -> Window | Agents | None:
    """What stands behind @.  Raises PlanError where something must, or must not."""
    if kind in RUNGS and amount:
        return RUNGS[kind][0].parse(amount)
    if kind in RUNGS:
        raise PlanError(f"drop spec `{text}`: {RUNGS[kind][1]}")
    if amount:
        raise PlanError(f"drop spec `{text}`: only windows and agents have an @, as in window:8@1024+4 or agent:4@49")
    return None


def named_layers(layers: Iterable[Layer], rungs: Mapping[Layer, Window | Agents], maps: Iterable[Layer] = ()) -> str:
    """The drop spec that names these layers, of which `maps` are linear maps: `attn=20,linear=21,window=3,7@256+4`."""
    items: dict[tuple[str, str, str], list[int]] = {}
    mapped = set(maps)
    for layer in layers:
        items.setdefault((layer.stack, "linear" if layer in mapped else layer.kind, ""), []).append(layer.index)
    for layer, rung in rungs.items():
        kind = next(kind for kind, (form, _) in RUNGS.items() if isinstance(rung, form))
        items.setdefault((layer.stack, kind, f"@{rung}"), []).append(layer.index)
    return ",".join(
        f"{stack + '.' if stack else ''}{kind}={','.join(map(str, sorted(indices)))}{amount}"
        for (stack, kind, amount), indices in items.items()
    )


def folds(selector: Selector) -> bool:
    """Does a selector give windows whose sinks are folded into constants?"""
    return isinstance(selector.rung, Window) and selector.rung.fold


def without_windows(spec: str) -> str:
    """The items of a spec that drop something; empty where all of its layers stay on a rung.  Raises PlanError."""
    return ",".join(str(selector) for selector in parse_spec(spec) if not selector.rung)


def parse_keep(text: str) -> tuple[int, ...]:
    """Block indices that `--keep` protects; negative ones count from the end."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise PlanError(f"--keep `{text}` cannot be read; expected block indices such as 0,1,-1") from None


def check_drop(drop: str | None, config: Mapping[str, Any], name: str) -> None:
    """Raises PlanError where a spec asks for more layers than the config has."""
    blocks = block_count(config)
    for selector in parse_spec(drop) if drop else ():
        limit = blocks and blocks * len(selector.kinds)
        if limit and not selector.percent and selector.count > limit:
            does = "takes" if selector.rung else "drops"
            raise PlanError(
                f"`{selector}` {does} {selector.count} layers, but {name} has {limit} of that kind; ask for fewer"
            )


def check_stacks(drop: str | None, tensors: Iterable[str], name: str) -> None:
    """Raises PlanError where a spec names a stack that no tensor of the files can belong to.

    A stack's name is a part of its blocks' path, or parts joined by `_`.
    """
    named = {selector.stack for selector in (parse_spec(drop) if drop else ()) if selector.stack}
    if not named:
        return
    numbered = {tensor[: m.start()] for tensor in tensors for m in re.finditer(r"\.\d+(?=\.|$)", tensor)}
    outer = {path for path in numbered if not re.search(r"\.\d+(?=\.|$)", path)}
    nested = any(re.search(r"\.\d+$", path) for path in numbered)  # Funnel's encoder.blocks.0.1
    paths = {re.sub(r"\W+", "_", path) for path in numbered} if nested or len(outer) != 1 else set()
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
