"""The wheel that people install: everything the package needs, and nothing else."""

import configparser
import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import dropformer

ROOT = Path(__file__).parents[1]
NOT_PACKAGE = {"tests", "benchmarks", "docs", "build", "dist", "demo"}


@pytest.fixture(scope="session")
def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def listed(setup, section, key):
    return [line.strip() for line in setup[section][key].splitlines() if line.strip()]


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of what git would hand out: building in it leaves the real one clean."""
    copy_checkout(folder := tmp_path_factory.mktemp("source"))
    return folder


@pytest.fixture(scope="session")
def wheel(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(checkout)]
    if find_spec("setuptools"):  # of the test requirements, so new enough; pip would download it again
        command.append("--no-build-isolation")
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (path,) = out.glob("*.whl")
    return path


def copy_checkout(target):
    """Every file of the checkout but what its .gitignore names or begins with a dot."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name for name in folders
            if not name.startswith(".") and name not in ("build", "dist", "demo", "__pycache__")
            and not name.endswith(".egg-info")
            and not (Path(folder, name) / "pyvenv.cfg").exists()
        ]  # fmt: skip
        inside = target / Path(folder).relative_to(ROOT)
        inside.mkdir(exist_ok=True)
        for name in names:
            (inside / name).write_bytes(Path(folder, name).read_bytes())


@pytest.fixture(scope="session")
def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def test_the_wheel_holds_the_package_and_its_metadata_and_nothing_else(contents):
    tops = {name.split("/")[0] for name in contents}
    assert tops == {"dropformer", f"dropformer-{dropformer.__version__}.dist-info"}


def test_no_test_benchmark_or_document_is_in_the_wheel(contents):
    assert not [name for name in contents if NOT_PACKAGE & set(name.split("/"))]
    assert not [name for name in contents if re.search(r"(^|/)(test_|conftest)", name)]


def test_every_module_and_data_file_of_the_package_is_in_the_wheel(contents, checkout, setup):
    for package in listed(setup, "options", "packages"):
        inside = package.split(".")[1:]
        for path in checkout.joinpath(*inside).iterdir():
            if path.suffix in (".py", ".yaml", ".html", ".typed"):
                assert "/".join(["dropformer", *inside, path.name]) in contents


def test_every_folder_with_code_is_a_listed_package(checkout, setup):
    packages = set(listed(setup, "options", "packages"))
    for path in checkout.rglob("*.py"):
        parts = path.relative_to(checkout).parts[:-1]
        if not NOT_PACKAGE & set(parts[:1]):
            assert ".".join(["dropformer", *parts]) in packages, path.relative_to(checkout)


def test_the_wheel_offers_the_prune_command_its_licence_and_its_types(contents):
    info = f"dropformer-{dropformer.__version__}.dist-info"
    assert b"prune = dropformer.cli:main" in contents[f"{info}/entry_points.txt"]
    assert b"Apache License" in contents[f"{info}/licenses/LICENSE"]
    assert "dropformer/py.typed" in contents


def test_the_wheel_asks_for_what_setup_cfg_lists(contents, setup):
    metadata = contents[f"dropformer-{dropformer.__version__}.dist-info/METADATA"].decode()
    asked = {line.split(":", 1)[1].strip() for line in metadata.splitlines() if line.startswith("Requires-Dist")}
    assert {entry for entry in asked if "extra ==" not in entry} == set(listed(setup, "options", "install_requires"))


def test_what_is_installed_from_the_wheel_imports_away_from_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import dropformer, dropformer.recipes as r;"
        "print(dropformer.__file__, len(r.recipes()))"
    )
    # -S keeps an editable install's import hook out; the dependencies come from PYTHONPATH
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if "site-packages" in path)}
    run = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path / "site")],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    file, count = run.stdout.split()
    assert Path(file).is_relative_to(tmp_path) and int(count) >= 8


REQUIREMENT = re.compile(r"[a-z0-9-]+==[0-9][a-z0-9.]*(; python_version (>=|<) \"3\.11\")?")


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_constraints_are_plain_pins_that_any_machine_can_use():
    assert [line for line in pins() if not REQUIREMENT.fullmatch(line)] == []


def test_every_requirement_is_pinned(setup):
    wanted = [
        *listed(setup, "options", "install_requires"),
        *(line for key in setup["options.extras_require"] for line in listed(setup, "options.extras_require", key)),
    ]
    names = {re.split(r"[<>=!;\[ ]", line)[0].lower().replace("_", "-") for line in wanted}
    assert names <= {line.split("==")[0] for line in pins()}
