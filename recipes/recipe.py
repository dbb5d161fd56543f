"""A recipe: facts about one model in at most 20 lines of YAML.

Where its weights are, their licence, the default calibration, and published drop lists and results.
"""

import difflib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dropformer.prune.errors import ModelError, PlanError, reason

Kind = Annotated[str, Field(pattern="^(attn|mlp|block)$")]
Index = Annotated[int, Field(ge=0, strict=True)]
Percent = Annotated[float, Field(ge=0, le=100)]


class _Strict(BaseModel):
    """Base that rejects unknown keys, so that a misspelt key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Strict):
    """Default calibration: name of the text, number of windows, and their length in tokens."""

    name: str
    windows: int = Field(gt=0)
    length: int = Field(gt=1)


class Wheel(_Strict):
    """A GGUF file inside a wheel of the Python package index; no code of the wheel runs."""

    project: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    version: str = Field(pattern=r"^[0-9][A-Za-z0-9.!+]*$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    nbytes: int = Field(gt=0)
    member: str = Field(pattern=r"^[^/\\].*\.gguf$")


class Result(_Strict):
    """One published row: the drop spec, MMLU and the mean of eight tasks in percent, the speed-up."""

    drop: str
    mmlu: Percent
    mean: Percent
    speedup: float = Field(gt=0)


class Recipe(_Strict):
    """One model: its Hub id, licence, default calibration, and published lists and results."""

    name: str
    model: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    licence: str
    calibration: Calibration
    wheel: Wheel | None = None
    config: Mapping[str, str | bool | int] = Field(default_factory=dict)  # the config fields that `estimate` needs
    source: str | None = None
    lists: Mapping[Kind, tuple[Index, ...]] = Field(default_factory=dict)
    results: tuple[Result, ...] = ()
    revisions: tuple[str, ...] = ()  # of the Hub repository, in training order, for `prune compare`
    note: str | None = None  # why there are no revisions, where one would expect some

    @field_validator("lists")
    @classmethod
    def _no_layer_twice(cls, lists: Mapping[Kind, tuple[int, ...]]) -> Mapping[Kind, tuple[int, ...]]:
        for kind, indices in lists.items():
            if len(set(indices)) != len(indices):
                raise ValueError(f"the {kind} list names a layer twice")
        return lists

    def published(self, kind: str, count: int) -> list[int]:
        """The `count` layers of `kind` published as most redundant, most redundant first.

        Raises PlanError if no list was published for `kind`, or a shorter one.
        """
        known = self.lists.get(kind, ())
        if not known:
            have = ", ".join(self.lists) or "none for any kind"
            raise PlanError(
                f"no {kind} list is published for {self.name} (published: {have}); let the layers be scored instead"
            )
        if not 0 < count <= len(known):
            raise PlanError(
                f"cannot take {count} {kind} layers from the list published for {self.name}: "
                f"it has {len(known)}; ask for 1 to {len(known)} or let the layers be scored"
            )
        return list(known[:count])


def parse_recipe(name: str, text: str) -> Recipe:
    """Parse the recipe `name` from YAML.  Raises ModelError if it is malformed."""
    try:
        content: Any = yaml.safe_load(text)
        if not isinstance(content, dict):
            raise ModelError(f"recipe {name}: expected a mapping of keys to values")
        return Recipe(name=name, **content)
    except yaml.YAMLError as error:
        raise ModelError(f"recipe {name}: not YAML ({reason(error)})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelError(f"recipe {name}: {where}: {first['msg']}") from error


@cache
def recipes() -> Mapping[str, Recipe]:
    """Every recipe that ships with the package, by name, in alphabetical order."""
    found = {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in files("dropformer.recipes").joinpath("models").iterdir()
        if entry.name.endswith(".yaml")
    }
    return MappingProxyType({name: parse_recipe(name, found[name]) for name in sorted(found)})


def close_names(name: str) -> str:
    """`did you mean A or B?` for the recipe names closest to `name`, or all of the names."""
    close = difflib.get_close_matches(name.lower(), recipes(), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"recipes: {', '.join(recipes())}"


def recipe(name: str) -> Recipe:
    """The recipe `name`.  Raises ModelError with close matches if there is none."""
    if name not in recipes():
        raise ModelError(f"there is no recipe called {name!r}; {close_names(name)}")
    return recipes()[name]


def recipe_of(model: str) -> Recipe | None:
    """The recipe whose model is the Hub id `model`, if there is one."""
    return next((found for found in recipes().values() if found.model.lower() == model.lower()), None)


def recipe_for(name: str, hub: str | None = None) -> Recipe | None:
    """The recipe of that name, else the one of that Hub model."""
    return recipes().get(name) or (recipe_of(hub) if hub else None)
