"""Whatever is typed: a run, or one message that leaves nothing behind.

A sweep that began goes on past a run that is refused, which says why in its folder.

`COMMAND_LINES=2000 COMMAND_LINES_SEED=7 pytest tests/test_command_lines.py` tries more.
"""

import json
import os
import re
import urllib.request
from urllib.error import URLError

import pytest
from command_lines import Typist
from pytorch_lightning import Trainer

from split_lightning.train import main

COUNT = int(os.environ.get("COMMAND_LINES", "30"))
SEED = int(os.environ.get("COMMAND_LINES_SEED", "0"))
LINES = [Typist(1_000_000 * SEED + number).line() for number in range(COUNT)]
LINES.append(["-m", "rounds=0", "seed=0,1"])  # a sweep of which each run is refused
PREFIX = "split-lightning: error: "


class Accepted(BaseException):
    """Training would begin: a valid configuration."""


@pytest.mark.parametrize("typed", LINES, ids="_".join)
def test_a_run_or_one_message(monkeypatch, tmp_path, capsys, typed):
    def accepted(*args, **kwargs):
        raise Accepted

    def unreachable(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "fit", accepted)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr("sys.argv", ["split-lightning", *typed])
    try:
        main()
    except Accepted:
        return
    except SystemExit as stopped:
        status = stopped.code
    else:
        status = 0
    message = capsys.readouterr().err
    if status in (0, None):  # such as --cfg job, which prints
        assert "error" not in message
        assert any(word.startswith("-") for word in typed)
    elif list(tmp_path.rglob("comparison.csv")):
        assert status == 2
        check_sweep(message, tmp_path, typed)
        return
    else:
        assert status == 2
        check_message(message, typed)
    assert not list(tmp_path.iterdir())


def check_sweep(message, folder, typed):
    """Every run of the sweep was refused, each with one message."""
    assert {"-m", "--multirun"} & set(typed)
    assert "Traceback" not in message
    failures = [json.loads(file.read_text()) for file in folder.rglob("failure.json")]
    assert len(failures) == message.count(PREFIX) > 0
    for failure in failures:
        assert failure["mistake"]
        assert f"{PREFIX}{failure['error']}\n" in message


def check_message(message, typed):
    if message.startswith("usage: "):  # of options such as --nosuch
        message = message[message.index(PREFIX) :]
    assert message.startswith(PREFIX)
    assert message.count("\n") == 1
    assert "Traceback" not in message
    assert len(message) < 1200
    words = {word for part in typed for word in re.split(r"[^\w-]+", part) if word}
    assert not words or any(word in message for word in words)
