"""Speculative decoding with a pruned draft: cost of steps, acceptance, measured tokens per second."""
