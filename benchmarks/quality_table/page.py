"""The page that `quality.py --page` writes: means by method and drop, then a table per drop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quality_table.rows import DROPS, METHODS, Row

COLUMNS = ("method", "wikitext", "builtin", "code", "mean", "KL", "CPU s", "passes", "GiB", "layers")


def page(rows: Iterable[Row]) -> str:
    """Markdown: the means of all rows, then everything about each of them."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.drop, []).append(row)
    order = sorted(found, key=lambda drop: (drop not in DROPS, DROPS.index(drop) if drop in DROPS else 0, drop))
    parts = [f"### {drop}\n\n{table(found[drop])}" for drop in order]
    return "\n\n".join([matrix([row for drop in order for row in found[drop]], order), *parts])


def matrix(rows: Sequence[Row], drops: Sequence[str]) -> str:
    """Means by method and number of drops, the least of each column in bold."""
    means = {(row.method, row.drop): row.mean for row in rows}
    least = {drop: min(mean for (_, d), mean in means.items() if d == drop) for drop in drops}
    methods = [method for method in METHODS if any(row.method == method for row in rows)]
    lines = [f"| method | {' | '.join(drops)} |", "|---|" + "---:|" * len(drops)]
    for method in methods:
        cells = [_mean(means.get((method, drop)), least[drop]) for drop in drops]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(value: float | None, least: float) -> str:
    if value is None:
        return ""
    return f"**{value:.3f}**" if value == least else f"{value:.3f}"


def table(rows: Iterable[Row]) -> str:
    """The rows of one number of drops, from worst to best."""
    head = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 2) + "---|"]
    return "\n".join([*head, *(line(row) for row in sorted(rows, key=lambda row: -row.mean))])


def line(row: Row) -> str:
    ratios = [f"{row.ratios[name]:.3f}" if name in row.ratios else "" for name in COLUMNS[1:4]]
    layers = " ".join(layer if row.drop.startswith("joint") else layer.split(":")[1] for layer in row.layers)
    cells = [row.method, *ratios, f"{row.mean:.3f} ± {row.stderr:.3f}", f"{row.kl:.3f}", f"{row.seconds:.0f}"]
    cells += [f"{value:.1f}" if value else "" for value in (row.passes, row.peak_gib)] + [layers]
    return "| " + " | ".join(cells) + " |"
