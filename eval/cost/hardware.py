"""Peak speeds of known devices, from vendors' datasheets, and of this machine, measured.

flops: dense 16-bit tensor operations with 32-bit accumulation (half of the figures with sparsity in datasheets).
Measured figures are in the dtype of the measurement.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dropformer.prune.errors import EvaluationError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Hardware:
    """flops: FLOP/s.  bandwidth, copy: bytes/s read, and moved by a concatenation.  memory: bytes.

    launch: what the host takes for one small operation of PyTorch, in seconds.
    queued: operations run while the host launches the next ones, so that a step takes the longer of the two, as on a
    GPU; else their sum.
    compute_share, memory_share: achieved share of the peaks, 1 for measured figures.  0.6 and 0.8 are common for
    large matrix products and streaming kernels; as both models have the same, a speed-up hardly depends on them.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    source: str
    copy: float = 0.0
    launch: float = 0.0
    queued: bool = False
    compute_share: float = 0.6
    memory_share: float = 0.8

    def __str__(self) -> str:
        return f"{self.name}: {self.flops / 1e12:.4g} TFLOP/s, {self.bandwidth / 1e9:.4g} GB/s ({self.source})"

    def seconds(self, flops: float, nbytes: float) -> float:
        """Roofline: the larger of compute time and memory time."""
        return max(flops / (self.flops * self.compute_share), nbytes / (self.bandwidth * self.memory_share))

    def copy_seconds(self, nbytes: float) -> float:
        return nbytes / ((self.copy or self.bandwidth) * self.memory_share)


# Measured beside one H200 (virtual machine, Python 3.12, torch 2.11): a forward pass of 32 Llama blocks took its host
# 26 ms, of 65 operations a block.
HOST_LAUNCH = 12.5e-6


def _gpu(name: str, flops: float, bandwidth: float, memory: float, source: str) -> Hardware:
    return Hardware(name, flops, bandwidth, memory, source, launch=HOST_LAUNCH, queued=True)


HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        _gpu("a6000", 154.8e12, 768e9, 48e9, "NVIDIA RTX A6000 datasheet (309.7 TFLOPS with sparsity)"),
        _gpu("a100-80g", 312e12, 2039e9, 80e9, "NVIDIA A100 datasheet, SXM 80 GB"),
        _gpu("h100-sxm", 989.4e12, 3350e9, 80e9, "NVIDIA H100 datasheet, SXM (1,979 TFLOPS with sparsity)"),
        _gpu("h200", 989.4e12, 4800e9, 141e9, "NVIDIA H200 datasheet, SXM (1,979 TFLOPS with sparsity)"),
        _gpu("rtx4090", 165.2e12, 1008e9, 24e9, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
        _gpu("l4", 121e12, 300e9, 24e9, "NVIDIA L4 datasheet (242 TFLOPS with sparsity)"),
    )
}


def hardware(name: str, dtype: torch.dtype | None = None) -> Hardware:
    """A device of the table, or `cpu`: this machine, measured now.  Raises EvaluationError for other names."""
    if name == "cpu":
        return measure_cpu(dtype)
    if name not in HARDWARE:
        raise EvaluationError(f"unknown hardware `{name}`; expected cpu (this machine) or {', '.join(HARDWARE)}")
    return HARDWARE[name]


def measure_cpu(dtype: torch.dtype | None = None) -> Hardware:
    """This machine's speeds with torch's current number of threads, by default in float32; takes about two seconds.

    flops: a 1024 x 1024 matrix product.  bandwidth: products of a vector with 1024 x 1024 matrices that together
    exceed the caches, as decoding reads weights.  copy: concatenating one row to a tensor of the size of a layer's
    keys.  launch: adding two tensors of four elements.
    """
    import torch  # not needed for the table above

    dtype = dtype or torch.float32
    size = torch.empty((), dtype=dtype).element_size()
    square = torch.randn(1024, 1024).to(dtype)
    matrices = [square.clone() for _ in range(48)]
    vector = torch.randn(1, 1024).to(dtype)
    keys, row, tiny = torch.zeros(1, 3, 512, 64), torch.zeros(1, 3, 1, 64), torch.zeros(4)
    keys, row = keys.to(dtype), row.to(dtype)
    layers = [keys.clone() for _ in range(60)]

    threads = torch.get_num_threads()
    product = _seconds(lambda: square @ square, threads)
    stream = _seconds(lambda: [torch.nn.functional.linear(vector, matrix) for matrix in matrices], threads)
    joined = _seconds(lambda: [torch.cat([layer, row], dim=-2) for layer in layers], threads)
    launch = _seconds(lambda: [tiny + tiny for _ in range(1000)], 1) / 1000
    return Hardware(
        name="cpu",
        flops=2 * 1024**3 / product,
        bandwidth=len(matrices) * square.numel() * size / stream,
        memory=_total_memory(),
        source=f"measured here: {threads} threads, {str(dtype).removeprefix('torch.')}",
        copy=2 * len(layers) * keys.numel() * size / joined,
        launch=launch,
        compute_share=1.0,
        memory_share=1.0,
    )


def _seconds(function: Callable[[], object], threads: int, repeats: int = 7) -> float:
    """The fastest of several calls after a warm-up, by wall-clock time or CPU time per thread.

    Other programs can only slow a call down, and hardly change its CPU time.
    """
    times = []
    function()
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        times += [time.perf_counter() - wall, (time.process_time() - cpu) / threads]
    return min(times)


def _total_memory() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
