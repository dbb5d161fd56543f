"""What the package promises: its public names are typed, its folders small, and the pages tell the tree as it is."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import dropformer

ROOT = Path(__file__).parents[1]
PARTS = ("prune", "metrics", "recipes", "eval")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def folders():
    """Every folder with modules of the package, the root apart."""
    return sorted({path.parent.relative_to(ROOT) for part in PARTS for path in (ROOT / part).rglob("*.py")})


def modules(*parts):
    """Every Python file at the root and in the given folders."""
    return [*ROOT.glob("*.py"), *(path for part in parts for path in (ROOT / part).rglob("*.py"))]


def test_no_folder_holds_more_than_fourteen_modules():
    """Of the library, the tests, the benchmarks and the pages alike."""
    count = Counter(str(path.parent.relative_to(ROOT)) for path in modules(*PARTS, "tests", "benchmarks", "docs"))
    assert {folder: n for folder, n in count.items() if n > 14} == {}


def test_no_file_of_the_library_or_of_the_benchmarks_is_longer_than_three_hundred_lines():
    files = modules(*PARTS, "benchmarks")
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: n for name, n in lines.items() if n > 300} == {}


def test_the_tests_mirror_the_folders_of_the_library():
    tested = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert {str(folder) for folder in tested} - {str(folder) for folder in folders()} == {".", "benchmarks"}


def test_what_pruned_checkpoints_carry_is_told_alike_by_the_writer_and_by_the_code_itself():
    from dropformer.prune.formats.writing import CODE, LOADING, MLX_FILE
    from dropformer.prune.loading import modeling

    assert {modeling.CODE_FILE: "modeling.py"} | {name: name for name in modeling.COMPANIONS} == CODE
    assert modeling.MLX_FILE == MLX_FILE and (LOADING.with_name("engines") / MLX_FILE).exists()


def test_the_architecture_page_names_every_folder():
    missing = [f"{folder}/" for folder in folders() if f"`{folder}/`" not in PAGE]
    assert missing == []


def test_the_architecture_page_names_no_file_or_folder_that_there_is_not():
    named = re.findall(r"`((?:prune|metrics|recipes|eval|tests|docs)/[\w./]*)`", PAGE)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readmes_tree_is_the_real_one():
    tree = README.split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"(?:^|\s)([a-z][\w/]*)/(?=\s)", tree))
    there = {str(folder) for folder in folders() if len(folder.parts) <= 2} | {"tests", "benchmarks", "docs"}
    assert named == there


def test_the_index_of_the_docs_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == pages


def test_every_public_name_can_be_had():
    assert [name for name in dropformer.__all__ if getattr(dropformer, name) is None] == []
    with pytest.raises(AttributeError, match="no attribute 'analyse_typo'"):
        _ = dropformer.analyse_typo


@pytest.mark.slow
def test_a_type_checker_knows_the_public_names_and_no_others(tmp_path):
    """As an installed package is checked: through a folder of links under the package's name."""
    pytest.importorskip("mypy", reason="of the development requirements")
    package = tmp_path / "dropformer"
    package.mkdir()
    for path in (*ROOT.glob("*.py"), ROOT / "py.typed", *(ROOT / part for part in PARTS)):
        (package / path.name).symlink_to(path)
    (tmp_path / "two.py").write_text(
        "import dropformer\nreveal_type(dropformer.analyze)\ndropformer.analyse_typo\n"
        "reveal_type(dropformer.save)\nreveal_type(dropformer.open_model)\n"
    )
    options = ("--follow-imports=silent", "--ignore-missing-imports", "--cache-dir", str(ROOT / "build" / "mypy-two"))
    command = [sys.executable, "-m", "mypy", *options, "two.py"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False).stdout
    assert 'Module has no attribute "analyse_typo"' in said, said
    revealed = re.findall(r"Revealed type is \"(.*)\"", said)
    assert len(revealed) == 3 and not [kind for kind in revealed if kind.endswith("-> Any")], said
