"""Inference engines: which of them loads a pruned checkpoint, how, and what it saves there."""
