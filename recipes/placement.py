"""Where and how a model computes.  Light: no torch until it is asked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Device and precision.  None: the first GPU, else the CPU; float32 on a CPU, the checkpoint's dtype on a GPU.

    `device_map` is accelerate's, for a model larger than one GPU; `trust_remote_code` runs the model's own code.
    """

    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    trust_remote_code: bool = False

    def computes_in(self, streamed: bool = False) -> str:
        """The dtype that `load` computes in: the one asked for, float32 on a CPU, else auto, the checkpoint's own.

        `streamed` weights are computed with on the CPU.
        """
        from dropformer.prune.loading.load import usable_device

        if self.dtype:
            return self.dtype
        on_cpu = streamed or (self.device_map is None and usable_device(self.device).type == "cpu")
        return "float32" if on_cpu else "auto"
