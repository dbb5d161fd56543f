"""A cache of its own for every test, and tiny real GGUF files."""

from types import SimpleNamespace

import pytest
from tiny_gguf import MERGES, tensors_of, tiny_llama, vocabulary, write_gguf


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    """Every test has a cache of its own, except those with the real model, which is downloaded once."""
    if request.node.get_closest_marker("real") is None:
        monkeypatch.setenv("DROPFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The makers of tiny GGUF files."""
    return SimpleNamespace(llama=tiny_llama, write=write_gguf, tensors=tensors_of, vocabulary=vocabulary, merges=MERGES)
