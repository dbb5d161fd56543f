"""What a model costs to run: bytes, FLOPs, speed, latency, memory."""
