"""Models of the Hugging Face Hub: only safetensors, JSON and tokenizer files, never a pickle."""

import re
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

from dropformer.prune.errors import CheckpointError, ModelError
from dropformer.recipes.cache import Progress, silent

# *.py is text that nobody runs unless remote code is trusted; without it, it could not even be trusted.
WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
# Subfolders hold other formats; consolidated*.safetensors is the same weights a second time.
UNWANTED = ["*/*", "consolidated*.safetensors", "*.bin", "*.pt", "*.pth"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Snapshot:
    """A folder of the Hub's cache and the commit that it holds."""

    path: Path
    revision: str


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id, org/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def fetch_snapshot(model: str, revision: str | None = None, progress: Progress = silent) -> Snapshot:
    """Download `model` at `revision` (None: its main branch), or take it from the Hub's cache.

    Raises ModelError if it cannot be had, CheckpointError if its weights are only pickles.
    """
    try:
        info = huggingface_hub.model_info(model, revision=revision)
        _refuse_pickles(model, [file.rfilename for file in info.siblings or []])
        progress(f"fetching {model} from the Hugging Face Hub")
        return _snapshot(model, info.sha)
    except Exception as error:
        if _is_network(error) and (cached := _cached(model, revision)):
            return cached
        raise _translated(error, model, revision) from error


def fetch_config(model: str, revision: str | None = None) -> Snapshot:
    """Download only config.json of `model`.  Raises ModelError if it cannot be had."""
    try:
        path = Path(huggingface_hub.hf_hub_download(model, "config.json", revision=revision))
    except Exception as error:
        raise _translated(error, model, revision) from error
    return Snapshot(path.parent, path.parent.name)


def _snapshot(model: str, revision: str | None, offline: bool = False) -> Snapshot:
    folder = huggingface_hub.snapshot_download(
        model, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=offline
    )
    return Snapshot(Path(folder), Path(folder).name)


def _cached(model: str, revision: str | None) -> Snapshot | None:
    """What an earlier run downloaded, if that has weights."""
    try:
        found = _snapshot(model, revision, offline=True)
    except LocalEntryNotFoundError:
        return None
    return found if any(found.path.glob("*.safetensors")) else None


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
    """What `error`, raised by huggingface_hub about `model`, means to a person."""
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


def _is_network(error: Exception) -> bool:
    """Whether `error` says that the Hub was not asked or did not answer, rather than what it answered."""
    kinds = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError)
    return isinstance(error, kinds) or type(error).__module__.partition(".")[0].startswith("http")


def _unreachable(error: Exception, model: str) -> Exception:
    """`error` if it is none of the Hub's or the network's, else how to do without."""
    instead = "; use a machine with network once, or give the path of a folder or .gguf file"
    if isinstance(error, HfHubHTTPError):
        return ModelError(f"the Hub refused {model} ({' '.join(str(error).split())[:200]}){instead}")
    if not _is_network(error):
        return error
    if constants.HF_HUB_OFFLINE:
        return ModelError(f"{model} is not whole in the Hub's cache and HF_HUB_OFFLINE is set; unset it{instead}")
    return ModelError(f"the Hub cannot be reached for {model} ({type(error).__name__}){instead}")
