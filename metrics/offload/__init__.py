"""Weights and streams that do not fit in memory."""
