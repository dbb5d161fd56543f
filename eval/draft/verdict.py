"""The result of a draft search as lines and JSON, and the cost needed if it does not pay."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dropformer.eval.draft.choose import DraftFound
from dropformer.eval.draft.engines import engine_lines
from dropformer.eval.draft.options import DraftOptions
from dropformer.metrics.draft.formula import PAYS, needed_cost


def lines_of(found: DraftFound, options: DraftOptions | None, model: str, written: Path | None) -> list[str]:
    """Lines for the terminal."""
    lines = verdict(found, options or DraftOptions())
    if not written:
        return [*lines, "nothing was written" + ("" if found.pays else "; --write-anyway writes it")]
    return [*lines, f"wrote {written}", *engine_lines(model, written, found.plan, found.best.tokens)]


def verdict(found: DraftFound, options: DraftOptions) -> list[str]:
    """The result in a few lines, and the cost needed if it does not pay."""
    one = found.best
    where = f"{options.context:,} tokens, batch {options.batch}, {options.hardware}"
    lines = [
        f"best draft of {found.tried} at {where}: {found.plan.spec}",
        f"acceptance {one.acceptance:.3f} (greedy agreement {one.agreement:.3f}), "
        f"a draft step costs {one.cost:.3f} of a dense step"
        + (f" (by the estimate {found.estimated.cost:.3f})" if found.steps else " (estimated)"),
        f"{one.tokens} drafted at a time: expected {one.speedup:.3f} times the dense model's tokens per second",
    ]
    if found.repaired:
        before, after = found.repaired
        lines.append(
            f"repaired: acceptance {before.acceptance:.3f} to {after.acceptance:.3f}, by the estimate "
            f"{before.speedup:.3f} to {after.speedup:.3f} times" + ("" if found.repair else "; left unrepaired")
        )
    if not found.pays:
        need = needed_cost(one.acceptance)
        lines.append(
            f"does not pay: below {PAYS}. "
            + (f"At this acceptance a draft step must cost less than {need:.2f} of a dense step"
               if need > 0 else "At this acceptance no cost would do")
            + "; a longer --context or a larger --batch makes windows cheaper, and a deeper model has more to spare"
        )  # fmt: skip
    return lines


def to_json(found: DraftFound, written: Path | None) -> str:
    return json.dumps(as_numbers(found, str(written) if written else None), indent=1)


def as_numbers(found: DraftFound, written: str | None) -> dict[str, Any]:
    """The result for JSON; `written`: the checkpoint's folder, if any."""
    one = found.best
    return {
        "spec": found.plan.spec,
        "acceptance": one.acceptance,
        "agreement": one.agreement,
        "cost": one.cost,
        "estimated_cost": found.estimated.cost,
        "tokens": one.tokens,
        "speedup": one.speedup,
        "pays": found.pays,
        "tried": found.tried,
        "steps": asdict(found.steps) if found.steps else None,
        "expected": found.curve,
        "repaired": [one.acceptance for one in found.repaired] if found.repaired else None,
        "written": written,
    }


def add_to_card(found: DraftFound, folder: Path) -> list[str]:
    """Draw the speed-up over drafted tokens into the folder; returns lines for the model card."""
    from dropformer.eval.draft.picture import PNG, draw_speedup

    one, ref = found.best, found.plan.draft
    assert ref is not None
    draw_speedup(found.curve, one.cost, folder / PNG)
    return [
        f"A draft of the model it came from, for speculative decoding: expected {one.speedup:.2f} times the dense "
        f"model's tokens per second with {one.tokens} drafted at a time behind {ref.context:,} tokens, batch "
        f"{ref.batch} (acceptance {one.acceptance:.3f} on calibration text, a draft step at {one.cost:.3f} of a dense "
        "step).",
        "",
        f"![Speed-up over drafted tokens]({PNG})",
    ]
