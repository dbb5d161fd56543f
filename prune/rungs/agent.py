"""Queries averaged to a few, which stand between queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

from dropformer.prune.errors import PlanError


@dataclass(frozen=True, order=True)
class Agents:
    """How many agents an attention layer of an encoder attends through (arXiv 2312.08874).  Prints as that number."""

    count: int

    def __str__(self) -> str:
        return str(self.count)

    @classmethod
    def parse(cls, text: str) -> Agents:
        """`49`.  Raises PlanError for what is no number of agents."""
        if not text.isdecimal() or not int(text):
            raise PlanError(f"agents `{text}` cannot be read; expected how many, for example 49")
        return cls(int(text))


@dataclass(frozen=True)
class ThroughAgents:
    """The layer with agents between its queries and its keys; its weights stay."""

    agents: Agents

    def __str__(self) -> str:
        return f"agent:{self.agents}"

    def held(self, context: int) -> int:
        """An encoder has no cache; a layer that had one would hold every token."""
        return context

    def parameters(self, owned: int) -> int:
        return owned


def parse(text: str) -> ThroughAgents:
    """`49`.  Raises PlanError for what is no number of agents."""
    if not text:
        raise PlanError("rung `agent` names no number; expected for example agent:49")
    return ThroughAgents(Agents.parse(text))
