"""Checkpoints side by side: redundancy across training and between variants."""
