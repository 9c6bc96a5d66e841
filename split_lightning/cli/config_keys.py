"""The keys of a configuration: known ones, near ones, used ones, options.

A configuration is plain here: nested dicts and lists, with its interpolations
(`${seed}`) unresolved. A key is a path such as `optimizer.client.lr`.
"""

from __future__ import annotations

import difflib
import inspect
import pkgutil
import re
from collections.abc import Iterable, Iterator
from typing import Any, cast

from omegaconf import ListConfig, OmegaConf

from split_lightning.runs.keys import is_within, value_at

# What a run reads; all else is used only where these refer to it.
_READ = (
    "name",
    "seed",
    "threads",
    "ckpt_path",
    "metric",
    "output_dir",
    "model.weights",
    "model.weights_exclude",
    "trainer",
    "callbacks",
    "logger",
    "datamodule",
    "module",
    "protocol",
    "system.clock",
)


def as_typed(overrides: Iterable[str]) -> list[str]:
    """Returns what was typed; a `ListConfig` would resolve `rounds=${num_clients}`."""
    if isinstance(overrides, ListConfig):
        return cast("list[str]", OmegaConf.to_container(overrides))
    return list(overrides)


def keys_of(node: Any, prefix: str = "") -> Iterator[str]:
    """Yields all keys, but for those that only pass on another of the same name.

    >>> list(keys_of({"seed": 0, "data": {"seed": "${seed}", "root": "x"}}))
    ['seed', 'data', 'data.root']
    """
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if not re.fullmatch(rf"\$\{{([\w.]+\.)?{re.escape(str(key))}\}}", str(value)):
            yield f"{prefix}{key}"
            yield from keys_of(value, f"{prefix}{key}.")


def origin_of(plain: Any, key: str) -> str:
    """Returns the key that a value comes from, past those that only pass it on.

    >>> plain = {"module": {"cut": "${topology.cut}"}, "topology": "${group}"}
    >>> origin_of(plain | {"group": {"cut": 3}}, "module.cut")
    'group.cut'
    """
    parts = key.split(".")
    for length in range(1, len(parts) + 1):
        value = str(value_at(plain, ".".join(parts[:length])))
        if passed_on := re.fullmatch(r"\$\{([\w.]+)\}", value):
            source = passed_on[1]
            if not source.startswith("."):
                return origin_of(plain, ".".join([source, *parts[length:]]))
    return key


def used_keys(plain: dict[str, Any], read: Iterable[str] = _READ) -> set[str]:
    """Returns the keys that are read, by a run or as said, and those they refer to.

    >>> plain = {"datamodule": {"source": "${data.source}"}, "data": {"source": "x"}}
    >>> "data.source" in used_keys(plain), "data.root" in used_keys(plain)
    (True, False)
    """
    used: set[str] = set()
    new = list(read)
    while new:
        key = new.pop()
        if key not in used:
            used.add(key)
            new += _references(value_at(plain, key), key)
    return used


def options_of(target: str) -> list[str] | None:
    """Returns what a class or function takes by name, or `None` where that is open.

    Raises:
        AttributeError, ImportError, ValueError: If it cannot be imported.

    >>> options_of("split_lightning.Local")
    ['clients_per_round', 'local_steps']
    """
    found = pkgutil.resolve_name(target)
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters]


def did_you_mean(key: str, known: Iterable[str], of: str = "a run") -> str:
    """Names the known keys that are nearest to a key, or else its siblings.

    A key of the same name elsewhere is near, too: first one whose path ends alike.

    Args:
        key: The key.
        known: The known keys.
        of: What the known keys that have no dot belong to.

    >>> did_you_mean("data.vall_share", ["data.val_share", "data.root", "seed"])
    'Did you mean `data.val_share`?'
    >>> did_you_mean("data.x", ["data.val_share", "data.root", "seed"])
    'Keys of `data`: val_share, root.'
    >>> did_you_mean("x", ["data.val_share", "data.root", "seed"])
    'Keys of a run: seed.'
    """
    parent, _, name = key.rpartition(".")
    split = [k.rpartition(".") for k in known]
    siblings = [own for above, _, own in split if above == parent]
    near = _near(name, siblings)
    if near:
        return f"Did you mean `{'.'.join(filter(None, (parent, near[0])))}`?"
    near = _near(name, {own for *_, own in split if not own.startswith("_")}, 0.8)
    if near:
        places = ["".join(path) for path in split if path[2] == near[0]]
        alike = [place for place in places if is_within(place, key.partition(".")[0])]
        inner = [place for place in places if key.endswith(f".{place}")]
        return f"Did you mean `{'` or `'.join((inner or alike or places)[:3])}`?"
    while parent and not siblings:
        parent = parent.rpartition(".")[0]
        siblings = [own for above, _, own in split if above == parent]
    of = f"`{parent}`" if parent else of
    return f"Keys of {of}: {', '.join(siblings)}." if siblings else ""


def _near(name: str, names: Iterable[str], cutoff: float = 0.7) -> list[str]:
    return difflib.get_close_matches(name, names, n=1, cutoff=cutoff)


def _references(node: Any, key: str) -> Iterator[str]:
    """Yields the keys that the interpolations in a value may refer to."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for part, value in items:
            yield from _references(value, f"{key}.{part}")
    elif isinstance(node, str) and "${" in node:
        for word in re.findall(r"[\w.]+", node):
            name = word.lstrip(".")
            ups = len(word) - len(name)  # `${..name}` is relative
            yield ".".join([*key.split(".")[:-ups], name]) if ups else name
