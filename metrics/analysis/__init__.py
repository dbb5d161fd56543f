"""Similarity and other scores of every layer, from one forward pass."""
