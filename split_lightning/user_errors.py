"""A user's mistake gets one message: the key, the value, and what is allowed."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities.exceptions import MisconfigurationException

_FULL = "HYDRA_FULL_ERROR"
_MISTAKES = (
    InstantiationException,
    MisconfigurationException,
    OSError,
    OmegaConfBaseException,
    TypeError,
    ValueError,
)


@contextmanager
def one_message(applies: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Turns a user's mistake inside the block into one message and exit status 2.

    Args:
        applies: Tells, when something was raised, whether it can be a user's mistake.
    """
    try:
        yield
    except _MISTAKES as error:
        if os.environ.get(_FULL) == "1" or not applies():
            raise
        stop(_message_of(error))


def stop(message: str) -> None:
    """Prints a message and ends the process with status 2."""
    print(f"split-lightning: error: {message.strip()}", file=sys.stderr)
    raise SystemExit(2)


def run_hydra(main: Callable[[], Any], config_dir: str, config_name: str) -> None:
    """Runs a Hydra application; mistakes on the command line get one message."""
    if os.environ.get(_FULL) == "1":
        main()
        return
    os.environ[_FULL] = "1"  # Hydra raises instead of printing
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        stop(_with_known_keys(_message_of(error), config_dir, config_name))
    finally:
        os.environ.pop(_FULL, None)


def _message_of(error: BaseException) -> str:
    """Returns what went wrong; for an object that Hydra could not build, why and where."""
    if not isinstance(error, InstantiationException):
        cause = error.__cause__
        says_more = isinstance(cause, OmegaConfBaseException)
        return f"{error}\n{cause}" if says_more else str(error)
    where = re.search(r"full_key: (\S+)", str(error))
    cause = error.__cause__
    if isinstance(cause, ValueError | OSError | MisconfigurationException):
        return str(cause)
    reason = str(error).split("\nfull_key:")[0] if cause is None else str(cause)
    return f"`{where[1]}`: {reason}" if where else reason


def _with_known_keys(message: str, config_dir: str, config_name: str) -> str:
    """Adds the nearest known keys to a message about a key that does not exist."""
    unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)'", message)
    if unknown is None:
        return message
    key = unknown[1] or unknown[2]
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir, version_base="1.3"):
        known = list(_keys(compose(config_name)))
    near = difflib.get_close_matches(key, known, n=4, cutoff=0.5)
    near = near or [known_key for known_key in known if "." not in known_key]
    return f"There is no key `{key}`. Did you mean: {', '.join(near)}?\n({message})"


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yields the full paths of all keys of a configuration."""
    for key in cfg:
        yield f"{prefix}{key}"
        if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key):
            continue
        if isinstance(cfg[key], DictConfig):
            yield from _keys(cfg[key], f"{prefix}{key}.")
