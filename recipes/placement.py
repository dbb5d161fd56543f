"""Device and precision of a model.  Does not import torch until needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Placement:
    """Device and precision.  None: the first GPU, else the CPU; float32 on a CPU, the checkpoint's dtype on a GPU.

    `device_map` is accelerate's, for a model larger than one GPU; `trust_remote_code` runs the model's own code.
    """

    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    trust_remote_code: bool = False

    def computes_in(self, folder: Path | None = None) -> str:
        """The dtype in which `load` runs a folder's model: the requested one, else `default_dtype`."""
        if self.dtype:
            return self.dtype
        from dropformer.prune.files.config_json import read_config
        from dropformer.prune.loading.load import default_dtype, usable_device

        on_cpu = self.device_map is None and usable_device(self.device).type == "cpu"
        return str(default_dtype(read_config(folder) if folder else {}, on_cpu)).removeprefix("torch.")
