"""Every error a user can cause, one tree, caught once in `cli.main` (exit status 2).

DropformerError
├── ModelError            the model cannot be found, opened or used
│   ├── CheckpointError   its files are missing, corrupt, hostile or of a refused format
│   └── ArchitectureError its blocks or branches cannot be found, proven or dropped
├── PlanError             the drop spec asks for what the model or the scores do not have
├── CalibrationError      the calibration text is missing or too short
├── EvaluationError       a task, data set or setting of an evaluation cannot be used
├── OutputError           the target exists, or cannot be written
└── VerificationError     what was written is not what is in memory: nothing is kept

A message is one line: what is wrong, what was expected, what to do.
"""


class DropformerError(Exception):
    """Base of every error that a user can cause."""


class ModelError(DropformerError):
    """The model cannot be found, opened or used."""


class CheckpointError(ModelError):
    """The checkpoint's files are missing, corrupt, hostile or of a refused format."""


class ArchitectureError(ModelError):
    """The model's blocks or branches cannot be found, proven or dropped."""


class PlanError(DropformerError):
    """The drop spec asks for what the model or the scores do not have."""


class CalibrationError(DropformerError):
    """The calibration text is missing or too short."""


class EvaluationError(DropformerError):
    """A task, data set or setting of an evaluation cannot be used."""


class OutputError(DropformerError):
    """The target exists, or cannot be written."""


class VerificationError(DropformerError):
    """What was written is not what is in memory; nothing is kept."""


def shown(value: object, limit: int = 100) -> str:
    """`value` for a message: printable, on one line, not longer than about `limit` characters."""
    text = str(value)
    text = text if len(text) <= limit else f"{text[:limit]}..."
    return text if text.isprintable() else repr(text)


def reason(error: BaseException, limit: int = 300) -> str:
    """What a library's error says, on one line: all of its lines, because validators put the cause on the second."""
    said = " ".join(str(error).split())
    return shown(said or type(error).__name__, limit)
