"""Checkpoint formats: how a pruned model is written."""
