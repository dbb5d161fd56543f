"""The JSON artifacts' common ground: schema, tool version, model, reading and writing."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dropformer.prune.errors import DropformerError, OutputError
from dropformer.prune.files.folder import cannot_write
from dropformer.prune.version import __version__

A = TypeVar("A", bound="Artifact")


_LOCAL = re.compile(r"(?<![\w.:/~-])(?:~[\w.-]*|[A-Za-z]:(?=\\))?[/\\](?:[^\s'\"`,;:/\\]+[/\\])+(?=[^\s'\"`,;/\\])")


def without_paths(value: Any) -> Any:
    """JSON with every absolute local path in it cut down to its last part; /home/me/models/tiny becomes tiny."""
    if isinstance(value, dict):
        return {name: without_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~")) and "\n" not in value:
        return Path(value).name or value
    return _LOCAL.sub("", value)


class FrozenRecord(BaseModel):
    """A part of an artifact: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRef(FrozenRecord):
    """Which model an artifact speaks of.

    `name` is what it was called, `hub` its id on the Hugging Face Hub where it has one; `fingerprint` is that of
    the weights' headers and a sample of bytes, `config` a hash of what config.json builds; `file` the quantized .gguf
    file that the weights come from, where they are not those of the Hub.
    """

    name: str
    hub: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    config: str | None = None
    model_type: str | None = None
    license: str | None = None
    file: str | None = None


class Artifact(FrozenRecord):
    """A JSON file that names its schema and the version that wrote it."""

    kind: ClassVar[str] = "artifact"
    schema_version: int = Field(1, alias="schema")
    artifact: str = ""
    dropformer: str = __version__

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _name_itself(cls, data: Any) -> Any:
        if isinstance(data, dict):
            if data.get("artifact", cls.kind) != cls.kind:
                raise ValueError(f"this is a {data['artifact']}, not a {cls.kind}")
            return {**data, "artifact": cls.kind}
        return data

    def portable(self: A) -> A:
        """The same with names in place of absolute local paths, for a folder that others may get."""
        return type(self).model_validate(without_paths(self.model_dump(mode="json", by_alias=True)))

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, allow_nan=False) + "\n"

    def write(self, path: Path | str) -> Path:
        """Write the artifact as indented JSON; an existing file is replaced at once.

        Raises OutputError where nothing can be written at `path`, and then leaves nothing behind.
        """
        path = Path(path)
        if not path.name or path.is_dir():
            raise OutputError(f"{path} is a folder, not a place for a {self.kind} file; give the name of a file")
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(self.to_json(), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise cannot_write(path, error) from None
        return path

    @classmethod
    def read(cls: type[A], path: Path | str) -> A:
        """Raises DropformerError, in one line, for a file that is missing, not JSON or of another kind."""
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DropformerError(f"{path} does not exist; expected a {cls.kind} file") from None
        except IsADirectoryError:
            raise DropformerError(f"{path} is a folder; give the {cls.kind}.json that is in it") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DropformerError(f"{path} cannot be read as a {cls.kind}: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            said = first["msg"].removeprefix("Value error, ")
            raise DropformerError(f"{path} is not a {cls.kind} file that this version reads: {where}: {said}") from None
