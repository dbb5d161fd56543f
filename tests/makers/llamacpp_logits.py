"""Run by an interpreter that has cyllama (llama.cpp): logits of every position, for each of some GGUF files.

    python llamacpp_logits.py OUT.npy '[1, 5, 7]' one.gguf other.gguf      # -> [files, 2, T, V] in float32

Twice each: without flash attention and in float32 throughout, then with flash attention, whose keys and values
llama.cpp rounds to 16 bits.
"""

import json
import sys

import numpy as np
from cyllama.llama import llama_cpp

TYPES = {False: 0, True: 1}  # ggml's F32, and F16
MEMORY_MAP, ONE_BY_ONE = True, 3


class Model(llama_cpp.LlamaModel):
    """With the length of a row of logits, which cyllama 0.2.18 asks its models for, and they lack."""

    @property
    def n_vocab(self) -> int:
        return self.get_vocab().n_vocab


def logits(path: str, tokens: list[int], flash: bool) -> np.ndarray:
    """[T, V]; the last three tokens come one by one, as in decoding, so that the cache is read."""
    loading, running = llama_cpp.LlamaModelParams(), llama_cpp.LlamaContextParams()
    loading.use_mmap, loading.n_gpu_layers = MEMORY_MAP, 0
    running.n_ctx = running.n_batch = running.n_ubatch = 128
    running.n_threads = running.n_threads_batch = 1
    running.flash_attn_type, running.type_k, running.type_v = int(flash), TYPES[flash], TYPES[flash]
    model = Model(path, loading)
    context = llama_cpp.LlamaContext(model, running)
    first = len(tokens) - ONE_BY_ONE
    parts = [(0, tokens[:first]), *[(at, tokens[at : at + 1]) for at in range(first, len(tokens))]]
    return np.concatenate([decoded(context, at, part) for at, part in parts])


def decoded(context: "llama_cpp.LlamaContext", start: int, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] of tokens at positions from `start` on."""
    batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
    for i, token in enumerate(tokens):
        batch.add(token, start + i, [0], True)
    context.decode(batch)
    return np.array([context.get_logits_ith(i) for i in range(len(tokens))], np.float32)


out, ids, *files = sys.argv[1:]
llama_cpp.disable_logging()
np.save(out, np.stack([[logits(path, json.loads(ids), flash) for flash in (False, True)] for path in files]))
