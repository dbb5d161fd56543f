"""Bounded disk use: what a comparison downloaded or converted is deleted after use; older files stay."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import CacheNotFound

from dropformer.prune.files.output_paths import cache_folder


class Downloads:
    """Records which weights were cached at the start, and removes others on request.

    `hub` False: no checkpoint comes from the Hub, so its cache, which may be large, is not scanned.
    """

    def __init__(self, keep: bool = False, hub: bool = True) -> None:
        self.keep = keep
        self._held = _hub_revisions(with_weights=True) if hub else set()
        self._converted = _conversions()

    def remove(self, hub_id: str | None, commit: str | None) -> None:
        """Remove a commit of a Hub model and all GGUF conversions unless they were cached at the start."""
        if self.keep:
            return
        if hub_id and commit and (hub_id, commit) not in self._held and (hub_id, commit) in _hub_revisions():
            huggingface_hub.scan_cache_dir().delete_revisions(commit).execute()
        for folder in _conversions() - self._converted:
            shutil.rmtree(folder, ignore_errors=True)


def _hub_revisions(with_weights: bool = False) -> set[tuple[str, str]]:
    """(model, commit) of everything in the Hub cache."""
    try:
        repositories = huggingface_hub.scan_cache_dir().repos
    except CacheNotFound:
        return set()
    return {
        (repository.repo_id, revision.commit_hash)
        for repository in repositories
        for revision in repository.revisions
        if not with_weights or any(file.file_name.endswith(".safetensors") for file in revision.files)
    }


def _conversions() -> set[Path]:
    folder = cache_folder() / "gguf"
    return {path for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()
