"""Text for attentions that see a window."""

import pytest
import torch


@pytest.fixture
def batch():
    """Token ids [2, 23] and which of them are real: the second row is padded on the left."""
    ids = torch.randint(3, 64, (2, 23), generator=torch.Generator().manual_seed(3))
    real = torch.ones(2, 23, dtype=torch.bool)
    real[1, :9] = False
    return ids, real
