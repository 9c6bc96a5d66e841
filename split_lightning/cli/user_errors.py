"""One message for a user's mistake: the key, the value, the allowed values."""

from __future__ import annotations

import errno
import inspect
import os
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
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    OmegaConfBaseException,
    ValidationError,
)

from split_lightning.cli.config_groups import options_with
from split_lightning.cli.config_keys import as_typed, did_you_mean, keys_of
from split_lightning.runs.keys import is_within
from split_lightning.typed_words import key_value, shell_line
from split_lightning.user_code import described, position_of

_FULL = "HYDRA_FULL_ERROR"
_OURS = "SPLIT_LIGHTNING_SET_HYDRA_FULL_ERROR"
_LONGEST = 800  # characters of a message, but for what was typed
# Raised on purpose, with a message for a user.
_SPOKEN = (HydraException, ImportError, OmegaConfBaseException, OSError, ValueError)
# The same, where importing their packages would take seconds.
_MISCONFIGURATION = (
    "pytorch_lightning.utilities.exceptions",
    "MisconfigurationException",
)
# What ends a run that has begun, and its text says why.
_OF_RUNS = (
    _MISCONFIGURATION,
    ("split_lightning.finite", "NonFiniteError"),
    ("split_lightning.engines.link", "SiteError"),
    ("split_lightning.engines.remote", "SiteAbsent"),
)
_NOT_WRITABLE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}
# What brings the options of Hydra's groups that are not its own.
_PACKAGES = {
    "hydra/sweeper=optuna": "split-lightning[sweep]",
    "hydra/launcher=joblib": "split-lightning[sweep]",
    "hydra/launcher=submitit_local": "hydra-submitit-launcher",
    "hydra/launcher=submitit_slurm": "hydra-submitit-launcher",
    "hydra/launcher=ray": "hydra-ray-launcher",
}


class Refused(SystemExit):
    """The end of a run that never began."""


class UserMistake(Exception):
    """A user's mistake in one run of a sweep; its text is the message."""


@contextmanager
def one_message(
    has_begun: Callable[[], bool] = lambda: False,
    remedy: Callable[[], str] = str,
    typed: Sequence[str] | None = None,
) -> Iterator[None]:
    """Turns a user's mistake inside the block into one message and exit status 2.

    Args:
        has_begun: Returns whether the run had begun when the error was raised. Then
            only Lightning's complaints about a configuration are a user's mistake, and
            system errors (a full disk) are for the user to fix.
        remedy: Says what to do about that.
        typed: What was typed; `None`: as Hydra knows it.

    Raises:
        UserMistake: In a sweep, which continues with its other runs.
    """
    try:
        yield
    except Exception as error:
        began = has_begun()
        spoken = any(_is(error, name) for name in _OF_RUNS)
        mistake = spoken or _is_by_system(error)
        if _wants_trace() or (began and not mistake):
            raise
        known = _typed() if typed is None else (typed, ())
        message = _message(error, *(() if began else known))
        if began or _is_not_writable(error):
            message += f" {remedy()}"
        if typed is None and is_in_sweep():
            raise UserMistake(message) from error
        if not began:
            refuse(message)
        _print_error(message)
        raise SystemExit(2) from error


def _is(error: BaseException, name: tuple[str, str]) -> bool:
    """Returns whether an error is of a class, without importing the class's module."""
    module = sys.modules.get(name[0])
    return module is not None and isinstance(error, getattr(module, name[1]))


def is_in_sweep() -> bool:
    """Returns whether this process runs a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _is_by_system(error: BaseException) -> bool:
    """Returns whether a folder or a device could not be read or written."""
    return isinstance(error, OSError) or "PytorchStreamWriter failed" in str(error)


def _is_not_writable(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _NOT_WRITABLE


def _typed() -> tuple[Sequence[str], Iterable[str]]:
    """Returns what was typed on the command line, and the groups that there are."""
    if not HydraConfig.initialized():
        return (), ()
    hydra = HydraConfig.get()
    return as_typed(hydra.overrides.task), hydra.runtime.choices


def refuse(message: str) -> None:
    """Prints a message and ends, with status 2, a run that never began."""
    _print_error(message)
    raise Refused(2)


def _print_error(message: str) -> None:
    """Prints a message in one line, without what points at a place in another."""
    lines = [line.strip() for line in message.splitlines() if line.strip(" ^")]
    print(f"split-lightning: error: {' '.join(lines)}", file=sys.stderr)


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
        refuse(str(error))
    except Exception as error:
        if _began(main, error):  # past `one_message`: a bug, to be traced
            raise
        refuse(_null_option(typed, config_dir) or _message(error, typed))
    finally:
        for name in (_FULL, _OURS):
            os.environ.pop(name, None)


def _wants_trace() -> bool:
    """Returns whether the user asked Hydra for stack traces."""
    return os.environ.get(_FULL) == "1" and _OURS not in os.environ


def _began(main: Callable[[], Any], error: BaseException) -> bool:
    """Returns whether an error comes out of the task that a Hydra application runs."""
    task = inspect.unwrap(main).__code__
    return any(
        frame.f_code is task for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _message(
    error: BaseException, typed: Sequence[str] = (), groups: Iterable[str] = ()
) -> str:
    """Returns what went wrong, with the keys and values as they were typed."""
    reason = _reason(error, typed)
    message = reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}..."
    words = {word.lstrip("+~").partition("=")[0]: word for word in typed}
    for key, word in words.items():
        if f"There is no key `{key}`" in message:
            message = f"`{word}`: {message}"
        message = _with_full_keys(message, key.replace("/", "."))
        group = key.replace(".", "/")
        if f"`{key}`" in message and group != key and group in groups:
            message += f" (An option is chosen with `{group}=OPTION`.)"
    if words and not any(key and key in message for key in words):
        message += f" (You typed: {' '.join(typed)})"
    return message


def _with_full_keys(message: str, key: str) -> str:
    """Puts a key where the package, which knows no keys, speaks of an argument."""
    parts = key.split(".")
    for i, part in enumerate(parts):
        message = message.replace(f"argument `{part}`", f"`{'.'.join(parts[: i + 1])}`")
    return message


def _reason(error: BaseException, typed: Sequence[str] = ()) -> str:
    """Returns what went wrong, and in which file if in one."""
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if isinstance(error, InstantiationException):
        return _not_built(error)
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    file = re.match("In '.+?': ", str(error))  # Hydra names it, OmegaConf the key
    origin = error.__cause__ or error.__context__
    if isinstance(error, HydraException) and isinstance(origin, OmegaConfBaseException):
        return f"{file[0] if file else ''}{_reason(origin, typed)}"
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and error.full_key:
        return _unknown_key(error, typed)
    if isinstance(error, ValidationError) and is_dataclass(error.object_type):
        return _wrong_type(error)
    if _is_not_writable(error):
        return (
            f"{error}. Make room or get access there, or choose another folder "
            "for the run with hydra.run.dir=FOLDER."
        )
    if position_of(error) is not None:
        return described(error)
    if isinstance(error, _SPOKEN) or _is(error, _MISCONFIGURATION):
        return str(error).split("\n    full_key:")[0]
    return f"{type(error).__name__}: {error} ({_FULL}=1 shows where.)"


def _unreadable(error: OverrideParseException) -> str:
    """Says which word of the command line is not of the form KEY=VALUE."""
    if "=" not in error.override:
        return f"Expected KEY=VALUE, but got `{error.override}`, which has no `=`."
    why = error.message.removeprefix(f"Error parsing override '{error.override}'")
    why = re.sub(r"^\s*LexerNoViableAltException: .*", "", why)
    why = why.split("See https://")[0].strip(" ^\n")
    return (
        f"Expected KEY=VALUE, but cannot read `{error.override}`"
        f"{f' ({why})' if why else ''}. A value with special characters needs "
        f"quotes: {_quoted(error.override)}"
    )


def _quoted(override: str) -> str:
    key, _, value = override.partition("=")
    return shell_line(key_value(key or "KEY", value or "VALUE"))


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
    """Says that a group was set to null, or to a list of which one is no option.

    Hydra names neither.
    """
    for word in typed:
        group, _, value = word.partition("=")
        folder = Path(config_dir, group)
        if not group or not folder.is_dir():
            continue
        options = sorted(path.stem for path in folder.glob("*.yaml"))
        if value == "null":
            return f"`{group}` cannot be null. {_options_of(group, options)}"
        names = [
            name.strip() for name in value[1:-1].split(",") if value.startswith("[")
        ]
        if wrong := [name for name in names if name and name not in options]:
            return f"There is no `{group}={wrong[0]}`. {_options_of(group, options)}"
    return None


def _unknown_key(error: OmegaConfBaseException, typed: Sequence[str]) -> str:
    """Says that there is no such key, and which options have it or which are near."""
    key, root = str(error.full_key), error.parent_node._get_root()
    words = (word.lstrip("+~").partition("=")[0] for word in typed)
    key = next((word for word in words if is_within(word, key)), key)
    plain = OmegaConf.to_container(root, resolve=False)
    if options := list(options_with(key, plain)):
        return f"There is no key `{key}`. Options with this key: {', '.join(options)}."
    known = keys_of(plain)
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
