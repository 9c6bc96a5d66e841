"""A run's folder may have any name, and what a message says to type works."""

import json
import os
import shlex
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import in_child
from hydra import compose, initialize
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from test_killed import at_batch
from test_train import command

from split_lightning import evaluate, export
from split_lightning.callbacks import speed_monitor
from split_lightning.cli.loggers import build_loggers
from split_lightning.runs.checkpoints import find_checkpoint
from split_lightning.runs.comparison import find_runs
from split_lightning.typed_words import key_value, shell_line

NAMES = [
    "ünï", "x,y", "lr=0.1", "it's", "p(1)", "r[2]", "[bold]", "a  b", 'say "hi"', "{b}",
    "$HOME", "back\\slash", "#3", "star*", "~t", "-x", "tail ", "007", "null",
    ":smile:",
]  # fmt: skip
SMALL = [
    "rounds=1", "num_clients=2", "batch_size=512", "model=mlp", "logger=none",
    "callbacks.history.curves=false",
]  # fmt: skip


@given(st.text(st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"])))
def test_any_text_is_read_back(text):
    override = OverridesParser.create().parse_override(key_value("key", text))
    assert override.value() == text
    assert isinstance(override.value(), str)
    assert not override.is_sweep_override()
    assert shlex.split(shell_line(text, "b")) == [text, "b"]


@pytest.mark.parametrize("name", NAMES)
def test_hydra_gets_the_name(name):
    with initialize(version_base="1.3", config_path=None):
        assert compose(overrides=[f"+{key_value('a', name)}"]).a == name


@pytest.mark.parametrize(
    "name",
    ["it's p(1) ünï,y", '[b] lr=0.1 *$HOME "{b}"\\', "#3  a ", "~t", "-x"],
)
def test_a_run_in_a_folder_of_any_name(monkeypatch, tmp_path, capsys, name):
    """It trains, goes on, and is tested, exported and compared again."""
    folder = tmp_path / name
    command(monkeypatch, tmp_path, *SMALL, key_value("hydra.run.dir", folder))
    assert f"run:  {folder}\n" in capsys.readouterr().out
    more = [*SMALL[1:], "rounds=2", key_value("hydra.run.dir", name)]
    command(monkeypatch, tmp_path, *more, key_value("ckpt_path", name))
    last = json.loads((folder / "results.json").read_text())
    assert last["rounds"] == 2
    evaluate.main([key_value("run", name)])
    found = json.loads((folder / "evaluation" / "results.json").read_text())
    assert found["test_accuracy"] == last["test_accuracy"]
    capsys.readouterr()
    export.main([key_value("run", name)])
    assert f"{name}/export/network.safetensors\n" in capsys.readouterr().out
    assert [run.path for run in find_runs([name])] == [folder.resolve()]


def test_tensorboard_writes_to_the_folder_of_that_name(tmp_path):
    """Lightning's logger replaces variables of the environment in it."""
    folder = f"{tmp_path}/$HOME (1)"
    with initialize(version_base="1.3", config_path="../conf"):
        cfg = compose("train", [key_value("output_dir", folder)])
    (logger,) = build_loggers(cfg)
    assert logger.log_dir == f"{folder}/tensorboard"


@pytest.mark.parametrize("folder", ["cut[maxpool]", "cut*"])
def test_last_is_the_runs_own(tmp_path, folder):
    """Never that of a folder that the name would match as a pattern."""
    own, sibling = (tmp_path / name / "checkpoints" for name in (folder, "cutm"))
    for place in (own, sibling):
        place.mkdir(parents=True)
        torch.save({"state_dict": {}}, place / "last.ckpt")
    assert find_checkpoint("last", own.parent) == str(own / "last.ckpt")
    (own / "last.ckpt").unlink()
    assert find_checkpoint("last", own.parent) == str(sibling / "last.ckpt")
    torch.save({"state_dict": {}}, own / "previous.ckpt")
    assert find_checkpoint("last", own.parent) == str(own / "previous.ckpt")


@pytest.mark.parametrize("sweep", [False, True])
def test_the_line_after_go_on_with_can_be_pasted(monkeypatch, tmp_path, capfd, sweep):
    """In a real shell, for a name with all that a shell and Hydra read in their way."""
    name = """it's "ünï" $x,[2] (1)=#{b}\\"""
    folder = tmp_path / name
    where = [key_value("hydra.run.dir", folder)]
    if sweep:
        where = ["-m", key_value("hydra.sweep.dir", folder), "seed=0,1"]

    def start():
        monkeypatch.setattr(*at_batch(5, signal.SIGINT))
        command(monkeypatch, tmp_path, *where, *SMALL, "rounds=2")

    assert in_child(start) == 128 + signal.SIGINT
    message = capfd.readouterr().err
    assert "Traceback" not in message
    (line,) = (line for line in message.splitlines() if line.startswith("Resume with"))
    pasted = line.removeprefix("Resume with: ")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", pasted], cwd=tmp_path, check=False, capture_output=True,
        text=True, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = [folder / "0", folder / "1"] if sweep else [folder]
    for run in runs:
        assert json.loads((run / "results.json").read_text())["rounds"] == 2
    assert "Restored all states" in done.stdout
    assert done.stderr == ""


def test_relative_paths_begin_where_the_command_was_typed(monkeypatch, tmp_path):
    """`hydra.job.chdir=true` has the run in its own folder."""
    command(monkeypatch, tmp_path, *SMALL, "hydra.run.dir=a")
    chdir = [*SMALL[1:], "hydra.job.chdir=true", "spill_to=spill"]
    more = [*chdir, "rounds=2", "ckpt_path=a", "hydra.run.dir=b"]
    command(monkeypatch, tmp_path, *more)
    assert json.loads((tmp_path / "b" / "results.json").read_text())["rounds"] == 2
    command(
        monkeypatch, tmp_path, *chdir, "rounds=1", "model.weights=a", "hydra.run.dir=c"
    )
    assert (tmp_path / "c" / "results.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_files_have_the_permissions_that_the_user_wants(monkeypatch, tmp_path):
    for umask, expected in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            where = f"hydra.run.dir={umask}"
            command(monkeypatch, tmp_path, *SMALL, where, "logger=tensorboard")
        finally:
            os.umask(before)
        files = [p for p in (tmp_path / str(umask)).rglob("*") if p.is_file()]
        assert len(files) > 8
        assert {file.stat().st_mode & 0o777 for file in files} == {expected}


def test_a_folder_without_the_last_checkpoint_names_another(tmp_path):
    best = tmp_path / "a b" / "checkpoints" / "best.ckpt"
    best.parent.mkdir(parents=True)
    torch.save({"state_dict": {}}, best)
    with pytest.raises(ValueError, match="or the word last") as refused:
        find_checkpoint(str(tmp_path / "a b"), tmp_path)
    assert f"There is: 'ckpt_path={best}'" in str(refused.value)


def test_a_run_that_is_refused_leaves_the_configuration(monkeypatch, tmp_path, capsys):
    """What was not used is not written to the folder of the run that it would go on."""
    command(monkeypatch, tmp_path, *SMALL, "hydra.run.dir=a")
    before = (tmp_path / "a" / "config.yaml").read_text()
    command(monkeypatch, tmp_path, *SMALL[1:], "rounds=2", "hydra.run.dir=b",
            "ckpt_path=a")  # fmt: skip
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, *SMALL, "ckpt_path=b")
    assert "(`rounds` in a configuration) to be at least 2" in capsys.readouterr().err
    for typed in ("optimizer=adam", "seed=1"):
        with pytest.raises(SystemExit) as stopped:
            command(
                monkeypatch, tmp_path, *SMALL[1:], "rounds=2", typed,
                "hydra.run.dir=a", "ckpt_path=last",
            )  # fmt: skip
        assert stopped.value.code == 2
        assert "Traceback" not in capsys.readouterr().err
        assert (tmp_path / "a" / "config.yaml").read_text() == before
    lr = "optimizer.client.lr=0.2"
    command(monkeypatch, tmp_path, *SMALL[1:], "rounds=2", lr, "hydra.run.dir=a",
            "ckpt_path=last")  # fmt: skip
    assert "lr: 0.2" in (tmp_path / "a" / "config.yaml").read_text()


def test_what_cannot_be_read_is_shown_in_quotes(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, "hydra.run.dir=p(1)")
    assert """needs quotes: 'hydra.run.dir="p(1)"'""" in capsys.readouterr().err


def test_seconds_are_those_of_the_whole_run(monkeypatch, tmp_path):
    with monkeypatch.context() as slow:
        ticks = count(step=1000)
        slow.setattr(speed_monitor.time, "perf_counter", lambda: float(next(ticks)))
        command(slow, tmp_path, *SMALL, "hydra.run.dir=a")
    command(monkeypatch, tmp_path, *SMALL, "rounds=2", "hydra.run.dir=b", "ckpt_path=a")
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    assert 3000 < results["seconds"] < 10**6


def test_modules_of_the_working_folder_are_found(monkeypatch, tmp_path):
    """By the console scripts too, whose own folder is another."""
    parts = Path(__file__).with_name("own_parts.py").read_text()
    (tmp_path / "mine_alone.py").write_text(parts)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p not in ("", ".")])
    own = ["model.network={_target_: mine_alone.Right}", "model.cut_layer='1'"]
    command(monkeypatch, tmp_path, *SMALL[:3], "logger=none", *own, "hydra.run.dir=a")
    monkeypatch.setattr("sys.path", [p for p in sys.path if p != str(tmp_path)])
    sys.modules.pop("mine_alone")
    monkeypatch.setattr("sys.argv", ["split-lightning", "run=a"])
    evaluate.main()
    assert (tmp_path / "a" / "evaluation" / "results.json").is_file()
