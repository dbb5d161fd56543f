"""Text becomes the same windows every time, from any source."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.text import documents
from dropformer.metrics.calibration.windows import windows
from dropformer.prune.errors import CalibrationError


class Letters:
    """A tokenizer for tests: one token a character, a BOS of 1 where asked."""

    pad_token_id = 0

    def __init__(self, bos: bool = False) -> None:
        self.bos_token_id = 1 if bos else None

    def __call__(self, text, add_special_tokens=True, truncation=False, max_length=None, **_):
        ids = [ord(c) % 1000 + 2 for c in text]
        if add_special_tokens and self.bos_token_id:
            ids = [1, *ids]
        return {"input_ids": ids[:max_length] if truncation else ids}


TEXTS = ["one document. " * 20, "another, of some length. " * 30, "short"]


def write(folder, kind):
    path = folder / f"text.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t, "url": "x"}) + "\n" for t in TEXTS), encoding="utf-8")
    else:
        pq.write_table(pa.table({"text": TEXTS, "id": [1, 2, 3]}), path)
    return str(path)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_packed_windows(kind, tmp_path):
    made = windows(Calibration(write(tmp_path, kind), samples=5, length=64), Letters())
    other = windows(Calibration(write(tmp_path, "txt"), samples=5, length=64), Letters())
    assert made.ids.shape == (5, 64)
    assert torch.equal(made.ids, other.ids)


def test_rows_are_documents_and_a_txt_is_one(tmp_path):
    assert list(documents(write(tmp_path, "jsonl"))) == list(documents(write(tmp_path, "parquet"))) == TEXTS
    assert len(list(documents(write(tmp_path, "txt")))) == 1


def test_builtin_needs_no_file_and_shares_no_document_with_the_held_out_text():
    builtin, held_out = set(documents("builtin")), set(documents("heldout"))
    assert len(builtin) > 20 and len(held_out) > 5 and not builtin & held_out


def test_the_seed_chooses_the_windows_and_nothing_else_does(tmp_path):
    def make(seed):
        return windows(Calibration(write(tmp_path, "txt"), samples=4, length=32, seed=seed), Letters())

    assert make(0).ref == make(0).ref and torch.equal(make(0).ids, make(0).ids)
    assert make(0).ref.hash != make(1).ref.hash


def test_the_hash_tells_skipped_tokens_apart(tmp_path):
    path = write(tmp_path, "txt")
    made = [windows(Calibration(path, samples=4, length=32, skip_first=n), Letters()) for n in (0, 4)]
    assert made[0].ref.hash != made[1].ref.hash
    assert made[1].scored.sum(1).tolist() == [28] * 4 and not made[1].scored[:, :4].any()


def test_every_packed_window_begins_with_bos_where_the_tokenizer_adds_one(tmp_path):
    made = windows(Calibration(write(tmp_path, "txt"), samples=4, length=32), Letters(bos=True))
    assert (made.ids[:, 0] == 1).all() and (made.ids[:, 1:] != 1).all()
    assert made.padding.all()


def test_one_document_a_window_is_padded_and_padding_is_not_scored(tmp_path):
    path = write(tmp_path, "jsonl")
    made = windows(Calibration(path, samples=3, length=400, packed=False), Letters())
    assert sorted(made.padding.sum(1).tolist()) == sorted(min(400, len(t)) for t in TEXTS)
    assert torch.equal(made.scored, made.padding)
    assert (made.ids[~made.padding] == 0).all()


def test_the_mask_is_given_only_where_a_window_is_padded(tmp_path):
    path = write(tmp_path, "jsonl")
    ragged = windows(Calibration(path, samples=3, length=400, packed=False), Letters())
    assert all(("attention_mask" in inputs) == (not mask.all()) for inputs, mask in ragged.batches(1))
    packed = windows(Calibration(path, samples=3, length=32), Letters())
    assert not any("attention_mask" in inputs for inputs, _ in packed.batches(2))


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 7), samples=st.integers(1, 6))
def test_batches_are_the_windows_in_order(size, samples):
    made = windows(Calibration("heldout", samples=samples, length=16), Letters())
    parts = [inputs["input_ids"] for inputs, _ in made.batches(size)]
    assert torch.equal(torch.cat(parts), made.ids)


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        (Calibration("nothing.txt"), "does not exist"),
        (Calibration("something.docx"), "unknown"),
        (Calibration("heldout", samples=10**6, length=512), "were asked for"),
        (Calibration("heldout", samples=0), "at least 1 window"),
        (Calibration("heldout", length=8, skip_first=8), "fewer skipped tokens"),
    ],
)
def test_too_little_or_unknown_text_is_one_line(calibration, says):
    with pytest.raises(CalibrationError, match=says) as raised:
        windows(calibration, Letters())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"txt": 1}\n', "line 2"),
        ("bad.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("bad.parquet", b"not parquet", "cannot be read"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2"),
        ("half.jsonl", b'{"text": "a"}\n{"text": "\\ud83d a"}\n', "line 2: half of a surrogate pair"),
        ("number.jsonl", b'{"text": 7}\n', "line 1"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(name, data, says, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CalibrationError, match=says) as raised:
        windows(Calibration(str(tmp_path / name)), Letters())
    assert name in str(raised.value) and "\n" not in str(raised.value)
