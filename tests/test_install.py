"""The package from a checkout, an editable install and a wheel, from any folder."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments, cwd=ROOT, env=None):
    done = subprocess.run(
        list(map(str, arguments)),
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = "import hatchling.build as b, sys; print(b.build_wheel(sys.argv[1]))"
    name = run(sys.executable, "-c", build, folder).split()[-1]
    return folder / name


@pytest.fixture(scope="module", params=["checkout", "editable", "wheel"])
def installed(request, tmp_path_factory):
    """Returns a Python that has the package in one of three ways, and its script."""
    folder = tmp_path_factory.mktemp(request.param) / "env"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python, script = folder / "bin" / "python", folder / "bin" / "split-lightning"
    site = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])").strip()
    )
    # What the package depends on comes from the environment of the tests, but not the
    # package itself: only this file decides where that is found.
    depends = site / "depends"
    depends.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "split_lightning" not in path.name:
            (depends / path.name).symlink_to(path)
    (site / "depends.pth").write_text(str(depends))
    if request.param == "checkout":
        return python, script, {"PYTHONPATH": str(ROOT)}
    source = ["-e", ROOT]
    if request.param == "wheel":
        source = [request.getfixturevalue("wheel")]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run(*pip, "--no-deps", "--no-build-isolation", "--no-index", *source)
    return python, script, {"PYTHONPATH": ""}


@pytest.mark.parametrize(
    ("installed", "how"),
    [
        ("checkout", "module"),  # has no script
        ("editable", "script"),
        ("wheel", "module"),
        ("wheel", "script"),
    ],
    indirect=["installed"],
)
def test_runs_from_any_folder(request, installed, how, tmp_path):
    python, script, env = installed
    is_wheel = "wheel-" in request.node.name
    start = (
        [python, "-m", "split_lightning.train"]
        if how == "module"
        else [script, "train"]
    )
    found = run(
        python,
        "-c",
        "import importlib.util as u; print(u.find_spec('split_lightning').origin)",
        cwd=tmp_path,
        env=env,
    )
    assert (Path(found.strip()).parent.parent == ROOT) != is_wheel
    printed = run(
        *start, "rounds=1", "trainer.fast_dev_run=true", cwd=tmp_path, env=env
    )
    assert "test accuracy" in printed
    (results,) = tmp_path.glob("runs/digits/*/results.json")
    assert json.loads(results.read_text())["uplink_bytes"] > 0


def test_the_wheel_ships_all_modules_the_configuration_and_its_types(wheel):
    names = run(sys.executable, "-m", "zipfile", "-l", wheel)
    for path in (ROOT / "split_lightning").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"split_lightning/conf/{path.relative_to(ROOT / 'conf')}" in names
    assert "split_lightning/py.typed" in names
    assert "licenses/LICENSE" in names
    assert "tests/" not in names


def test_the_source_distribution_has_the_documentation(tmp_path):
    build = "import hatchling.build as b, sys; print(b.build_sdist(sys.argv[1]))"
    name = run(sys.executable, "-c", build, tmp_path).split()[-1]
    with tarfile.open(tmp_path / name) as archive:
        names = {member.partition("/")[2] for member in archive.getnames()}
    folders = ("docs", "conf", "notebooks", "split_lightning", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.[mpy]*")]
    kept = {str(file.relative_to(ROOT)) for file in files if file.suffix != ".pyc"}
    assert {name for name in kept if "__pycache__" not in name} <= names
    assert {"README.md", "CHANGELOG.md", "LICENSE"} <= names
