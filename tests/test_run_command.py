"""The commands that a user types, under the one name `split-lightning`."""

import pkgutil
import sys
import warnings
from pathlib import Path

import pytest

import split_lightning
from split_lightning.cli.main import COMMANDS, main

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent


def test_there_is_one_console_script():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert list(scripts) == ["split-lightning"]
    assert pkgutil.resolve_name(scripts["split-lightning"]) is main


@pytest.fixture
def typed(monkeypatch):
    """Types words behind `split-lightning`; returns the exit status."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["split-lightning", *words])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it is imported already
            try:
                main()
            except SystemExit as ended:
                return ended.code or 0
        return 0

    return run


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(typed, capsys, words):
    assert typed(*words) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: split-lightning COMMAND")
    first = [line.split()[0] for line in shown.splitlines() if line.startswith("  ")]
    assert first == list(COMMANDS)
    assert max(map(len, shown.splitlines())) <= 80


def test_version(typed, capsys):
    assert typed("--version") == 0
    assert capsys.readouterr().out == f"split_lightning {split_lightning.__version__}\n"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trian", "Did you mean `train`?"),
        ("Evaluate", "Did you mean `evaluate`?"),
        ("nowhere", f"There are: {', '.join(COMMANDS)}."),
        ("rounds=2", "as in `split-lightning train rounds=2`."),
        ("+experiment=rr10", "as in `split-lightning train +experiment=rr10`."),
        ("-m", "as in `split-lightning train -m`."),
        ("", "There are: train,"),
    ],
)
def test_an_unknown_command_gets_one_line(typed, capsys, word, said):
    assert typed(word) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"split-lightning: error: There is no command `{word}`.")
    assert said in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_found(typed, capsys, name):
    assert typed(name, "--help") == 0
    module = f"split_lightning.{name}"
    shown = capsys.readouterr().out
    assert module in shown or f"split-lightning {name}" in shown


def test_the_words_behind_a_command_are_its_own(typed, capsys, tmp_path):
    assert typed("compare", str(tmp_path / "nowhere")) == 2
    assert "nowhere" in capsys.readouterr().err
    assert typed("evaluate", f"run={tmp_path}") == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert typed("train", "num_client=3") == 2
    assert "Did you mean `num_clients`?" in capsys.readouterr().err
