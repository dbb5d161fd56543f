"""What to calibrate on, as the user says it and as an artifact records it."""

from __future__ import annotations

from dataclasses import dataclass

from dropformer.prune.artifact import FrozenRecord


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on.

    `samples` windows of `length` tokens.  `packed` windows are cut from the documents laid end to end;
    otherwise each window is the start of one document, padded, and padding never counts.
    `skip_first` tokens of every window are run but not scored: the first token of a window is an
    attention sink whose huge norm says little about the layer (arXiv 2309.17453).
    """

    name: str = "builtin"
    samples: int = 64
    length: int = 512
    seed: int = 0
    packed: bool = True
    skip_first: int = 0


class CalibrationRef(FrozenRecord):
    """A calibration as an artifact records it; `hash` is SHA-256 of the token ids and the scored positions."""

    name: str
    samples: int
    length: int
    seed: int
    packed: bool
    skip_first: int
    hash: str
