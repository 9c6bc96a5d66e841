"""`split-lightning COMMAND ...`: the commands of the package under one name."""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Sequence

import split_lightning
from split_lightning.cli.completion import is_about_completion, typed_for_training

# By name; the module is split_lightning.NAME.
COMMANDS = {
    "train": "train and test a network",
    "evaluate": "test a finished run again",
    "export": "write a run's network in formats that need no split_lightning",
    "compare": "compare runs side by side",
    "cuts": "print the costs of each cut of a network",
    "plan": "print the actions of a round and the bytes that they send",
    "certificates": "write certificates for a server and its clients",
    "server": "train with clients at other sites",
    "client": "compute for one client of a server",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the first word names, with the words behind it.

    Args:
        arguments: What was typed; `None`: the command line.

    Raises:
        SystemExit: With the command's exit status, or 2 where there is no such command.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = words[1:] if words[:1] == ["train"] else words
    if is_about_completion(flags):
        _complete(flags)
        return
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"split_lightning {split_lightning.__version__}")
    elif name not in COMMANDS:
        print(f"split-lightning: error: {_unknown(name)}", file=sys.stderr)
        raise SystemExit(2)
    else:
        _run(name, rest)


def _run(name: str, words: Sequence[str]) -> None:
    """Runs a command as `python -m` does: processes that it starts find it by name."""
    sys.argv[1:] = words
    runpy.run_module(f"split_lightning.{name}", run_name="__main__", alter_sys=True)


def _complete(words: Sequence[str]) -> None:
    """Has Hydra complete what is typed behind `train`; it knows the keys."""
    if not typed_for_training(COMMANDS):
        return
    from split_lightning.cli.train import main as train

    sys.argv[1:] = words
    train()


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: split-lightning COMMAND ...",
            "",
            "Split learning for PyTorch Lightning.",
            "",
            *lines,
            "",
            "split-lightning COMMAND --help lists the arguments of a command.",
            "--version prints the version; -sc install=bash prints the command that",
            "installs tab completion.",
        ]
    )


def _unknown(name: str) -> str:
    """Returns a message for an unknown command, with the nearest one."""
    text = f"There is no command `{name}`."
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    if near:
        return f"{text} Did you mean `{near[0]}`?"
    if "=" in name or name.startswith("-"):
        return f"{text} The command comes first, as in `split-lightning train {name}`."
    return f"{text} There are: {', '.join(COMMANDS)}."
