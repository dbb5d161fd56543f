"""Removing branches and blocks from a model and its config."""
