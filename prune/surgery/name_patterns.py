"""Which blocks the number in a module's name or pattern stands for, and the same blocks under new numbers.

Settings name modules as plain names, globs or regular expressions.  With 12 blocks, and block 1 dropped:

    "layers.3.mlp"              3                -> layers.2.mlp
    "re:.*layers\\.[3-5]\\."    3, 4, 5          -> re:.*layers\\.(?:2|3|4)\\.
    "re:.*layers\\.\\d\\."      0 to 9           -> re:.*layers\\.(?:0|1|2|3|4|5|6|7|8)\\.
    "layers.1*"                 1, 10, 11        -> no glob names 9 and 10 alone: ValueError
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NoReturn

_REGEX = re.compile(r"^(re|[-+]):|[\\^$(|]|\.\+|\]\+")
# Numbers that no list's name and dot precede: `layer_3`, `blk.3`, `.*\.3\.mlp`.
_LOOSE = re.compile(r"(?<![a-z])(?:layers?|blocks?|h(?=[_\-/\[]))[_\-/\[ :]*\d|\bblk\W*\d", re.I)
_LOUD = re.compile(r"(?:Layers?|LAYERS?|Blocks?|BLOCKS?)\\?\.\d")
_NUMBER, _WILD = r"(?:\d+|\([\d|?:]+\)|\[[\d\-]+\])", r"[*+?)\]]\\?\."
_UNNAMED = re.compile(rf"(?:^\.?|^re:|{_WILD}){_NUMBER}\\?\.(?=[A-Za-z*\\(\[])|(?:^\.|{_WILD}){_NUMBER}\.?$")


@dataclass(frozen=True)
class NumberPart:
    """The part of a name or pattern at [start, end) that stands for a block's number.

    closed: what follows it is a dot or the end, so that `1` does not name block 10.
    """

    text: str
    start: int
    end: int
    regex: bool
    closed: bool

    @property
    def number(self) -> str:
        return self.text[self.start : self.end]

    @property
    def rest(self) -> str:
        """The module within the block that the name continues with, as far as it is written out."""
        named = self.text[self.end :].replace("\\.", ".").lstrip(".")
        return re.split(r"[*?\\(\[|+$^{]", named)[0].rstrip(".")

    def names(self, block: int) -> bool:
        return _accepts(self.number, self.regex, self.closed, block)

    def follow(self, new: dict[int, int | None], blocks: int) -> str | None:
        """The text with the new numbers (None: dropped) of the blocks that it names, of which `blocks` are left.

        None where all of them are dropped.  Raises ValueError where no pattern names just these blocks.
        """
        told = {n for old, n in new.items() if n is not None and self.names(old)}
        if not told:
            return None if any(self.names(old) for old in new) else self.text
        for number in self._candidates(sorted(told)):
            if {n for n in range(blocks) if _accepts(number, self.regex, self.closed, n)} == told:
                return self.text[: self.start] + number + self.text[self.end :]
        raise ValueError(f"`{self.text}` names {len(told)} of them")

    def _candidates(self, told: list[int]) -> list[str]:
        found = [self.number]
        digits = re.match(r"\d+", self.number)
        if digits and len(told) == 1:
            found.append(f"{told[0]}{self.number[digits.end() :]}")
        if self.regex and self.closed:
            found.append(f"(?:{'|'.join(map(str, told))})")
        return found


def number_part(text: str, at: int, escaped: bool) -> NumberPart | None:
    """The number behind a separator that ends at `at`; None where there is none.

    escaped: the separator is `\\.`, so that a bare dot further on is a wildcard.  Raises ValueError for a pattern
    that cannot be read.
    """
    regex = bool(_REGEX.search(text))
    end, closed = _end(text, at, regex, escaped)
    part = NumberPart(text, at, end, regex, closed)
    if end == at:
        return None
    if not re.fullmatch(r"(?:[\d*?|(){}\[\]:!,+^-]|\\[dw])*", part.number):
        return None if part.number[0].isalpha() else _unreadable(text)
    if (text[end : end + 1] and text[end] not in "\\.$*+") or re.match(r"\\?\.\.?\d", text[end:]):
        _unreadable(text)
    part.names(0)  # a pattern that re cannot compile
    return part


def _unreadable(text: str) -> NoReturn:
    raise ValueError(f"`{text}` cannot be read")


def _end(text: str, at: int, regex: bool, escaped: bool) -> tuple[int, bool]:
    """Where the number ends, and whether nothing but a dot or the end may follow it."""
    depth, i = 0, at
    while i < len(text):
        here = text[i]
        if here == "\\" and not (depth == 0 and text[i + 1 : i + 2] == "."):
            i += 2
            continue
        depth += (here in "([{") - (here in ")]}")
        if depth <= 0 and here in "\\.$,;: /-" and not (here == "-" and depth):
            wild = here == "." and regex and escaped and text[i + 1 : i + 2] in tuple("*+?{")
            return i, not wild
        i += 1
    return i, not regex


def _accepts(number: str, regex: bool, closed: bool, block: int) -> bool:
    if number.isdecimal() and closed:
        return int(number) == block
    if not regex:
        return fnmatchcase(str(block), number)
    matches: Callable[..., object] = re.fullmatch if closed else re.match
    try:
        return matches(number, str(block)) is not None
    except re.error:
        raise ValueError(f"the pattern `{number}` cannot be read") from None


def loose_number(text: str) -> bool:
    """May a number in a text be a block's, though no list of blocks is named before it: `layer_3`, `.*\\.3\\.mlp`?"""
    return any(pattern.search(text) for pattern in (_LOOSE, _LOUD, _UNNAMED))
