"""Run by an interpreter with ExecuTorch: logits of its Llama model for checkpoints.

    executorch-env/bin/python tests/makers/executorch_run.py eager OUT.pt '[5, 6, 40]' FOLDER ...

Writes, for each folder, logits [2, T, V]: read in one go, and token by token behind its cache.  With `pte` in place of
`eager` [T, V]: what the runtime gives, token by token, for the program that its exporter makes.
"""

import json
import sys
from pathlib import Path

import torch
from executorch.examples.models.llama.export_llama_lib import export_llama
from executorch.examples.models.llama.model import Llama2Model
from executorch.extension.llm.export.config.llm_config import LlmConfig


def config_of(folder: Path, cached: bool) -> LlmConfig:
    config = LlmConfig()
    config.base.params, config.base.checkpoint = str(folder / "params.json"), str(folder / "model.pth")
    config.model.use_kv_cache, config.model.use_sdpa_with_kv_cache = cached, False
    config.model.enable_dynamic_shape = False
    config.debug.generate_full_logits = True
    config.export.max_seq_length = config.export.max_context_length = 64
    return config


@torch.no_grad()
def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    whole = Llama2Model(config_of(folder, False)).get_eager_model()(torch.tensor([ids]))[0]
    model = Llama2Model(config_of(folder, True)).get_eager_model()
    rows = [model(torch.tensor([[token]]), {"input_pos": torch.tensor([i])})[0, 0] for i, token in enumerate(ids)]
    return torch.stack([whole, torch.stack(rows)])


def from_pte(folder: Path, ids: list[int]) -> torch.Tensor:
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    config = config_of(folder, True)
    config.export.output_name = str(folder / "model.pte")
    export_llama(config)
    program = _load_for_executorch(config.export.output_name)
    rows = [program.forward((torch.tensor([[token]]), torch.tensor([i])))[0] for i, token in enumerate(ids)]
    return torch.stack([row.reshape(-1) for row in rows])


how, out, ids, *folders = sys.argv[1:]
run = {"eager": logits, "pte": from_pte}[how]
torch.save({Path(folder).name: run(Path(folder), json.loads(ids)) for folder in folders}, out)
