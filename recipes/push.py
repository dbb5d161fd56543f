"""Publish an exported checkpoint, with its model card, on the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from dropformer.progress import Tell, silent
from dropformer.prune.errors import ModelError, OutputError, reason
from dropformer.prune.formats.record import RECORD
from dropformer.recipes.hub import is_hub_id, is_network


def push(folder: Path, repo: str, private: bool = False, progress: Tell = silent) -> str:
    """Upload a checkpoint that dropformer wrote to the model repository `repo` (user/name); returns its address.

    Creates the repository if it is missing.  Raises ModelError for any other folder, OutputError if the Hub cannot be
    reached or refuses.
    """
    record = checked(folder)
    if not is_hub_id(repo):
        raise OutputError(f"`{repo}` is no valid Hub id; expected user/name")
    api = huggingface_hub.HfApi()
    try:
        progress(f"creating {repo} if it is missing")
        api.create_repo(repo, private=private, exist_ok=True)
        progress(f"uploading {folder} to {repo}")
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=f"{record['model']['name']}, pruned ({record['spec']})"
        )
    except Exception as error:
        raise _translated(error, repo) from error
    return str(getattr(done, "repo_url", "") or f"{api.endpoint}/{repo}")


def checked(folder: Path) -> dict:
    """dropformer.json of a checkpoint.  Raises ModelError if the folder was not written by dropformer."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        assert isinstance(record["spec"], str) and isinstance(record["model"]["name"], str)
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise ModelError(
            f"{folder} is no checkpoint that dropformer wrote (no {RECORD}); give the --out of a prune"
        ) from None
    return record


def _translated(error: Exception, repo: str) -> Exception:
    if isinstance(error, LocalTokenNotFoundError):
        return OutputError(f"pushing to {repo} needs a token; run `hf auth login` or set HF_TOKEN")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HfHubHTTPError) and status in (401, 403):
        return OutputError(
            f"the Hub does not let this token write to {repo}; run `hf auth login` with a token that may write there"
        )
    if isinstance(error, HfHubHTTPError):
        return OutputError(f"the Hub refused {repo} ({reason(error, 200)})")
    if is_network(error):
        return OutputError(f"the Hub cannot be reached to push {repo} ({type(error).__name__}); try again with network")
    return error
