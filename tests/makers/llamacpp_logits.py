"""Run by an interpreter that has llama-cpp-python: logits of every position, for each of some GGUF files.

python llamacpp_logits.py OUT.npy '[1, 5, 7]' one.gguf other.gguf      # -> [files, T, V] in float32
"""

import json
import sys

import llama_cpp
import numpy as np

out, ids, *files = sys.argv[1:]
found = []
for path in files:
    model = llama_cpp.Llama(
        path, n_ctx=128, n_gpu_layers=0, n_threads=1, logits_all=True, flash_attn=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    tokens = json.loads(ids)
    model.eval(tokens[:-3])
    for token in tokens[-3:]:  # the last ones alone, as decoding does, from the cache
        model.eval([token])
    found.append(model.scores[: len(tokens)].copy())
np.save(out, np.stack(found))
