"""Tab completion of `split-lightning COMMAND ...`, by Hydra's completion of keys."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

_FLAGS = ("-sc", "--shell-completion")  # Hydra's
_LINE = "COMP_LINE"  # what is typed so far, as a shell tells it


def is_about_completion(words: Sequence[str]) -> bool:
    """Returns whether the words are about completion."""
    return bool(words) and words[0].partition("=")[0] in _FLAGS


def typed_for_training(commands: Iterable[str]) -> bool:
    """Takes `train` out of what is typed so far, which Hydra then completes.

    Prints the commands that may be meant where none is typed yet.

    Args:
        commands: The names of the commands.

    Returns:
        Whether there is anything for Hydra to do.
    """
    if _LINE not in os.environ:
        return True  # it is to be installed
    program, *typed = os.environ[_LINE].split(" ")
    if len(typed) < 2:
        begun = typed[0] if typed else ""
        print(" ".join(name for name in commands if name.startswith(begun)))
        return False
    if typed[0] != "train":
        return False
    os.environ[_LINE] = " ".join([program, *typed[1:]])
    return True
