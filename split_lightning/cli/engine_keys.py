"""The keys of an engine (`conf/engine`), checked before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, OmegaConf

from split_lightning.credentials import read_credentials
from split_lightning.engine_options import check_options

_PREFIX = "split_lightning.engines."
_GRPC = f"{_PREFIX}grpc_engine.grpc_engine"
_EXTRAS = {"grpc": ("grpc", "cryptography"), "ray": ("ray",)}
_OF_CLIENTS = ("server", "folder", "patience", "own_data")
_OF_SERVERS = ("listen", "deadline", "absences")
_CALLED = "`engine.{}`"


def check_engine(cfg: DictConfig) -> None:
    """Stops where a value is out of range, or a package is not installed.

    Raises:
        ImportError: Names the package, and how to install it.
        ValueError: Names the key, its value and what is allowed.
    """
    options = _options(cfg)
    kind = str(options.pop("_target_", "")).removeprefix(_PREFIX).partition("_")[0]
    if kind not in _EXTRAS:
        return
    for package in _EXTRAS[kind]:
        if find_spec(package) is None:
            raise ImportError(
                f"`engine={kind}` needs the package {package}, which is not installed: "
                f'pip install "split-lightning[{kind}]".'
            )
    check_options(options, _CALLED)


def check_server(cfg: DictConfig, words: Sequence[str], in_sweep: bool) -> None:
    """Stops where a server could not begin to listen, or a key is for clients.

    Args:
        cfg: The composed configuration.
        words: What was typed.
        in_sweep: Whether this is one run of a sweep.

    Raises:
        ValueError: Names the key and what to do.
    """
    options = _options(cfg)
    if options.get("_target_") != _GRPC:
        return
    _refuse(words, _OF_CLIENTS, "a client: `split-lightning client`")
    if options["listen"] is None:
        return
    if in_sweep:
        raise ValueError(
            "Expected `engine.listen` to be null in a sweep, since clients take part "
            f"in one run, but got {options['listen']!r}. Leave it out: each run then "
            "starts clients of its own on this machine."
        )
    _require(options, "certificates", "certs/server")
    read_credentials(options["certificates"], "server", _CALLED.format("certificates"))


def leave_out_source(cfg: DictConfig) -> None:
    """Lets a server name no source: the samples are at its clients."""
    source = cfg.data.get("source")
    names_one = OmegaConf.is_dict(source) and not OmegaConf.is_missing(
        source, "_target_"
    )
    if _options(cfg).get("listen") is not None and not names_one:
        cfg.data.source = {"_target_": "split_lightning.data.sources.AtClients"}


def require_listen(cfg: DictConfig) -> None:
    """Stops where a server has no address at which clients could find it.

    Raises:
        ValueError: Names the key and what to do.
    """
    options = _options(cfg)
    if options.get("_target_") == _GRPC:
        _require(options, "listen", "0.0.0.0:8443")


def check_client(cfg: DictConfig, words: Sequence[str], name: str) -> None:
    """Stops where a client could not connect, or a key is for servers.

    Args:
        cfg: The composed configuration.
        words: What was typed.
        name: The client, such as `client-3`.

    Raises:
        ValueError: Names the key and what to do.
    """
    options = _options(cfg)
    _refuse(words, _OF_SERVERS, "a server: `split-lightning server`")
    _require(options, "server", "server.example:8443")
    _require(options, "certificates", f"certs/{name}")
    read_credentials(options["certificates"], name, _CALLED.format("certificates"))


def with_grpc(words: Sequence[str], command: str) -> list[str]:
    """Returns what was typed, with `engine=grpc`.

    Args:
        words: What was typed.
        command: The command, such as `server`.

    Raises:
        ValueError: If another engine was chosen.

    >>> with_grpc(["--config-dir", "own", "rounds=3"], "server")
    ['--config-dir', 'own', 'engine=grpc', 'rounds=3']
    """
    for word in words:
        key, _, option = word.lstrip("+").partition("=")
        if key == "engine" and option != "grpc":
            raise ValueError(
                f"`split-lightning {command}` is for `engine=grpc`, but got `{word}`. "
                f"Leave it out; `split-lightning train {word}` takes other engines."
            )
    own = [word for word in words if word.lstrip("+") != "engine=grpc"]
    # Beside the other keys: an option between keys would end them.
    keys = [n for n, word in enumerate(own) if "=" in word and word[0] != "-"]
    first = keys[0] if keys else len(own)
    return [*own[:first], "engine=grpc", *own[first:]]


def _options(cfg: DictConfig) -> dict[str, Any]:
    """Returns the keys of the engine and their values."""
    found: Any = OmegaConf.to_container(cfg.engine, resolve=True)
    return found if isinstance(found, dict) else {}


def _refuse(words: Sequence[str], keys: Sequence[str], of: str) -> None:
    """Stops where a key was typed that is for another party."""
    for word in words:
        parent, _, name = word.lstrip("+~").partition("=")[0].partition(".")
        if parent == "engine" and name in keys:
            raise ValueError(f"`{word}` would change nothing here: it is for {of}.")


def _require(options: dict[str, Any], name: str, example: str) -> None:
    """Stops where an option has no value."""
    if options.get(name) is None:
        raise ValueError(
            f"Expected `engine.{name}` to have a value, but got null. Add "
            f"engine.{name}=VALUE, such as engine.{name}={example}."
        )
