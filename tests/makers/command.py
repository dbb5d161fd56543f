"""The command line in this process."""

import sys
from pathlib import Path

from dropformer import cli


def run(*args, capsys) -> tuple[int, str, str]:
    """Exit status, stdout, stderr of `prune` with these arguments."""
    sys.argv = ["prune", *map(str, args)]
    try:
        cli.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def bad(*args, capsys, here: Path, said: str) -> None:
    """A wrong call is one line and exit status 2, and leaves nothing behind in `here` but the cache."""
    before = _files(here)
    status, out, err = run(*args, capsys=capsys)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert said in err and "Traceback" not in err, err
    assert _files(here) == before


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if "cache" not in path.parts)
