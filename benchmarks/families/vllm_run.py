"""Run checkpoints in vLLM, in its own environment: log-probabilities, greedy tokens, and whose keys it caches.

    vllm-env/bin/python benchmarks/families/vllm_run.py '{"folders": [...], "prompts": [[5, 6]], "steps": 6}'

Prints one line `FOUND {...}` for each folder as soon as it has run: what it gave, or `error`.  Settings beside those
of the run (`trust_remote_code`, `tensor_parallel_size`) are passed to vLLM.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.model_executor.models import registry

CACHE_BYTES = 8 << 20


def run(folder: str, prompts: list[list[int]], steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What vLLM gives for one checkpoint, prompt by prompt."""
    llm = LLM(
        folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4, seed=0,
        kv_cache_memory_bytes=CACHE_BYTES, **settings,
    )  # fmt: skip
    ask = SamplingParams(temperature=0, max_tokens=steps, prompt_logprobs=0, detokenize=False, ignore_eos=True)
    answers = []
    for out in llm.generate([{"prompt_token_ids": ids} for ids in prompts], ask, use_tqdm=False):
        pairs = zip(out.prompt_logprobs[1:], out.prompt_token_ids[1:], strict=True)
        scores = [entry[token].logprob for entry, token in pairs]
        answers.append({"logprobs": scores, "tokens": list(out.outputs[0].token_ids)})
    return {"answers": answers, **cache_of(llm)}


def cache_of(llm: LLM) -> dict[str, Any]:
    """How many blocks of KV cache there are in CACHE_BYTES, and the layers that own some; empty for several ranks."""
    executor = getattr(llm.llm_engine.engine_core, "engine_core", llm.llm_engine.engine_core)
    worker = getattr(getattr(executor, "model_executor", None), "driver_worker", None)
    if worker is None:
        return {}
    runner = worker.worker.model_runner
    cache = runner.kv_cache_config
    layers = sorted(name for group in cache.kv_cache_groups for name in group.layer_names)
    native = next(kind.__name__ for kind in type(runner.model).__mro__ if not kind.__name__.startswith("Dropformer"))
    return {"blocks": cache.num_blocks, "layers": layers, "class": native}


def main() -> None:
    work = json.loads(sys.argv[1])
    prompts, steps = work["prompts"], work["steps"]
    registry._run_in_subprocess = lambda look: look()  # it would import vLLM anew for every family, for CUDA's sake
    for folder in work["folders"]:
        try:
            found = run(folder, prompts, steps, work.get("settings", {}))
        except Exception as error:  # whatever vLLM stops with is the result
            found = {"error": str(error)}
        print("\nFOUND " + json.dumps({"name": Path(folder).name, **found}), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
