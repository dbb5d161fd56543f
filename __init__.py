"""dropformer: find the layers a Transformer can do without, drop them, measure what that costs.

    import dropformer
    scores = dropformer.analyze("smollm2-135m")
    plan = dropformer.plan(scores, "attn:4")
    model = dropformer.drop("smollm2-135m", plan)
    dropformer.save(model, "smollm2-135m-attn4")
    model = dropformer.load("smollm2-135m-attn4")

After `import dropformer`, transformers' Auto classes load pruned checkpoints too.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dropformer.prune.loading.registration import register_when_transformers_loads
from dropformer.prune.version import __version__

if TYPE_CHECKING:  # the names that the table below imports on first use, for type checkers
    from dropformer.api import DropRecord as DropRecord
    from dropformer.api import LoadedModel as LoadedModel
    from dropformer.api import Placement as Placement
    from dropformer.api import analyze as analyze
    from dropformer.api import draft as draft
    from dropformer.api import drop as drop
    from dropformer.api import load as load
    from dropformer.api import open_model as open_model
    from dropformer.api import plan as plan
    from dropformer.api import save as save
    from dropformer.api import speculate_with as speculate_with
    from dropformer.metrics.analysis.scores import Scores as Scores
    from dropformer.metrics.calibration.settings import Calibration as Calibration
    from dropformer.metrics.search.strategy import Strategy as Strategy
    from dropformer.prune.discovery.discover import describe as describe
    from dropformer.prune.discovery.discover import discover as discover
    from dropformer.prune.errors import ArchitectureError as ArchitectureError
    from dropformer.prune.errors import CalibrationError as CalibrationError
    from dropformer.prune.errors import CheckpointError as CheckpointError
    from dropformer.prune.errors import DropformerError as DropformerError
    from dropformer.prune.errors import EvaluationError as EvaluationError
    from dropformer.prune.errors import ModelError as ModelError
    from dropformer.prune.errors import OutputError as OutputError
    from dropformer.prune.errors import PlanError as PlanError
    from dropformer.prune.errors import VerificationError as VerificationError
    from dropformer.prune.plan import Plan as Plan
    from dropformer.selection import fit as fit
    from dropformer.selection import improve as improve

_API = {
    "dropformer.api": "DropRecord LoadedModel Placement analyze draft drop load open_model plan save speculate_with",
    "dropformer.metrics.analysis.scores": "Scores",
    "dropformer.metrics.calibration.settings": "Calibration",
    "dropformer.metrics.search.strategy": "Strategy",
    "dropformer.prune.discovery.discover": "describe discover",
    "dropformer.prune.errors": "ArchitectureError CalibrationError CheckpointError DropformerError EvaluationError "
    "ModelError OutputError PlanError VerificationError",
    "dropformer.prune.plan": "Plan",
    "dropformer.selection": "fit improve",
}
_HOME = {name: module for module, names in _API.items() for name in names.split()}
__all__ = ["__version__", *_HOME]

register_when_transformers_loads()

if not TYPE_CHECKING:  # otherwise type checkers would accept any name

    def __getattr__(name: str) -> Any:
        """Import the API on first use: torch takes seconds, `prune --help` must not."""
        if name in _HOME:
            return getattr(import_module(_HOME[name]), name)
        raise AttributeError(f"module 'dropformer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
