"""Score checkpoint after checkpoint on the same tokens, one in memory at a time, and compare the scores."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dropformer.eval.compare.alignment import Origin, aligned, read_origin
from dropformer.eval.compare.checkpoints import Checkpoint, find_checkpoints
from dropformer.eval.compare.comparison import Comparison, Entry, check_counts, chosen_layers, compare_scores
from dropformer.eval.compare.compatibility import Comparable, SharedTokens
from dropformer.eval.compare.downloads import Downloads
from dropformer.metrics.analysis.analyze import analyze_model, calibrated
from dropformer.metrics.analysis.score_cache import keep, kept_scores, score_file
from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.batching import samples_at_once
from dropformer.metrics.calibration.settings import Calibration, check_length
from dropformer.progress import Progress, Silent
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import ModelError
from dropformer.prune.files import open_checkpoint
from dropformer.prune.files.config_json import read_config
from dropformer.prune.formats.export import reference
from dropformer.prune.loading.tokenizer import open_tokenizer
from dropformer.prune.spec import check_drop
from dropformer.recipes import open_source
from dropformer.recipes.gguf import fingerprint as gguf_fingerprint
from dropformer.recipes.hub import fetch_side_files
from dropformer.recipes.opening import Placement, open_model, torch_dtype

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.*",
    "spiece.model",
    "*.tiktoken",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class CompareRequest:
    """What to compare; see `find_checkpoints` for `names` and `revisions`.

    `tokenizer` (a model name, or a folder with only a tokenizer) replaces the first checkpoint's tokenizer.
    """

    names: Sequence[str]
    drop: str | None = None
    keep: tuple[int, ...] = ()
    revisions: Sequence[str] = ()
    tokenizer: str | None = None
    calibration: Calibration = field(default_factory=Calibration)
    batch_size: int | None = None
    placement: Placement = field(default_factory=Placement)
    keep_downloads: bool = False


@dataclass(frozen=True)
class Side:
    """A checkpoint without its weights.

    `folder` has config and tokenizer, None for a GGUF file, which must be converted first; `key` identifies
    the weights: their fingerprint, the Hub commit, or the fingerprint of the GGUF file.
    """

    folder: Path | None
    key: str
    commit: str | None = None


def compare(request: CompareRequest, progress: Progress | None = None) -> Comparison:
    """Score and compare checkpoints, reusing cached scores of the same weights on the same tokens.

    Raises ModelError, naming the difference, for checkpoints that cannot be compared, before scoring any if config
    or tokenizer shows it; PlanError for a drop spec that does not fit.
    """
    if request.drop:
        check_counts(request.drop)
    torch_dtype(request.placement.dtype)
    checkpoints = find_checkpoints(request.names, request.revisions)
    return Run(request, progress or Silent()).compare(checkpoints)


class Run:
    """One comparison: state that all of its checkpoints share."""

    def __init__(self, request: CompareRequest, progress: Progress) -> None:
        self.request, self.progress = request, progress
        self.comparable = Comparable()

    def compare(self, checkpoints: Sequence[Checkpoint]) -> Comparison:
        self.downloads = Downloads(self.request.keep_downloads, any(c.hub_id for c in checkpoints))
        sides = [self.side(checkpoint) for checkpoint in checkpoints]
        for checkpoint, side in zip(checkpoints, sides, strict=True):
            if side.folder:
                config, origin = read_config(side.folder), read_origin(side.folder)
                check_length(config, self.request.calibration.length, checkpoint.label)
                self.comparable.config(checkpoint.label, config, origin)
                if origin is None:
                    check_drop(self.request.drop, config, checkpoint.label)
        self.tokens = self.shared_tokens(checkpoints, sides)
        for checkpoint, side in zip(checkpoints, sides, strict=True):
            if side.folder and (own := self.tokenizer(side.folder)) is not None:
                self.tokens.check(checkpoint.label, own)
        entries = []
        for number, (checkpoint, side) in enumerate(zip(checkpoints, sides, strict=True), 1):
            entry = self.entry(checkpoint, side, f"{checkpoint} ({number} of {len(checkpoints)})")
            if self.request.drop:  # refuses a spec that drops too much now, not after the last checkpoint
                chosen_layers(entry.scores, self.request.drop, self.request.keep)
            entries.append(entry)
        return compare_scores(entries, self.request.drop, self.request.keep)

    def side(self, checkpoint: Checkpoint) -> Side:
        """Fetch or read everything except the weights."""
        path = Path(checkpoint.name).expanduser()
        if path.is_dir():
            return Side(path, open_checkpoint(path).fingerprint)
        if path.exists():
            return Side(None, gguf_fingerprint(path))
        if checkpoint.hub_id is None:
            source = open_source(checkpoint.name, None, self.progress.say)
            return Side(source.path, open_checkpoint(source.path).fingerprint)
        found = fetch_side_files(checkpoint.hub_id, checkpoint.revision)
        return Side(found.path, found.revision, found.revision)

    def shared_tokens(self, checkpoints: Sequence[Checkpoint], sides: Sequence[Side]) -> SharedTokens:
        """The calibration windows, by --tokenizer if given, else by the first checkpoint that has a tokenizer."""
        calibration = self.request.calibration
        if self.request.tokenizer:
            found = self.tokenizer(self.tokenizer_folder(self.request.tokenizer))
            if found is None:
                raise ModelError(f"--tokenizer {self.request.tokenizer} has no tokenizer files; name one that has")
            return SharedTokens(calibration, f"--tokenizer {self.request.tokenizer}", found)
        for checkpoint, side in zip(checkpoints, sides, strict=True):
            folder = side.folder or open_source(checkpoint.name, checkpoint.revision, self.progress.say).path
            if (found := self.tokenizer(folder)) is not None:
                return SharedTokens(calibration, checkpoint.label, found)
        raise ModelError(f"none of the checkpoints has a tokenizer (the first is {checkpoints[0]}); give --tokenizer")

    def tokenizer(self, folder: Path) -> Any:
        if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
            return None
        return open_tokenizer(folder, self.request.placement.trust_remote_code)

    def tokenizer_folder(self, name: str) -> Path:
        path = Path(name).expanduser()
        hub_id = None if path.exists() else Checkpoint(name.partition("@")[0]).hub_id
        if path.is_dir():
            return path
        if hub_id:
            return fetch_side_files(hub_id, name.partition("@")[2] or None).path
        return open_source(name, None, self.progress.say).path

    def entry(self, checkpoint: Checkpoint, side: Side, title: str) -> Entry:
        """The scores of a checkpoint, cached or measured now, by the original layer indices."""
        try:
            scores = self.kept(side.key)
            if scores is None:
                scores = self.measure(checkpoint, side, title)
            else:
                self.progress.say(f"scores of {title}: reused, same weights and same tokens")
            origin = read_origin(side.folder) if side.folder else None
        finally:
            self.downloads.remove(checkpoint.hub_id, side.commit)
        found = aligned(_named(scores, checkpoint), origin)
        self.comparable.outline(checkpoint.label, found.outline)
        return Entry(checkpoint.label, checkpoint.step, found, _dropped(origin))

    def measure(self, checkpoint: Checkpoint, side: Side, title: str) -> Scores:
        tell = None if side.folder and not side.commit else self.progress.say
        path = open_source(checkpoint.name, checkpoint.revision, tell).path
        if side.folder is None:
            self.comparable.config(checkpoint.label, read_config(path), None)
            if (own := self.tokenizer(path)) is not None:
                self.tokens.check(checkpoint.label, own)
        scores = self.kept(reference(checkpoint.name, path).fingerprint or "") or self.score(checkpoint, title)
        for key in {side.key, scores.model.fingerprint or side.key}:
            if refused := keep(scores, self.cache(key)):
                self.progress.say(refused)
        return scores

    def score(self, checkpoint: Checkpoint, title: str) -> Scores:
        """Load one checkpoint, score it on the windows, and release it."""
        data = self.tokens.windows
        opened = open_model(checkpoint.name, checkpoint.revision, self.request.placement)
        embedding = getattr(opened.model.get_input_embeddings(), "weight", None)
        if embedding is not None:
            self.tokens.check_vocabulary(checkpoint.label, embedding.shape[0])
        with self.progress.stage(f"scoring {title}", len(data)) as tick:
            batches = data.batches(self.request.batch_size or samples_at_once(opened.model, data))
            scores = analyze_model(opened.model, batches, ref=opened.ref, progress=tick)
        del opened, embedding
        gc.collect()
        return calibrated(scores, data)

    def cache(self, key: str) -> Path:
        """The cache file of a key's scores, in the dtype that they are computed in."""
        return score_file(key, self.tokens.windows.ref, self.request.placement.computes_in())

    def kept(self, key: str) -> Scores | None:
        """The cached scores of a key on these tokens, None if there are none."""
        scores = kept_scores(self.cache(key))
        return scores if scores and scores.calibration == self.tokens.windows.ref else None


def _named(scores: Scores, checkpoint: Checkpoint) -> Scores:
    """The scores under this checkpoint's name; cached ones may have another."""
    ref: ModelRef = scores.model.model_copy(update={"name": checkpoint.hub_id or checkpoint.name})
    return scores.model_copy(update={"model": ref})


def _dropped(origin: Origin | None) -> list[str]:
    return [
        f"{stack}.{kind}:{index}".lstrip(".")
        for stack, part in (origin or {}).items()
        for kind, index in sorted(part.dropped)
    ]
