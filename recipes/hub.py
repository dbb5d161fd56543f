"""Downloads from the Hugging Face Hub: only safetensors, JSON and tokenizer files, never a pickle."""

import contextlib
import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dropformer.progress import Tell, silent
from dropformer.prune.errors import CheckpointError, ModelError, reason
from dropformer.prune.files.side_files import REWRITTEN, check_no_adapter, sort_side_files, weights_of

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Snapshot:
    """A folder of the Hub cache and its commit."""

    path: Path
    revision: str


Fetch = Callable[[str, str | None, Sequence[str] | None], Snapshot]
"""(model, revision, its files on the Hub, None: from the cache only) -> snapshot."""


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id, org/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def fetch_snapshot(model: str, revision: str | None = None, progress: Tell = silent) -> Snapshot:
    """Download `model` at `revision` (None: its main branch), or take it from the Hub cache.

    Raises ModelError if it is not available, CheckpointError if it has only pickled weights.
    """
    return _online_or_cached(_snapshot, model, revision, progress)


def fetch_config(model: str, revision: str | None = None, progress: Tell = silent) -> Snapshot:
    """Like `fetch_snapshot`, but only config.json."""
    return _online_or_cached(_config, model, revision, progress)


def fetch_side_files(model: str, revision: str | None = None, progress: Tell = silent) -> Snapshot:
    """Like `fetch_snapshot`, but without weights: config, tokenizer, dropformer's artifacts."""
    return _online_or_cached(_side_files, model, revision, progress)


def _online_or_cached(fetch: Fetch, model: str, revision: str | None, progress: Tell) -> Snapshot:
    """`fetch` from the Hub, or from its cache without network."""
    try:
        # Without network this fails at once, while the downloads below would retry for half a minute.
        info = huggingface_hub.model_info(model, revision=revision)
        names = [file.rfilename for file in info.siblings or []]
        check_no_adapter(names, model)
        if fetch is not _config:
            _refuse_pickles(model, names)
        progress(f"fetching {model} from the Hugging Face Hub")
        if fetch is _snapshot and (note := sort_side_files(names).note):
            progress(note)
        return fetch(model, revision, names)
    except Exception as error:
        if is_network(error):
            with contextlib.suppress(LocalEntryNotFoundError):
                return fetch(model, revision, None)
        raise _translated(error, model, revision) from error


def _snapshot(model: str, revision: str | None, names: Sequence[str] | None) -> Snapshot:
    found = _downloaded(model, revision, names, weights=True)
    if names is None and not any(found.path.glob("*.safetensors")):  # only its config was fetched earlier
        raise LocalEntryNotFoundError(f"{model} has no weights in the cache")
    return found


def _side_files(model: str, revision: str | None, names: Sequence[str] | None) -> Snapshot:
    return _downloaded(model, revision, names, weights=False)


def _downloaded(model: str, revision: str | None, names: Sequence[str] | None, weights: bool) -> Snapshot:
    """Download the model's files by `sort_side_files`, and its weights if `weights`.

    *.py files are downloaded, but run only with --trust-remote-code.
    """
    needed = ["config.json", *(["model*.safetensors"] if weights else ())]  # offline: the rest as cached
    folder = huggingface_hub.snapshot_download(
        model,
        revision=revision,
        allow_patterns=needed if names is None else wanted_files(names, weights),
        ignore_patterns=["*/*"] if names is None else None,
        local_files_only=names is None,
    )
    return Snapshot(Path(folder), Path(folder).name)


def wanted_files(names: Sequence[str], weights: bool = True) -> list[str]:
    """The files of a repository to download, as escaped glob patterns."""
    found = [*sort_side_files(names).carried, *(name for name in names if name in REWRITTEN)]
    return [glob.escape(name) for name in [*found, *(weights_of(names) if weights else ())]]


def _config(model: str, revision: str | None, names: Sequence[str] | None) -> Snapshot:
    path = huggingface_hub.hf_hub_download(model, "config.json", revision=revision, local_files_only=names is None)
    return Snapshot(Path(path).parent, Path(path).parent.name)


def _refuse_pickles(model: str, names: list[str]) -> None:
    """Raises CheckpointError if a repository of the files `names` has no safetensors at its root."""
    if any(name.endswith(".safetensors") and "/" not in name for name in names):
        return
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{model} has its weights only as pickles ({pickles[0]}), which can run code and are refused; "
            "use a revision or a copy of the model in safetensors"
        )
    raise CheckpointError(f"{model} has no *.safetensors weights; use a copy of the model in safetensors")


def _translated(error: Exception, model: str, revision: str | None) -> Exception:
    """A one-line error with a remedy for an error of huggingface_hub."""
    if isinstance(error, ModelError):
        return error
    if isinstance(error, GatedRepoError):
        return ModelError(
            f"{model} is gated: accept its licence on its page on the Hub, then run `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelError(f"{model} has no revision {revision}; give a branch, a tag or a commit of it")
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(
            f"{model} is not on the Hub, or private; check the spelling, or run `hf auth login` if it is yours"
        )
    if isinstance(error, HFValidationError):
        return ModelError(f"{model} is no valid Hub id; expected org/name or org/name@revision")
    if isinstance(error, RemoteEntryNotFoundError):
        return CheckpointError(f"{model} has no config.json on the Hub; expected a transformers model")
    return _unreachable(error, model)


def is_network(error: Exception) -> bool:
    """Whether the Hub could not be reached, rather than answered with an error."""
    kinds = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError)
    return isinstance(error, kinds) or type(error).__module__.partition(".")[0].startswith("http")


def _unreachable(error: Exception, model: str) -> Exception:
    """A ModelError with a remedy for errors of the Hub or network; other errors unchanged."""
    instead = "; use a machine with network once, or give the path of a folder or .gguf file"
    if isinstance(error, HfHubHTTPError):
        return ModelError(f"the Hub refused {model} ({reason(error, 200)}){instead}")
    if not is_network(error):
        return error
    if constants.HF_HUB_OFFLINE:
        return ModelError(f"{model} is not complete in the Hub's cache and HF_HUB_OFFLINE is set; unset it{instead}")
    return ModelError(f"the Hub cannot be reached for {model} ({type(error).__name__}){instead}")
