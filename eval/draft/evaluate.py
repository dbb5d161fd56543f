"""`prune evaluate M --draft PLAN`: acceptance by position and domain, decoding with and without the draft, memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from dropformer.eval.draft.cost import MeasuredSteps, measured_steps
from dropformer.eval.draft.measure import DraftRun, run_draft
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.draft.acceptance import Acceptance, DenseText, shortest, spread
from dropformer.metrics.draft.formula import curve, speedup
from dropformer.metrics.draft.search import draft_in_place, surgery_in_place
from dropformer.metrics.repair.base import Repair, check_fitted
from dropformer.prune.draft.generation import DRAFT_TOKENS, set_drafting
from dropformer.prune.errors import CalibrationError
from dropformer.prune.files.folder import new_files
from dropformer.prune.plan import Plan

PLACES = 8


@dataclass(frozen=True)
class DraftEvaluation:
    """A draft on held-out text: predicted and measured.

    predicted: by the formula, from acceptance on the text and timed steps; explained: the same from the tokens per
    round of the run; bound: if every token is accepted and verifying costs one step.
    """

    tokens: int
    acceptance: Acceptance
    steps: MeasuredSteps
    run: DraftRun

    @property
    def predicted(self) -> float:
        """From counted tokens per round: acceptance is correlated, so a round yields more than 1 + a + a^2 + ..."""
        return self._speedup(self.acceptance.rounds(self.tokens).tokens)

    @property
    def explained(self) -> float:
        return self._speedup(self.run.round_tokens)

    def _speedup(self, round_tokens: float) -> float:
        return round_tokens / (self.tokens * self.steps.cost + self.steps.verify_cost)

    @property
    def bound(self) -> float:
        return speedup(1.0, self.tokens, self.steps.cost)

    def numbers(self) -> dict[str, object]:
        """The figures for JSON; `equal` counts greedy texts, and is None where texts are sampled."""
        found, run = self.acceptance, self.run
        return {
            "drafted": self.tokens, "temperature": found.temperature,
            "equal": None if found.temperature else sum(run.equal), "prompts": len(run.tokens),
            "acceptance_predicted": found.rounds(self.tokens).acceptance, "acceptance_measured": run.acceptance,
            "greedy_agreement": float(found.agreement.mean()), "by_position": found.by_position,
            "by_domain": found.by_domain, "by_depth": found.by_depth, "cost": self.steps.cost,
            "verify_cost": self.steps.verify_cost, "speedup_predicted": self.predicted,
            "speedup_explained": self.explained, "round_tokens_predicted": found.rounds(self.tokens).tokens,
            "speedup_measured": run.speedup,
            "bound": self.bound, "tokens_per_second": run.tokens_per_second, "round_tokens": run.round_tokens,
            "dense_bytes": run.dense_bytes, "pair_bytes": run.pair_bytes, "kv_bytes": run.kv_bytes,
            "view_bytes": run.view_bytes,
        }  # fmt: skip

    def to_json(self) -> str:
        return json.dumps(self.numbers(), indent=1)

    def write(self, folder: Path) -> None:
        """Write draft.json, and a plot of speed-up over drafted tokens."""
        from dropformer.eval.draft.picture import PNG, draw_speedup

        expected = curve(self.acceptance.mean, self.steps.cost, lambda _: self.steps.verify_cost)
        with new_files(folder) as made:
            (made / "draft.json").write_text(self.to_json() + "\n", encoding="utf-8")
            draw_speedup(expected, self.steps.cost, made / PNG, (self.tokens, self.run.speedup))

    def lines(self) -> list[str]:
        """Lines for the terminal."""
        found, run = self.acceptance, self.run
        predicted = found.rounds(self.tokens).acceptance
        without, with_draft = run.tokens_per_second
        equal = f"{sum(run.equal)} of {len(run.equal)} equal to that of the dense model alone"
        sampled = f"sampled at temperature {found.temperature:g}, so not compared with the dense model's"
        return [
            f"text: {sampled if found.temperature else equal}",
            f"acceptance {predicted:.3f} predicted, {run.acceptance:.3f} in the run; greedy agreement "
            f"{float(found.agreement.mean()):.3f}",
            "by position: " + ", ".join(f"{place:,}: {a:.3f}" for place, a in found.by_position.items()),
            "by domain: " + ", ".join(f"{name}: {a:.3f}" for name, a in found.by_domain.items()),
            f"a draft step costs {self.steps.cost:.3f} of a dense step, verifying {self.tokens + 1} tokens "
            f"{self.steps.verify_cost:.3f}",
            f"tokens/s: {without:.2f} without, {with_draft:.2f} with {self.tokens} drafted at a time",
            f"speed-up {run.speedup:.3f} measured, {self.predicted:.3f} predicted from the text, {self.explained:.3f} "
            f"from the run's acceptance, bound {self.bound:.3f}",
            f"memory: {run.pair_bytes - run.dense_bytes:,} bytes of weights and {run.view_bytes:,} of cache beside the "
            f"dense model's {run.dense_bytes:,} and {run.kv_bytes:,}",
        ]


def evaluate_draft(
    model: PreTrainedModel, plan: Plan, data: Sequence[Windows], new: int = 32, repair: Repair | None = None
) -> DraftEvaluation:
    """Measure the draft of a plan on windows, whose last `new` tokens are decoded anew.

    Time: a forward pass over the windows and the decoding.  Raises CalibrationError for windows too short.
    """
    return evaluate_on(dense_text(model, data, plan.draft.temperature if plan.draft else 1.0), plan, new, 1, repair)


def dense_text(model: PreTrainedModel, data: Sequence[Windows], temperature: float) -> DenseText:
    """The dense model's reference for all drafts of it."""
    length = shortest(data)
    return DenseText(model, data, spread(length, PLACES, min(64, length // 4)), temperature)


def evaluate_on(
    text: DenseText,
    plan: Plan,
    new: int = 32,
    prompts: int = 1,
    repair: Repair | None = None,
    tokens: int | None = None,
) -> DraftEvaluation:
    """Measure the draft of a plan on windows that the dense model has read.

    `prompts`: beginnings of each window to decode after, the longest `new` tokens short of it.  `tokens`: drafted at
    a time (None: as the plan says).  Raises CalibrationError for windows too short.
    """
    model, drafted = text.model, tokens or (plan.draft.tokens if plan.draft else DRAFT_TOKENS)
    length = min(row.shape[1] for row in text.rows)
    if length < text.places[0] + max(new, drafted + 1) + 1:
        raise CalibrationError(
            f"windows of {length} tokens are too short to decode {new} or draft {drafted} behind {text.places[0]}; "
            "give longer ones"
        )
    check_fitted(plan, repair)
    draft, sources = draft_in_place(model, plan.outline, plan.layers, plan.windowed, repair)
    set_drafting(draft, drafted)
    found = text.acceptance(draft, sources)
    steps = measured_steps((model, draft, sources), text.rows[0], text.kept[0][0], drafted)
    surgery = surgery_in_place(plan.outline, plan.layers, plan.windowed)
    begun = [
        (row[:, :length], cache)
        for row, (cache, *_) in zip(text.rows, text.kept, strict=True)
        for length in lengths(row.shape[1] - new, prompts, text.places[0])
    ]
    return DraftEvaluation(drafted, found, steps, run_draft(model, draft, surgery, begun, new, text.temperature))


def lengths(longest: int, count: int, least: int) -> list[int]:
    """`count` lengths of prompts up to the longest, evenly: 3 up to 100 from 10 are 40, 70, 100."""
    return [round(least + (longest - least) * (i + 1) / count) for i in range(count)]
