"""Acceptance of a draft's tokens by the dense model, and the search for the fastest draft."""
