"""A copied checkpoint holds exactly the kept tensors, byte for byte, and nothing is written anywhere else."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from dropformer.prune.errors import CheckpointError, OutputError, VerificationError
from dropformer.prune.files import Checkpoint, NewTensor, byteranges, copy_checkpoint, open_checkpoint
from dropformer.prune.files.safetensors_header import BITS, byte_size, encode_header

INDEX = "model.safetensors.index.json"
Tensor = tuple[str, tuple[int, ...], bytes]


def write(folder: Path, shards: list[dict[str, Tensor]], **metadata: str) -> Checkpoint:
    """A checkpoint of these raw tensors, its headers written by us and checked by upstream in `held`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    names = [f"part-{number}.safetensors" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        header = encode_header([(key, dtype, shape) for key, (dtype, shape, _) in shard.items()], metadata)
        (folder / name).write_bytes(header + b"".join(data for _, _, data in shard.values()))
    placed = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    text = {"metadata": {"total_size": 1, "total_parameters": 2, "note": "kept"}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(text))
    return open_checkpoint(folder)


def held(folder: Path, aligned: bool = True) -> dict[str, Tensor]:
    """Every tensor of a folder as the safetensors library finds it, and as the index places it."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        base = 8 + int.from_bytes(content[:8], "little")
        with safe_open(path, "np") as file:
            names = set(file.keys())
        table = json.loads(content[8:base])
        assert names == table.keys() - {"__metadata__"} and not found.keys() & names
        for name in names:
            start, end = table[name]["data_offsets"]
            assert not aligned or start % max(BITS[table[name]["dtype"]] // 8, 1) == 0
            found[name] = (table[name]["dtype"], tuple(table[name]["shape"]), content[base + start : base + end])
        if (folder / INDEX).exists():
            placed = json.loads((folder / INDEX).read_text())["weight_map"]
            assert {name for name, shard in placed.items() if shard == path.name} == names
    return found


def tensor(dtype: str = "F32", shape: tuple[int, ...] = (3, 8)) -> Tensor:
    return dtype, shape, os.urandom(byte_size(dtype, shape))


def blocks(shards: int = 3, per_shard: int = 4, shape: tuple[int, ...] = (3, 8)) -> list[dict[str, Tensor]]:
    count = shards * per_shard
    made = {f"layers.{number}.weight": tensor(shape=shape) for number in range(count)}
    names = list(made)
    return [{name: made[name] for name in names[i : i + per_shard]} for i in range(0, count, per_shard)]


def joined(shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: value for shard in shards for name, value in shard.items()}


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(name: str) -> str:
    return name


def test_dropping_nothing_gives_the_same_bytes_as_upstream_wrote(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    (tmp_path / "config.json").write_text("{}")
    arrays = {"b": draw.random((5, 3), dtype="f4"), "a": draw.integers(0, 9, 7, dtype="i1"), "c": draw.random(2)}
    save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
    copy_checkpoint(open_checkpoint(tmp_path), tmp_path / "out", same, verify="all")
    copied = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert copied == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_passes_byte_for_byte(dtype: str, tmp_path: Path) -> None:
    shards = [{"a": tensor(dtype), "b": tensor(dtype), "c": tensor(dtype, (0, 8)), "d": tensor(dtype)}]
    copy_checkpoint(write(tmp_path / "in", shards), tmp_path / "out", lambda name: None if name == "b" else name)
    assert held(tmp_path / "out") == {name: value for name, value in shards[0].items() if name != "b"}


def test_shards_left_empty_vanish_and_the_others_are_numbered_anew(tmp_path: Path) -> None:
    shards = blocks()
    source = write(tmp_path / "in", shards, format="pt", origin="here")
    report = copy_checkpoint(source, tmp_path / "out", lambda name: None if name in shards[1] else name)
    assert report.files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX)
    assert held(tmp_path / "out") == {**shards[0], **shards[2]}
    assert (report.tensors_kept, report.tensors_dropped) == (8, 4)
    assert (report.bytes_kept, report.bytes_dropped) == (8 * 96, 4 * 96)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 8 * 96, "note": "kept"}
    with safe_open(tmp_path / "out" / report.files[0], "np") as file:
        assert file.metadata() == {"format": "pt", "origin": "here"}


def test_one_shard_left_is_called_model_and_needs_no_index(tmp_path: Path) -> None:
    shards = blocks()
    report = copy_checkpoint(
        write(tmp_path / "in", shards), tmp_path / "out", lambda name: name if name in shards[2] else None
    )
    assert report.files == ("model.safetensors",) and listing(tmp_path / "out") == ["model.safetensors"]
    assert held(tmp_path / "out") == shards[2]


def test_names_are_changed_and_their_bytes_are_not(tmp_path: Path) -> None:
    shards = blocks()
    copy_checkpoint(write(tmp_path / "in", shards), tmp_path / "out", lambda name: f"model.{name}")
    assert held(tmp_path / "out") == {f"model.{name}": value for name, value in joined(shards).items()}


def test_replacements_take_the_place_of_tensors_or_come_on_top(tmp_path: Path) -> None:
    shards = blocks()
    new = np.arange(5, dtype=np.int8)
    replace = {
        "layers.1.weight": NewTensor("BF16", (2, 3), b"123456789012"),
        "extra": NewTensor("I8", new.shape, new),
        "void": NewTensor("F32", (0, 3), np.zeros((0, 3), "f4")),
    }
    report = copy_checkpoint(
        write(tmp_path / "in", shards), tmp_path / "out", same, replace=replace, verify="all", link=True
    )
    assert held(tmp_path / "out") == {
        **joined(shards),
        "layers.1.weight": ("BF16", (2, 3), b"123456789012"),
        "extra": ("I8", (5,), new.tobytes()),
        "void": ("F32", (0, 3), b""),
    }
    assert (report.tensors_kept, report.tensors_replaced) == (11, 3)
    assert len(report.linked) == 1


def test_a_replacement_that_breaks_alignment_moves_behind_what_needs_it(tmp_path: Path) -> None:
    source = write(tmp_path / "in", blocks(shards=1))
    copy_checkpoint(source, tmp_path / "out", same, replace={"layers.0.weight": NewTensor("U8", (3,), b"123")})
    assert held(tmp_path / "out")["layers.0.weight"] == ("U8", (3,), b"123")  # `held` checks alignment


def test_a_replacement_of_the_wrong_size_is_the_callers_mistake(tmp_path: Path) -> None:
    source = write(tmp_path / "in", blocks())
    with pytest.raises(ValueError, match="takes 4 bytes, not 3"):
        copy_checkpoint(source, tmp_path / "out", same, replace={"x": NewTensor("U8", (4,), b"123")})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rename", [lambda _: "one", lambda _: "__metadata__", lambda _: None])
def test_names_that_collide_and_a_copy_of_nothing_are_refused(rename, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        copy_checkpoint(write(tmp_path / "in", blocks()), tmp_path / "out", rename)
    assert not (tmp_path / "out").exists()


def test_unchanged_shards_are_linked_and_changed_ones_copied(tmp_path: Path) -> None:
    shards = blocks()
    source = write(tmp_path / "in", shards)
    done: list[tuple[int, int]] = []
    report = copy_checkpoint(
        source,
        tmp_path / "out",
        lambda name: None if name == "layers.5.weight" else name,
        link=True,
        progress=lambda *at: done.append(at),
    )
    assert report.linked == (report.files[0], report.files[2])
    inodes = [(tmp_path / "out" / name).stat().st_ino for name in report.files[:3]]
    assert [inode in {path.stat().st_ino for path in (tmp_path / "in").iterdir()} for inode in inodes] == [
        True,
        False,
        True,
    ]
    assert done[-1] == (11 * 96, 11 * 96)
    expected = joined(shards)
    del expected["layers.5.weight"]
    assert held(tmp_path / "out") == expected


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system")
def test_links_across_file_systems_become_copies(tmp_path: Path) -> None:
    target = Path("/dev/shm") / f"dropformer-test-{os.getpid()}"
    if target.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system")
    shards = blocks()
    try:
        report = copy_checkpoint(write(tmp_path / "in", shards), target, same, link=True)
        assert report.linked == () and held(target) == joined(shards)
    finally:
        for path in target.iterdir():
            path.unlink()
        target.rmdir()


def test_a_folder_that_holds_a_checkpoint_is_not_mixed_with_another(tmp_path: Path) -> None:
    source = write(tmp_path / "in", blocks())
    before = listing(tmp_path / "in")
    with pytest.raises(OutputError, match="there is a checkpoint already"):
        copy_checkpoint(source, tmp_path / "in", same)
    assert listing(tmp_path / "in") == before


def test_long_runs_in_and_out_of_phase_are_copied_whole(tmp_path: Path) -> None:
    shapes = [(1 << 18, 5), (3,), (1 << 18, 3), (1,), (1 << 18, 4)]
    shard = {f"t{number}": tensor(shape=shape) for number, shape in enumerate(shapes)}
    source = write(tmp_path / "in", [shard])
    copy_checkpoint(source, tmp_path / "out", lambda name: None if name in {"t1", "t3"} else name, verify="all")
    assert held(tmp_path / "out") == {name: shard[name] for name in ("t0", "t2", "t4")}


def test_the_kernel_is_asked_for_whole_blocks_so_that_it_may_share_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in", blocks(shards=1, shape=(65536,)))
    asked: list[tuple[int, int]] = []
    copy = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda s, t, n, *at: asked.append(at) or copy(s, t, n, *at))
    copy_checkpoint(source, tmp_path / "out", lambda name: None if name == "layers.1.weight" else name)
    assert len(asked) == 4  # two runs, each with what comes before its first whole block
    assert all((start - at) % 4096 == 0 for start, at in asked)
    assert all(at % 65536 == 0 for _, at in asked[1::2])


def test_a_kernel_without_copy_file_range_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    shards = blocks(shape=(300_000,))
    source = write(tmp_path / "in", shards)
    monkeypatch.setattr(os, "copy_file_range", refuse)
    copy_checkpoint(source, tmp_path / "out", lambda name: None if name == "layers.1.weight" else name)
    assert held(tmp_path / "out") == {k: v for k, v in joined(shards).items() if k != "layers.1.weight"}


def test_a_source_cut_short_meanwhile_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in", blocks(shape=(3000,)))
    copy = os.copy_file_range

    def cut_then_copy(*arguments: int) -> int:
        os.truncate(source.shards["part-2.safetensors"].path, 500)
        return copy(*arguments)

    monkeypatch.setattr(os, "copy_file_range", cut_then_copy)
    with pytest.raises(CheckpointError, match=r"start again"):
        copy_checkpoint(source, tmp_path / "out", same)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verify", ["sample", "all"])
def test_bytes_copied_from_the_wrong_place_are_found(verify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in", blocks(shape=(30_000,)))
    copy = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda s, t, n, start, at: copy(s, t, n, max(start - 8, 0), at))
    with pytest.raises(VerificationError, match="nothing is kept"):
        copy_checkpoint(source, tmp_path / "out", same, verify=verify)
    assert not (tmp_path / "out").exists()


def test_verifying_all_finds_one_flipped_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in", blocks(shards=1, per_shard=1, shape=(30_000,)))
    copy = byteranges.copy_range

    def copy_and_flip(start_file: int, target: int, start: int, at: int, length: int, moved) -> bool:
        done = copy(start_file, target, start, at, length, moved)
        byte = os.pread(target, 1, at + 77_777)
        os.pwrite(target, bytes([byte[0] ^ 1]), at + 77_777)
        return done

    monkeypatch.setattr("dropformer.prune.files.copying.copy_range", copy_and_flip)
    with pytest.raises(VerificationError):
        copy_checkpoint(source, tmp_path / "out", same, verify="all")


DTYPE = st.sampled_from(["BOOL", "F8_E4M3", "BF16", "F32", "I64", "F4"])
SHAPE = st.sampled_from([(), (0,), (8,), (2, 8), (1, 1024), (3, 40, 8)]).map(lambda shape: (*shape, 2))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_drop_renaming_and_replacement_gives_what_was_asked_for(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.mktemp("copy")
    sizes = data.draw(st.lists(st.lists(st.tuples(DTYPE, SHAPE), min_size=1, max_size=5), min_size=1, max_size=4))
    shards = [{f"s{i}.t{j}": tensor(*kind) for j, kind in enumerate(shard)} for i, shard in enumerate(sizes)]
    names = {
        old: data.draw(st.sampled_from([old, old, old, f"new.{old}", f"é{old}\n", None])) for old in joined(shards)
    }
    pool = [*[name for name in names.values() if name], "extra"]
    chosen = data.draw(st.lists(st.sampled_from(pool), max_size=2, unique=True))
    replace = {name: NewTensor(*tensor(data.draw(DTYPE), data.draw(SHAPE))) for name in chosen}
    expected = {new: joined(shards)[old] for old, new in names.items() if new} | {
        k: tuple(v) for k, v in replace.items()
    }
    source = write(base / "in", shards)
    before = {path.name: path.read_bytes() for path in (base / "in").iterdir()}
    link, verify = data.draw(st.booleans()), data.draw(st.sampled_from(["sample", "all"]))
    try:
        report = copy_checkpoint(source, base / "out", names.get, replace=replace, link=link, verify=verify)
    except OutputError:
        assert not expected and listing(base) == ["in"]
        return
    assert held(base / "out", aligned=not report.linked) == expected  # a link is as the source was
    assert listing(base) == ["in", "out"] and listing(base / "out") == sorted(report.files)
    assert report.tensors_kept + report.tensors_replaced == len(expected)
    assert {path.name: path.read_bytes() for path in (base / "in").iterdir()} == before


COPY = """
import sys
from dropformer.prune.files import copy_checkpoint, new_folder, open_checkpoint
from dropformer.prune.errors import DropformerError
source, out = sys.argv[1:]
{before}
try:
    with new_folder(out) as folder:
        copy_checkpoint(open_checkpoint(source), folder, lambda name: name)
except DropformerError as error:
    print(type(error).__name__, error)
{after}
"""


def run_copy(source: Path, out: Path, before: str = "", after: str = "", prefix: tuple[str, ...] = ()) -> str:
    code = COPY.format(before=before, after=after)
    run = subprocess.run(
        [*prefix, sys.executable, "-c", code, str(source), str(out)], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("limit", [100, 50_000, 200_000])
def test_a_file_that_may_not_grow_further_ends_in_one_line_and_nothing(limit: int, tmp_path: Path) -> None:
    write(tmp_path / "in", blocks(shards=2, shape=(30_000,)))
    before = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    said = run_copy(tmp_path / "in", tmp_path / "out", before)
    assert said.startswith("OutputError") and "free some space" in said and said.count("\n") == 1
    assert listing(tmp_path) == ["in"]


def test_a_full_disk_ends_in_one_line_and_nothing(tmp_path: Path) -> None:
    write(tmp_path / "in", blocks(shards=2, shape=(300_000,)))
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(["unshare", "-m", *mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    script = f'{" ".join(mount)} && exec "$@"'
    said = run_copy(
        tmp_path / "in",
        tmp_path / "disk" / "out",
        after="import os; print(os.listdir(os.path.dirname(out)))",
        prefix=("unshare", "-m", "sh", "-c", script, "sh"),
    )
    assert said.startswith("OutputError") and "No space left on device" in said and said.endswith("\n[]\n")


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    shape = (32, 1 << 20)
    folder = tmp_path / "in"
    write(folder, [{"small": tensor()}])
    (folder / INDEX).unlink()
    size = byte_size("F32", shape)
    header = encode_header([("big", "F32", shape)], {})
    (folder / "model.safetensors").write_bytes(header)
    os.truncate(folder / "model.safetensors", len(header) + size)  # a hole: no disk is used
    after = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    peak = int(run_copy(folder, tmp_path / "out", after=after)) / 1024
    (tmp_path / "out" / "model.safetensors").unlink()
    assert peak < 64 < size / 2**20
