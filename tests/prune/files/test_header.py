"""A safetensors header is read byte for byte as upstream reads it, and whatever is wrong costs one line."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from dropformer.prune.errors import CheckpointError
from dropformer.prune.files.safetensors_header import BITS, Header, byte_size, encode_header, read_header

TWO = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


def packed(header: object, data: bytes = b"") -> bytes:
    """A file's bytes: the header as it is if bytes, else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def read(content: bytes) -> Header:
    file = os.memfd_create("shard")
    try:
        os.pwrite(file, content, 0)
        return read_header(file, "model.safetensors", "model.safetensors")
    finally:
        os.close(file)


def refusal(content: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(content)
    message = str(caught.value)
    assert message.startswith("model.safetensors: ") and "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_has_the_size_that_upstream_gives_it(dtype: str) -> None:
    size = byte_size(dtype, [8])
    content = packed({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}, bytes(size))
    [(name, seen)] = deserialize(content)
    assert (name, seen["dtype"], len(seen["data"])) == ("a", dtype, size)
    assert read(content).tensors["a"].dtype == dtype


def test_our_dtypes_are_those_that_upstream_names() -> None:
    with pytest.raises(SafetensorError) as caught:
        deserialize(packed({"a": {**TWO, "dtype": "?"}}, b"12"))
    named = str(caught.value).partition("expected one of")[2].partition(" at line")[0]
    assert set(named.replace("`", "").replace(",", " ").split()) == set(BITS)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cut short"),
        (b"\x02\0\0", "cut short"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "cut short"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "cut short"),
        (packed({"a": TWO}, b"1"), "longer or shorter"),
        (packed({"a": TWO}, b"123"), "longer or shorter"),
        (packed(b"[]"), "expected a JSON object"),
        (packed(b" {}"), "expected a JSON object"),
        (packed(b'{"a":' * 100_000), "nested too deeply"),
        (packed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
        (packed(b'{"a":1,"a":2}'), "occurs twice"),
        (packed(b'{"__metadata__":{"x":NaN}}'), "NaN is not JSON"),
        (packed(b'{"__metadata__":{"x":-Infinity}}'), "-Infinity is not JSON"),
        (packed(b'{"\xff":1}'), "not valid JSON"),
        (packed(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
        (packed({"__metadata__": {"x": 1}}), "not a map of strings"),
        (packed({"__metadata__": []}), "not a map of strings"),
        (packed({"__metadata__": {"\ud800": "x"}}), "Unicode"),
        (packed({"\ud800": TWO}, b"12"), "Unicode"),
        (packed({"a": {**TWO, "dtype": "U3"}}, b"12"), "unknown dtype"),
        (packed({"a": {**TWO, "dtype": ["U8"]}}, b"12"), "unknown dtype"),
        (packed({"a": {**TWO, "shape": [-2]}}, b"12"), "not a dimension"),
        (packed({"a": {**TWO, "shape": [2.0]}}, b"12"), "not a dimension"),
        (packed({"a": {**TWO, "shape": [True, 2]}}, b"12"), "not a dimension"),
        (packed({"a": {**TWO, "shape": [2**63, 2]}}, b"12"), "overflows"),
        (packed({"a": {**TWO, "shape": [2**32, 2**32, 0]}}, b"12"), "overflows"),
        (packed({"a": {**TWO, "shape": [2**64 + 2]}}, b"12"), "not a dimension"),
        (packed({"a": {**TWO, "shape": 2}}, b"12"), "not described"),
        (packed({"a": {**TWO, "more": 2}}, b"12"), "not described"),
        (packed({"a": None}, b"12"), "not described"),
        (packed({"a": {**TWO, "dtype": "F4", "shape": [3]}}, b"12"), "whole bytes"),
        (packed({"a": {**TWO, "shape": [3]}}, b"12"), "needs 3 bytes"),
        (packed({"a": {**TWO, "data_offsets": [2, 0]}}, b"12"), "needs 2 bytes"),
        (packed({"a": {**TWO, "data_offsets": [-2, 0]}}, b"12"), "needs 2 bytes"),
        (packed({"a": {**TWO, "data_offsets": [0, 2, 2]}}, b"12"), "bad data_offsets"),
        (packed({"a": {**TWO, "data_offsets": [False, 2]}}, b"12"), "bad data_offsets"),
        (packed({"a": TWO, "b": TWO}, b"12"), "overlaps"),
        (packed({"a": TWO, "b": {**TWO, "data_offsets": [1, 3]}}, b"123"), "overlaps"),
        (packed({"a": TWO, "b": {**TWO, "data_offsets": [3, 5]}}, b"12345"), "hole"),
        (packed({"a": {**TWO, "data_offsets": [1, 3]}}, b"123"), "hole"),
        (packed({"a\nb" * 500: None}), "not described"),
    ],
)
def test_a_wrong_header_is_refused_in_one_line(content: bytes, expected: str) -> None:
    assert expected in refusal(content)


def test_a_header_we_encode_reads_back_and_is_aligned_as_upstream_aligns_it() -> None:
    tensors = [("b", "BF16", (3, 2)), ("é\n", "F32", ()), ("empty", "U8", (0, 4))]
    header = encode_header(tensors, {"format": "pt"})
    seen = read(header + bytes(16))
    assert len(header) % 8 == 0 and header.rstrip(b" ").endswith(b"}")
    assert [(name, span.dtype, span.shape) for name, span in seen.tensors.items()] == tensors
    assert seen.metadata == {"format": "pt"}
    assert {name for name, _ in deserialize(header + bytes(16))} == {"b", "é\n", "empty"}


@given(phase=st.integers(0, 511).map(lambda eighth: eighth * 8))
def test_a_header_fills_the_page_to_where_the_bytes_want_to_start(phase: int) -> None:
    header = encode_header([("a", "U8", (1,))], {}, phase)
    assert len(header) % 4096 == phase and len(header) < 2 * 4096
    assert read(header + b"1").tensors["a"].start == len(header)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**65) | st.floats() | st.sampled_from([*BITS, "", "x"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)
NUMBER = st.integers(-1, 9) | JSON
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F4", "BF16", "F6_E2M3"]) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | st.lists(NUMBER, max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(0, 8), st.integers(0, 8)) | st.lists(NUMBER, max_size=3) | JSON,
    }
)
HEADER = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRY | JSON, max_size=4)
GOOD = packed({"__metadata__": {"k": "v"}, "a": TWO, "b": {**TWO, "data_offsets": [2, 4]}}, b"1234")


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good file with a few bytes overwritten, inserted or cut off."""
    content = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        cut = draw(st.integers(0, 3))
        content[at : at + cut] = draw(st.binary(max_size=3) | st.sampled_from([b'"', b"{", b"0", b"1e1", b"]"]))
    return bytes(content)


@settings(max_examples=400, deadline=None)
@given(content=st.builds(packed, HEADER, st.binary(max_size=9)) | damaged() | st.binary(max_size=40))
def test_any_bytes_are_refused_in_one_line_or_read_as_upstream_reads_them(content: bytes) -> None:
    try:
        header = read(content)
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        return
    if b"-0" in content:  # upstream refuses to call it an integer
        return
    seen = {name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"])) for name, tensor in deserialize(content)}
    assert seen == {
        name: (span.dtype, list(span.shape), content[span.start : span.end]) for name, span in header.tensors.items()
    }


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.tuples(st.sampled_from(sorted(BITS)), st.integers(0, 3)), max_size=6))
def test_any_good_file_is_accepted(sizes: list[tuple[str, int]]) -> None:
    tensors = [(f"t{index}", dtype, (count, 8)) for index, (dtype, count) in enumerate(sizes)]
    data = os.urandom(sum(byte_size(dtype, shape) for _, dtype, shape in tensors))
    content = encode_header(tensors, {}) + data
    assert {(name, span.dtype, span.shape) for name, span in read(content).tensors.items()} == set(tensors)
    assert len(deserialize(content)) == len(tensors)


def test_a_shard_that_reads_is_the_length_of_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    file = os.open(path, os.O_RDONLY)
    spans = read_header(file, path.name, path).tensors.values()
    os.close(file)
    assert [path.read_bytes()[span.start : span.end] for span in spans] == [b"12", b"34"]
