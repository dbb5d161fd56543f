"""The command line in this process."""

import sys

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
