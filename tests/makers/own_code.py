"""A tiny decoder of a type that only the code beside its checkpoint knows: attention, MLP, three files that import."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIGURATION = """
from transformers import LlamaConfig

class HomeConfig(LlamaConfig):
    model_type = "home"
    def __init__(self, offset=0.5, **kwargs):
        self.offset = offset
        super().__init__(**kwargs)
"""
PARTS = """
from torch import nn

class Shift(nn.Module):
    def __init__(self, offset):
        super().__init__()
        self.offset = offset
    def forward(self, x):
        return x + self.offset
"""
MODELING = """
from torch import nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP, LlamaModel
from .configuration_home import HomeConfig
from .parts_home import Shift

class HomeMLP(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.shift = Shift(config.offset)
    def forward(self, x):
        return super().forward(self.shift(x))

class HomeModel(LlamaModel):
    config_class = HomeConfig
    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.mlp = HomeMLP(config)
        self.post_init()

class HomeForCausalLM(LlamaForCausalLM):
    config_class = HomeConfig
    def __init__(self, config):
        super().__init__(config)
        self.model = HomeModel(config)
        self.post_init()
"""
SHAPE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


def write(folder: Path) -> Path:
    """The checkpoint: weights named as Llama's, config.json and code."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "home", "architectures": ["HomeForCausalLM"], "offset": 0.5}
    named = {"AutoConfig": "configuration_home.HomeConfig", "AutoModelForCausalLM": "modeling_home.HomeForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": named}))
    for name, text in (("configuration", CONFIGURATION), ("parts", PARTS), ("modeling", MODELING)):
        (folder / f"{name}_home.py").write_text(text)
    return folder
