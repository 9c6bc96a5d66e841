"""The commands that a user types."""

import pkgutil
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent


def test_every_console_script_is_there():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) >= {
        "split-lightning",
        "split-lightning-cuts",
        "split-lightning-evaluate",
        "split-lightning-export",
    }
    assert all(callable(pkgutil.resolve_name(target)) for target in scripts.values())
