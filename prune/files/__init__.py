"""A checkpoint's files at byte level: open, copy, and write a folder atomically.

No tensor is decoded, so every dtype is copied byte for byte, and neither torch nor NumPy is imported.
"""

from dropformer.prune.files.copying import CopyReport, NewTensor, copy_checkpoint
from dropformer.prune.files.folder import new_folder
from dropformer.prune.files.safetensors_header import TensorSpan
from dropformer.prune.files.shards import Checkpoint, Shard, open_checkpoint

__all__ = [
    "Checkpoint",
    "CopyReport",
    "NewTensor",
    "Shard",
    "TensorSpan",
    "copy_checkpoint",
    "new_folder",
    "open_checkpoint",
]
