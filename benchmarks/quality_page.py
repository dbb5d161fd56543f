"""The page about quality, from the rows that `benchmarks/quality.py --rows FILE` wrote.

python benchmarks/quality_page.py ROWS... > TABLE.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from quality import DROPS, Row, rows_in

COLUMNS = ("method", "wikitext", "builtin", "code", "mean", "KL", "CPU s", "layers")


def page(rows: Iterable[Row]) -> str:
    """A Markdown table for each drop, methods from worst to best."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.drop, []).append(row)
    order = sorted(found, key=lambda drop: (drop not in DROPS, DROPS.index(drop) if drop in DROPS else 0, drop))
    return "\n\n".join(f"### {drop}\n\n{table(found[drop])}" for drop in order)


def table(rows: Iterable[Row]) -> str:
    head = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 2) + "---|"]
    return "\n".join([*head, *(line(row) for row in sorted(rows, key=lambda row: -row.mean))])


def line(row: Row) -> str:
    ratios = [f"{row.ratios[name]:.3f}" for name in COLUMNS[1:4]]
    layers = " ".join(layer if row.drop.startswith("joint") else layer.split(":")[1] for layer in row.layers)
    cells = [row.method, *ratios, f"{row.mean:.3f} ± {row.stderr:.3f}", f"{row.kl:.3f}", f"{row.seconds:.0f}", layers]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print(page(row for file in sys.argv[1:] for row in rows_in(Path(file))))
