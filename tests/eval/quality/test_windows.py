import json

import pytest
import torch

from dropformer.eval.quality.windows import text_windows
from dropformer.prune.errors import EvaluationError


def test_windows_cover_the_text_in_order_without_overlap(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("the bone supplies the heart and a nerve. " * 40, encoding="utf-8")
    got = text_windows(str(path), tokenizer, length=32)
    whole = tokenizer(path.read_text(encoding="utf-8") + "\n\n", add_special_tokens=False)["input_ids"]
    assert got.shape == (len(whole) // 32, 32)
    assert got.flatten().tolist() == whole[: got.numel()]
    assert torch.equal(text_windows(str(path), tokenizer, length=32, limit=3), got[:3])


def test_short_documents_are_laid_end_to_end(tmp_path, tokenizer):
    path = tmp_path / "text.jsonl"
    rows = [{"text": f"heart number {i}"} for i in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    got = tokenizer.decode(text_windows(str(path), tokenizer, length=16).flatten())
    assert got.startswith("heart number 0\n\nheart number 1\n\nheart")


def test_every_window_begins_with_the_bos_token_of_a_tokenizer_that_adds_one(tmp_path, tiny):
    path = tmp_path / "text.txt"
    path.write_text("the bone supplies the heart. " * 40, encoding="utf-8")
    with_bos, without = tiny.tokenizer(bos=True), tiny.tokenizer()
    got = text_windows(str(path), with_bos, length=17)
    assert (got[:, 0] == with_bos.bos_token_id).all()
    plain = text_windows(str(path), without, length=16)
    assert torch.equal(got[:, 1:], plain[: len(got)])


@pytest.mark.parametrize(("name", "length", "says"), [("no-such-text", 8, "unknown"), ("heldout", 10**7, "shorter")])
def test_a_text_that_gives_no_window_is_refused(tokenizer, name, length, says):
    with pytest.raises(EvaluationError, match=says):
        text_windows(name, tokenizer, length=length)
