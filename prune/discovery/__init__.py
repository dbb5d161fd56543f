"""A model's structure, read from one traced forward pass and proven by dropping."""
