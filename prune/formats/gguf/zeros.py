"""`--format gguf --dense`: the dense file with zeros where dropped branches write to the residual stream.

The matrices that end a branch, and their biases, become zero bytes, which mean zero in every type of GGUF.  Norms,
queries and scales keep their numbers, because programs divide by some of them.  Loads wherever the dense file does,
computes what the pruned model computes, saves nothing.
"""

from __future__ import annotations

from dropformer.prune.block_map import Surgery
from dropformer.prune.errors import CheckpointError, PlanError
from dropformer.prune.formats.dense import check_expressible
from dropformer.prune.formats.gguf.layout import GgufPiece
from dropformer.prune.formats.gguf.source import GgufSource

WRITERS = {"attn": ("attn_output.",), "mlp": ("ffn_down.", "ffn_down_exps.", "ffn_down_shexp.")}
"""How the names of what writes to the stream begin, after `blk.N.`"""

NO_REPAIRS = "--format gguf --dense writes no repaired weights; leave out --repair or --dense"


def check_zeros(surgery: Surgery) -> None:
    """Raises PlanError for a plan that zeros cannot express."""
    check_expressible(surgery, "gguf --dense")
    if surgery.tensors:
        raise PlanError(NO_REPAIRS)


def silenced(source: GgufSource, surgery: Surgery) -> list[GgufPiece]:
    """The dense file's tensors, those zero that dropped branches end in.

    Raises CheckpointError where a dropped branch ends in none that is known.
    """
    zero = set()
    for layer in surgery.outline.branch_layers(surgery.layers):
        names = [leaf for leaf in source.leaves[layer.index] if leaf.startswith(WRITERS[layer.kind])]
        if not names:
            raise CheckpointError(f"{source.name}: nothing in it is known to end {layer}; choose another format")
        zero |= {f"blk.{layer.index}.{leaf}" for leaf in names}
    return [
        GgufPiece(name, tensor.kind, tensor.shape, replaced=tensor)
        if name in zero
        else GgufPiece(name, tensor.kind, tensor.shape, tensor)
        for name, tensor in source.header.tensors.items()
    ]
