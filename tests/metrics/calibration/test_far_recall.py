"""Long texts that ask at their end for what was said long before."""

import pytest
import torch

from dropformer.metrics.calibration.far_recall import far_recall


class Letters:
    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize(("length", "tail"), [(4000, 128), (600, 60), (200, 4)])
def test_the_end_asks_for_facts_and_repeats_passages_of_the_text_before(length, tail):
    body = torch.arange(1000, 1000 + length)
    ids = far_recall(body, Letters(), tail)
    assert len(ids) == length
    end = ids[-(tail // 2) :].tolist()
    assert {i for i in end if i >= 1000} <= set(ids[:-tail].tolist())
    assert ids[-tail] == ids[-tail - 1] + 1  # prose goes on into the end
    if tail > 100:
        asked, said = (
            "".join(chr(i) if i < 1000 else "" for i in part.tolist()) for part in (ids[-tail:], ids[:-tail])
        )
        name = asked.split("does ")[1].split(" keep")[0]
        key = asked.split(f"does {name} keep? Key ")[1][:4]
        assert f"{name} keeps key {key} at" in said
