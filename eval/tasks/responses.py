"""Wrappers of an lm-eval LM: answers cached on disk, so that a run can resume, and requests split over processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CachingLM
from sqlitedict import SqliteDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

ASIDE = ("_name_or_path", "transformers_version", "architectures", "dtype")
"""Config fields that do not change answers; the dtype of each weight is in the fingerprint."""


class RememberingLM(CachingLM):
    """lm-eval's caching LM with JSON instead of pickles, which can run code when read."""

    def __init__(self, lm: LM, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lm = lm
        self.cache_db = str(path)
        self.dbdict = SqliteDict(str(path), autocommit=True, encode=json.dumps, decode=json.loads)
        lm.set_cache_hook(self.get_cache_hook())

    def close(self) -> None:
        """End the file's writer thread; answers are already committed."""
        self.dbdict.close()


class SharingLM(LM):
    """Splits requests over the processes of one launch; every process gets all answers.

    Each process takes a contiguous range of the requests, sorted by text, so a few-shot prefix stays in one process.
    lm-eval's own split is round-robin and fails if a task has fewer questions than processes.
    """

    def __init__(self, lm: LM | CachingLM) -> None:
        super().__init__()
        self.lm = lm
        self.MULTIMODAL = getattr(lm, "MULTIMODAL", False)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """As lm-eval's, over this process's share; answers of all."""
        return self._share("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """As lm-eval's, over this process's share; answers of all."""
        return self._share("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """As lm-eval's, over this process's share; answers of all."""
        return self._share("generate_until", requests)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm, name)

    def _share(self, method: str, requests: list[Instance]) -> list[Any]:
        rank, processes = dist.get_rank(), dist.get_world_size()
        mine = shares([str(request.args[0]) for request in requests], processes)[rank]
        answers = getattr(self.lm, method)([requests[i] for i in mine]) if mine else []
        gathered: list[Any] = [None] * processes
        dist.all_gather_object(gathered, list(zip(mine, answers, strict=True)))
        found = dict(pair for part in gathered for pair in part)
        return [found[i] for i in range(len(requests))]


def shares(texts: Sequence[str], processes: int) -> list[list[int]]:
    """Indices of `texts`, sorted by text, in one range per process, of similar length in characters.

    Equal texts stay together: they are the choices of one question.
    """
    order = sorted(range(len(texts)), key=lambda i: (texts[i], i))
    ends = list(accumulate(len(texts[i]) + 1 for i in order))
    out: list[list[int]] = [[] for _ in range(processes)]
    owner = 0
    for n, (index, end) in enumerate(zip(order, ends, strict=True)):
        if n == 0 or texts[index] != texts[order[n - 1]]:
            owner = min(processes - 1, (end - 1) * processes // ends[-1])
        out[owner].append(index)
    return out


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits of the model's config, a sample of each weight, and the tokenizer, independent of paths."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ASIDE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        if not weight.is_meta:  # offloaded to disk
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float32)
            digest.update(sample.numpy().tobytes())
    inner = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((inner.to_str() if inner is not None else str(sorted(tokenizer.get_vocab()))).encode())
    return digest.hexdigest()[:16]
