"""An estimate as people read it: dense beside pruned, and the predicted speed-up beside the published one."""

from __future__ import annotations

from dropformer.eval.cost.estimate import KERNELS, Estimate, Side

_KERNELS = {
    "fused": "fused kernels (FlashAttention, vLLM)",
    "sdpa": "transformers, cache concatenated",
    "eager": "transformers, eager attention",
}


def estimate_lines(estimate: Estimate, published: float | None = None) -> list[str]:
    """Lines for the terminal.  published: the measured speed-up of the same drop, where one is known."""
    dense, pruned = estimate.dense, estimate.pruned
    place, load = dense.hardware, dense.workload
    lines = [
        f"{place.name}: {place.flops / 1e12:.4g} TFLOP/s, {place.bandwidth / 1e9:.4g} GB/s ({place.source})",
        f"batch {load.batch}, {load.prompt} + {load.new} tokens, {load.dtype}",
        _row("", "dense", "pruned"),
        _row("parameters", *(f"{side.parameters / 1e9:.3f} G" for side in (dense, pruned))),
    ]
    if dense.active_parameters != dense.parameters:
        lines.append(_row("active", *(f"{side.active_parameters / 1e9:.3f} G" for side in (dense, pruned))))
    lines += [
        _row("checkpoint", *(_bytes(side.checkpoint_bytes) for side in (dense, pruned))),
        _row("KV cache", *(_bytes(side.kv_bytes) for side in (dense, pruned))),
        _row("devices needed", str(dense.devices), str(pruned.devices)),
        _row("prefill", *(f"{side.prefill_flops / 1e12:.4g} TFLOP" for side in (dense, pruned))),
        _row("decode step", *(f"{side.decode_flops / 1e12:.4g} TFLOP" for side in (dense, pruned))),
    ]
    for name in KERNELS:
        speedup = estimate.speedup(name)
        lines.append(_row(f"time, {name}", *(_times(side, name) for side in (dense, pruned))))
        lines.append(
            f"  {_KERNELS[name]}: {speedup.generation:.2f}x in all "
            f"(prefill {speedup.prefill:.2f}x, decode {speedup.decode:.2f}x)"
        )
    if published is not None:
        lines.append(f"  published, measured: {published:.2f}x")
    return lines


def _row(name: str, dense: str, pruned: str) -> str:
    return f"{name:<16}{dense:>24}{pruned:>24}".rstrip()


def _times(side: Side, kernels: str) -> str:
    times = side.times[kernels]
    return f"{times.prefill:.3g} s + {times.decode:.4g} s"


def _bytes(count: int) -> str:
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count / 2**10:.4g} KiB"
