"""Shared code of the commands other than train: keys, and changes to them.

Most are on a finished run: `run=FOLDER`, then changes to its keys.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from split_lightning.cli.config_keys import did_you_mean, keys_of, used_keys
from split_lightning.cli.threads import wait_passively
from split_lightning.cli.user_errors import one_message
from split_lightning.paths import import_from_working_folder, path_of
from split_lightning.runs.keys import is_within
from split_lightning.runs.run_files import read_config
from split_lightning.signals import Interrupted, interrupted_by_signals
from split_lightning.typed_words import key_value

# Keys of the Trainer that a test uses.
TRAINER_KEYS = (
    "accelerator",
    "benchmark",
    "detect_anomaly",
    "deterministic",
    "devices",
    "enable_progress_bar",
    "fast_dev_run",
    "inference_mode",
    "limit_test_batches",
    "precision",
    "profiler",
    "strategy",
)


class Command(NamedTuple):
    """A command, on a run or on what a configuration names.

    Attributes:
        name: Its name.
        folder: Where it writes, in the run's folder.
        keys: The keys that it adds to those of the configuration, and their values.
        reads: The keys that it reads. What changes no other is an error.
        help: What it does, for `--help`.
        usage: What is typed behind its name.
    """

    name: str
    folder: str
    keys: Mapping[str, Any]
    reads: Iterable[str]
    help: str
    usage: str = "FOLDER [KEY=VALUE ...]"


def typed_words(command: Command) -> list[str]:
    """Returns the overrides on the command line; answers `--help`."""
    wait_passively()
    import_from_working_folder()
    wait_passively()
    parser = argparse.ArgumentParser(
        prog=f"python -m split_lightning.{command.name}",
        usage=f"%(prog)s {command.usage}",
        description=command.help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help=argparse.SUPPRESS)
    words: list[str] = parser.parse_args(sys.argv[1:]).words
    return words


def with_run_key(words: Sequence[str]) -> list[str]:
    """Returns overrides: a first word that is none is the run's folder.

    >>> with_run_key(["runs/digits/1", "batch_size=7"])
    ['run=runs/digits/1', 'batch_size=7']
    """
    folder, rest = words[:1], words[1:]
    if folder and re.fullmatch("[^~+=][^=]*", folder[0]):
        return [key_value("run", folder[0]), *rest]
    return list(words)


@contextmanager
def ending_with_one_line(typed: Sequence[str]) -> Iterator[None]:
    """Ends the program with one line where a user makes a mistake, or interrupts it.

    Args:
        typed: What was typed.
    """
    try:
        with interrupted_by_signals(), one_message(typed=typed):
            yield
    except Interrupted as stopped:
        print(f"\n{stopped}: nothing is complete.", file=sys.stderr)
        raise SystemExit(128 + stopped.signal) from stopped


def compose_run(command: Command, words: Sequence[str]) -> DictConfig:
    """Returns the configuration of a run, with the command's keys and with changes.

    Args:
        command: The command.
        words: What was typed, such as `["run=runs/digits/...", "data.root=/data"]`.

    Raises:
        ValueError: If `run` is no run's folder, or a word would change nothing.
    """
    parsed = OverridesParser.create().parse_overrides(list(words))
    runs = [o.value() for o in parsed if o.key_or_group == "run"]
    if len(runs) != 1 or not isinstance(runs[0], str):
        raise ValueError(
            "Expected `run` to be the folder of one run, as in "
            f"python -m split_lightning.{command.name} run=runs/NAME/DATE_TIME, but "
            f"got {' '.join(words) or 'nothing'}."
        )
    folder = path_of(runs[0])
    cfg = read_config(folder)
    _refuse_groups(cfg, words)
    typed = {o.key_or_group: o.value() for o in parsed}
    cfg.output_dir = str(folder / _output_name(command, typed))
    OmegaConf.update(cfg, "trainer.devices", 1)  # regardless of the training device
    OmegaConf.update(cfg, "trainer.strategy", "auto")
    for key, value in {"run": None, **command.keys}.items():
        OmegaConf.update(cfg, key, value)
    ConfigStore.instance().store(name="run", node=cfg)
    with initialize(version_base="1.3", config_path=None):
        cfg = compose("run", list(words))
    cfg.run = str(folder)
    check_used(cfg, words, command)
    return cfg


def _refuse_groups(cfg: DictConfig, words: Sequence[str]) -> None:
    """Stops where an option of a group was chosen: that is for training."""
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if "/" in key or OmegaConf.is_dict(cfg.get(key)):
            raise ValueError(
                f"`{word}` would replace a group of the run's keys. "
                f"Change single keys instead: {key.replace('/', '.')}.KEY=VALUE."
            )


def _output_name(command: Command, typed: Mapping[str, Any]) -> str:
    """Names what belongs to a checkpoint or a client apart from the run's own."""
    checkpoint, client = typed.get("checkpoint"), typed.get("client")
    of = f"_{Path(str(checkpoint)).stem}" if checkpoint else ""
    whose = f"_client_{client}" if client is not None else ""
    return f"{command.folder}{of}{whose}"


def check_used(cfg: DictConfig, words: Sequence[str], command: Command) -> None:
    """Stops where what was typed would change nothing.

    Raises:
        ValueError: Names the word, and the nearest key that the command reads.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    reads = ("run", "output_dir", *command.keys, *command.reads)
    used = used_keys(plain, reads)
    for word in words:
        key = word.lstrip("+~").partition("=")[0].replace("/", ".")
        if not any(is_within(key, k) or is_within(k, key) for k in used):
            known = [k for k in keys_of(plain) if k in used]
            near = did_you_mean(key, known, command.name)
            raise ValueError(
                f"`{word}` would change nothing: {command.name} does not use `{key}`. "
                f"{near}"
            )
