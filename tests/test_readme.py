"""What the README shows is what the program takes."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

import dropformer
from dropformer.cli import app
from dropformer.prune.spec import parse_spec

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    {
        m.strip()
        for m in re.findall(r"(?:^\$ |`|^)(prune [^`\n#]+)", TEXT, re.M)
        if "SPEC" not in m and m not in ("prune --plan", "prune sweep")  # named, not called
    }
)


def test_the_readme_shows_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_readme_parses(command: str):
    words = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    with group.make_context("prune", list(words)) as context:
        rest = [*context._protected_args, *context.args]
        if rest:
            name, sub, args = group.resolve_command(context, rest)
            assert sub is not None, name
            sub.make_context(name, args, parent=context)
    for spec in re.findall(r"--drop (\S+)", command):
        if ".." not in spec:
            assert parse_spec(spec)


def test_the_python_in_the_readme_names_what_exists():
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "dropformer":
                assert hasattr(dropformer, node.attr)
