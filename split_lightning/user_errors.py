"""A user's mistake gets one message: the key, the value, and what is allowed."""

from __future__ import annotations

import inspect
import os
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
)
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    OmegaConfBaseException,
    ValidationError,
)
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from split_lightning.config_keys import as_typed, did_you_mean, is_within, keys_of

_FULL = "HYDRA_FULL_ERROR"
_OURS = "SPLIT_LIGHTNING_SET_HYDRA_FULL_ERROR"
_LONGEST = 800  # characters of a message, but for what was typed
# Raised on purpose, with a message for a user.
_SPOKEN = (
    HydraException,
    ImportError,
    MisconfigurationException,
    OmegaConfBaseException,
    OSError,
    ValueError,
)
# What else a mistake can raise while a run is built or restored.
_MISTAKES = (*_SPOKEN, LookupError, RuntimeError, TypeError, pickle.UnpicklingError)
# What brings the options of Hydra's groups that are not its own.
_PACKAGES = {
    "hydra/sweeper=optuna": "split-lightning[sweep]",
    "hydra/launcher=joblib": "split-lightning[sweep]",
    "hydra/launcher=submitit_local": "hydra-submitit-launcher",
    "hydra/launcher=submitit_slurm": "hydra-submitit-launcher",
    "hydra/launcher=ray": "hydra-ray-launcher",
}


class UserMistake(Exception):
    """A user's mistake in one run of a sweep; its text is the message."""


@contextmanager
def one_message(applies: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Turns a user's mistake inside the block into one message and exit status 2.

    Args:
        applies: Tells, when something was raised, whether it can be a user's mistake.
            Lightning's complaints about a configuration always are.

    Raises:
        UserMistake: In a sweep, which goes on with its other runs.
    """
    try:
        yield
    except _MISTAKES as error:
        mistake = isinstance(error, MisconfigurationException) or applies()
        if _wants_trace() or not mistake:
            raise
        if not HydraConfig.initialized():
            stop(_message(error))
        hydra = HydraConfig.get()
        typed = as_typed(hydra.overrides.task)
        message = _message(error, typed, hydra.runtime.choices)
        if hydra.mode == RunMode.MULTIRUN:
            raise UserMistake(message) from error
        stop(message)


def stop(message: str) -> None:
    """Prints a message and ends the process with status 2."""
    print(f"split-lightning: error: {message.strip()}", file=sys.stderr)
    raise SystemExit(2)


def run_hydra(main: Callable[[], Any], config_dir: str) -> None:
    """Runs a Hydra application; mistakes on the command line get one message."""
    if _wants_trace():
        main()
        return
    os.environ.update({_FULL: "1", _OURS: "1"})  # Hydra raises instead of printing
    typed = [word for word in sys.argv[1:] if not word.startswith("-")]
    try:
        main()
    except UserMistake as error:  # a sweeper's rule has a failed run end the sweep
        stop(str(error))
    except Exception as error:
        if _began(main, error):  # past `one_message`: a bug, to be traced
            raise
        stop(_null_option(typed, config_dir) or _message(error, typed))
    finally:
        for name in (_FULL, _OURS):
            os.environ.pop(name, None)


def _wants_trace() -> bool:
    """Tells whether the user asked Hydra for stack traces."""
    return os.environ.get(_FULL) == "1" and _OURS not in os.environ


def _began(main: Callable[[], Any], error: BaseException) -> bool:
    """Tells whether an error comes out of the task that a Hydra application runs."""
    task = inspect.unwrap(main).__code__
    return any(
        frame.f_code is task for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _message(
    error: BaseException, typed: Sequence[str] = (), groups: Iterable[str] = ()
) -> str:
    """Returns what went wrong, with the keys and values as they were typed."""
    reason = _reason(error)
    message = reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}..."
    words = {word.lstrip("+~").partition("=")[0]: word for word in typed}
    for key, word in words.items():
        if f"There is no key `{key}`" in message:
            message = f"`{word}`: {message}"
        message = _with_full_keys(message, key.replace("/", "."))
        group = key.replace(".", "/")
        if f"`{key}`" in message and group != key and group in groups:
            message += f" (An option is chosen with `{group}=OPTION`.)"
    if words and not any(key in message for key in words):
        message += f" (You typed: {' '.join(typed)})"
    return message


def _with_full_keys(message: str, key: str) -> str:
    """Puts a key where the package, which knows no keys, speaks of an argument."""
    parts = key.split(".")
    for i, part in enumerate(parts):
        message = message.replace(f"argument `{part}`", f"`{'.'.join(parts[: i + 1])}`")
    return message


def _reason(error: BaseException) -> str:
    """Returns what went wrong, and in which file if in one."""
    if isinstance(error, InstantiationException):
        return _not_built(error)
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    file = re.match("In '.+?': ", str(error))  # Hydra names it, OmegaConf the key
    origin = error.__cause__ or error.__context__
    if isinstance(error, HydraException) and isinstance(origin, OmegaConfBaseException):
        return f"{file[0] if file else ''}{_reason(origin)}"
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and error.full_key:
        return _unknown_key(error)
    if isinstance(error, ValidationError) and is_dataclass(error.object_type):
        return _wrong_type(error)
    if isinstance(error, _SPOKEN):
        return str(error).split("\n    full_key:")[0]
    return f"{type(error).__name__}: {error} ({_FULL}=1 shows where.)"


def _not_built(error: InstantiationException) -> str:
    """Says which object of the configuration could not be built, and why."""
    cause = error.__cause__
    reason = str(error).split("\nfull_key:")[0] if cause is None else _reason(cause)
    where = re.search(r"full_key: (\S+)", str(error))
    if where is None or reason.startswith("Expected argument"):
        return reason
    return f"`{where[1]}`: {reason}"


def _missing_option(error: MissingConfigException) -> str:
    """Says that a group has no such option, and which it has."""
    if not error.options or not error.missing_cfg_file:
        return str(error).split("\nConfig search path:")[0]
    group, _, option = error.missing_cfg_file.rpartition("/")
    package = _PACKAGES.get(f"{group}={option}")
    if package is not None:
        return f'`{group}={option}` is not installed: pip install "{package}".'
    return f"There is no `{group}={option}`. {_options_of(group, error.options)}"


def _options_of(group: str, options: Iterable[str]) -> str:
    return f"Options of `{group}`: {', '.join(options)}."


def _null_option(typed: Sequence[str], config_dir: str) -> str | None:
    """Says that a group was set to null, which Hydra does not name."""
    for word in typed:
        group, _, value = word.partition("=")
        folder = Path(config_dir, group)
        if value == "null" and group and folder.is_dir():
            options = sorted(path.stem for path in folder.glob("*.yaml"))
            return f"`{group}` cannot be null. {_options_of(group, options)}"
    return None


def _unknown_key(error: OmegaConfBaseException) -> str:
    """Says that there is no such key, and which are near."""
    key, root = str(error.full_key), error.parent_node._get_root()
    known = keys_of(OmegaConf.to_container(root, resolve=False))
    alike = (k for k in known if is_within(k, "hydra") == is_within(key, "hydra"))
    remedy = did_you_mean(key, alike) or f"`+{key}=VALUE` adds it."
    return f"There is no key `{key}`. {remedy}"


def _wrong_type(error: OmegaConfBaseException) -> str:
    """Says which type a key has."""
    hint = get_type_hints(error.object_type)[str(error.key)]
    value = "null" if error.value is None else repr(error.value)
    return (
        f"Expected `{error.full_key}` to be of type {inspect.formatannotation(hint)}, "
        f"but got {value}."
    )
