"""One HTML page that needs nothing else: inline style, pictures inside, fit for screen and paper.

    page("Title", [Section("Results", (paragraph("..."), table(head, rows), picture(png, "what it shows")))])

Every text that is given is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template
from markupsafe import Markup

from dropformer.prune.version import __version__

DPI, CSS_DPI = 150, 96
ENVIRONMENT = Environment(autoescape=True, trim_blocks=True)
TABLE = """<div class="wide"><table>
<thead><tr>{% for name in head %}<th{{ number[loop.index0] }}>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td{{ number[loop.index0] }}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>"""
FIGURE = """<figure>
<img src="data:{{ kind }};base64,{{ data }}" alt="{{ alt }}"{% if width %} width="{{ width }}"{% endif %}>
{% if caption %}<figcaption>{{ caption }}</figcaption>{% endif %}
</figure>"""


@dataclass(frozen=True)
class Section:
    """A heading and its content, made by the functions below."""

    title: str
    parts: Sequence[Markup]


def page(title: str, sections: Iterable[Section], lead: str = "") -> str:
    """The whole page; `lead` is the sentence under its title."""
    return _template().render(title=title, lead=lead, sections=list(sections), version=__version__)


def paragraph(text: str) -> Markup:
    """Running text."""
    return Markup("<p>{}</p>").format(text)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markup:
    """A table; columns whose cells all begin with a digit, a sign or nothing are set right."""
    cells = [["" if cell is None else cell for cell in row] for row in rows]
    number = [Markup(' class="number"') if all(_is_number(row[i]) for row in cells) else "" for i in range(len(head))]
    return Markup(_part(TABLE).render(head=head, rows=cells, number=number))


def picture(image: Path | bytes, alt: str, caption: str = "") -> Markup:
    """A PNG (drawn at 150 dots an inch) or SVG picture, put into the page, no wider than it.

    `alt` says what it shows to those who cannot see it.
    """
    data = image if isinstance(image, bytes) else image.read_bytes()
    png = data.startswith(b"\x89PNG")
    fields = {
        "kind": "image/png" if png else "image/svg+xml",
        "data": base64.b64encode(data).decode("ascii"),
        "width": int.from_bytes(data[16:20], "big") * CSS_DPI // DPI if png else None,  # the header's first field
    }
    return Markup(_part(FIGURE).render(alt=alt, caption=caption, **fields))


def _is_number(cell: Any) -> bool:
    text = str(cell)
    return not isinstance(cell, Markup) and (not text or text[0] in "0123456789+-−–.±")


@cache
def _part(source: str) -> Template:
    return ENVIRONMENT.from_string(source)


@cache
def _template() -> Template:
    return ENVIRONMENT.from_string(files("dropformer.eval").joinpath("page.html").read_text(encoding="utf-8"))
