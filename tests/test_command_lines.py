"""Whatever is typed: a run, or one message that leaves nothing behind.

`COMMAND_LINES=2000 COMMAND_LINES_SEED=7 pytest tests/test_command_lines.py` tries more.
"""

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
    else:
        assert status == 2
        check_message(message, typed)
    assert not list(tmp_path.iterdir())


def check_message(message, typed):
    if message.startswith("usage: "):  # of options such as --nosuch
        message = message[message.index(PREFIX) :]
    assert message.startswith(PREFIX)
    assert message.count("\n") == 1
    assert "Traceback" not in message
    assert len(message) < 1200
    words = {word for part in typed for word in re.split(r"[^\w-]+", part) if word}
    assert not words or any(word in message for word in words)
