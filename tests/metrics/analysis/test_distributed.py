"""Which device each launched process takes."""

import pytest
import torch

from dropformer.metrics.analysis.distributed import own_device
from dropformer.prune.errors import ModelError


@pytest.fixture
def third_of_four(monkeypatch):
    """Process 6 of 8 on two machines of four GPUs: the third of its machine."""
    for name, value in {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("asked", [None, "cuda"])
def test_each_launched_process_takes_the_gpu_of_its_local_rank(third_of_four, monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_device(asked) == "cuda:2"


def test_launched_processes_without_a_gpu_stay_on_the_cpu(third_of_four, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device(None) is None
    assert own_device("cpu") == "cpu"


def test_one_numbered_gpu_for_all_processes_is_refused(third_of_four):
    with pytest.raises(ModelError, match="would put 8 launched processes on one GPU; give --device cuda"):
        own_device("cuda:0")


@pytest.mark.parametrize("asked", [None, "cuda", "cuda:1", "cpu"])
def test_a_process_alone_takes_the_device_that_was_asked_for(monkeypatch, asked):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert own_device(asked) == asked
