"""Which modules a pattern in settings names, by every reading that an engine may give it.

transformers matches names by regular expression up to a dot, vLLM by name, by `re:` and expression, or by substring,
modelopt and Quark by glob.  A pattern has followed the blocks only if each reading finds the same modules under their
new numbers, however the number is written: `layers[.]3`, `(layers)\\.3`, `layers.1.*` (an expression: 1, 10 and 11).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

_REGEX = re.compile(r"^(re|[-+]):|[\\^$(|]|[.\])][*+]|\[\.\]")
_META = re.compile(r"[^\w.\-/]")
_OPEN = re.compile(r"[A-Za-z]\.\d+$")  # as a substring, `layers.1` names block 10 too
_NUMBER = re.compile(r"\d|\\[dDwWbBsS]|[\[?{]")  # what may tell one number from another
_CLOSED = re.compile(r"[^\d\[{?|]*\.(\d+)(?:\\\.(?![*+?{])|\.(?=[A-Za-z]))[^\d\[{?]*")  # one number between dots
# What modules are called within a branch: patterns spell some of these in parts, as `(q|k|v)_proj`.
PARTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "up_proj", "gate_up_proj", "down_proj", "experts.0")

Reading = Callable[[str], bool]


def is_pattern(text: str) -> bool:
    """May a text name other blocks than the one whose number it spells?"""
    return bool(_OPEN.search(text) or (_META.search(text) and re.search("[A-Za-z*]", text) and _NUMBER.search(text)))


def the_number(text: str) -> int | None:
    """The only block's number that a pattern can be about; None where it may be about several."""
    found = _CLOSED.fullmatch(text)
    return int(found[1]) if found else None


def words_of(text: str) -> list[str]:
    """What a pattern writes out, as parts of the names that it may be meant for."""
    plain = re.sub(r"\\(.)", lambda escaped: " " if escaped[1].isalnum() else escaped[1], text)
    return sorted(set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", plain)))[:20]


def same_modules(old: str, new: str | None, names: Mapping[str, str]) -> bool:
    """Does every reading find the modules (dense name -> pruned name) that it found before?  `new` is None where the
    pattern is left out, which must then have found none."""
    read = _plain if not _META.search(old) else _expression if _REGEX.search(old) else _glob
    if new is None:
        return not any(before(name) for name in names for before in read(old))
    readings = list(zip(read(old), read(new), strict=False))
    return all(before(name) == after(followed) for name, followed in names.items() for before, after in readings)


def _plain(text: str) -> list[Reading]:
    return [lambda name: text in name]


def _glob(text: str) -> list[Reading]:
    return [lambda name: fnmatchcase(name, text)]


def _expression(text: str) -> list[Reading]:
    """An expression's; a text with `.*` and no other sign of one may be a glob as well."""
    body = re.sub(r"^(re|[-+]):", "", text)
    try:
        found, bounded = re.compile(body), re.compile(rf"(?:{body})(?:(?<=\.)|(?=\.|$))")
    except re.error:
        return _glob(text)
    tries = (found.search, found.match, found.fullmatch, bounded.match)
    return [*(lambda name, how=how: how(name) is not None for how in tries), *_glob(text)]
