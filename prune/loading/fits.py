"""Whether a checkpoint's config.json describes the very tensors in its files, asked without loading a weight."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig

from dropformer.prune.errors import CheckpointError, shown
from dropformer.prune.files import open_checkpoint
from dropformer.prune.files.config_json import read_config
from dropformer.prune.loading.load import one_line_errors, weightless
from dropformer.prune.loading.tensor_names import renamed_on_load


def check_fits(folder: Path, trust_remote_code: bool = False) -> None:
    """Raises CheckpointError where transformers could not load the folder: a bad config, or tensors that are missing,
    unexpected or of another shape.  Quantized weights are only built.  Memory: none for weights.
    """
    model = weightless(folder, trust_remote_code)
    with one_line_errors(folder):
        if (folder / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(folder)
    if read_config(folder).get("quantization_config"):
        return
    rename, state, found = renamed_on_load(model), model.state_dict(), set()
    for name, span in open_checkpoint(folder).tensors.items():
        parameter, merged = rename(name)
        found.add(parameter)
        if merged is None and parameter in state and tuple(state[parameter].shape) != span.shape:
            want = list(state[parameter].shape)
            raise CheckpointError(
                f"{folder}: {shown(name)} has the shape {list(span.shape)}, but config.json makes it {want}; get the "
                "model's own config.json"
            )
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(name for name, _ in model.named_parameters() if name not in found | tied)
    stray = sorted(name for name in found - state.keys() if name.rpartition(".")[2] in ("weight", "bias"))
    for what, names in (("missing", missing), ("not in the model that config.json describes", stray)):
        if names:
            raise CheckpointError(f"{folder}: {shown(names[0])} is {what}; get a complete copy of the checkpoint")
