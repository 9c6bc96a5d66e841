"""The command line, run in this process, so that a probe can watch its steps."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile

from stopwatch import Probe, Stopwatch, measured_by

import split_lightning.train


def train(words: list[str], probe: Probe) -> None:
    """Runs `python -m split_lightning.train` in a folder that is deleted afterwards.

    Args:
        words: The keys that are typed.
        probe: What watches the steps.

    Raises:
        RuntimeError: If the run fails; holds what it printed.
    """
    printed, typed = io.StringIO(), sys.argv
    with tempfile.TemporaryDirectory() as folder, measured_by(probe):
        sys.argv = [
            "split_lightning.train",
            f"hydra.run.dir={folder}/run",
            f"+callbacks.probe._target_={Stopwatch.__module__}.Stopwatch",
            *words,
        ]
        try:
            with (
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(printed),
            ):
                split_lightning.train.main()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(printed.getvalue()) from end
        finally:
            sys.argv = typed
