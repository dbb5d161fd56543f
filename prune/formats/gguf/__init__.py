"""GGUF files: read, prune and write without dequantizing."""
