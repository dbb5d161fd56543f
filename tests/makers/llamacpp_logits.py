"""Run by an interpreter that has llama-cpp-python: logits of every position, for each of some GGUF files.

    python llamacpp_logits.py OUT.npy '[1, 5, 7]' one.gguf other.gguf      # -> [files, 2, T, V] in float32

Twice each: without flash attention and in float32 throughout, then with flash attention, whose keys and values
llama.cpp rounds to 16 bits.
"""

import json
import sys

import llama_cpp
import numpy as np


def logits(path: str, tokens: list[int], flash: bool) -> np.ndarray:
    """[T, V]; the last three tokens come one by one, as in decoding, so that the cache is read."""
    kind = llama_cpp.GGML_TYPE_F16 if flash else llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        path, n_ctx=128, n_gpu_layers=0, n_threads=1, logits_all=True, verbose=False,
        flash_attn=flash, type_k=kind, type_v=kind,
    )  # fmt: skip
    model.eval(tokens[:-3])
    for token in tokens[-3:]:
        model.eval([token])
    return model.scores[: len(tokens)].copy()


out, ids, *files = sys.argv[1:]
np.save(out, np.stack([[logits(path, json.loads(ids), flash) for flash in (False, True)] for path in files]))
