"""The settings of runs, flat, and which of them differ between runs.

A setting is a key such as `optimizer.client.lr` with its resolved value. An object's
own key (`data.partitioner`) has the name of its class or function as value. What was
chosen of a group of files (`data/partitioner`) is a setting, too: it stands for all
that the file holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from split_lightning.runs.keys import is_within, value_at

# No choices: where a run is, where it resumed from, what it shows, what it refuses.
_IGNORED = (
    "output_dir",
    "ckpt_path",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "callbacks.history.title",
)
_FOLDER = "OUTPUT_DIR"  # instead of each run's own
_NOTHING = (None, "", "[]", "{}")


class Target(str):
    """The `_target_` of an object."""

    __slots__ = ()


class Choice(str):
    """The option that was chosen of a group of configuration files."""

    __slots__ = ()


class Setting(NamedTuple):
    """A value, and how it was written where that differs (`${seed}`)."""

    value: Any
    written: Any


_NONE = Setting(None, None)


def flat_settings(
    cfg: DictConfig, choices: Mapping[str, str] | None = None
) -> dict[str, Setting]:
    """Returns the settings of a run.

    Args:
        cfg: The run's configuration, with or without its interpolations.
        choices: The option that was chosen of each group, where that is known. Groups
            that have no place of their own (`experiment`) are left out.

    >>> cfg = {"seed": 1, "data": {"_target_": "my.Data", "seed": "${seed}"}}
    >>> {key: value for key, (value, _) in flat_settings(OmegaConf.create(cfg)).items()}
    {'seed': 1, 'data': 'my.Data', 'data.seed': 1}
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    cfg.output_dir = _FOLDER
    plain = _written(cfg)
    chosen = {
        group: Setting(Choice(option), option)
        for group, option in (choices or {}).items()
        if value_at(plain, _key(group)) != MISSING
    }
    walked = {key: s for key, s in _walk(cfg, "") if key not in _IGNORED}
    classes = {f"{key}._target_": walked.pop(key) for key in chosen if key in walked}
    return chosen | classes | walked


def _key(group: str) -> str:
    """Returns the key at which the choice of a group lies."""
    return group.replace("/", ".")


def _walk(node: DictConfig, prefix: str) -> Iterator[tuple[str, Setting]]:
    for name, item in _written(node).items():
        key = f"{prefix}{name}"
        if isinstance(item, dict):
            if "_target_" in item:
                yield key, Setting(Target(item["_target_"]), item["_target_"])
            yield from _walk(node[name], f"{key}.")
        elif name not in ("_target_", "_partial_", "_convert_", "_recursive_"):
            yield key, Setting(_resolved(node, name), item)


def _resolved(node: DictConfig, name: Any) -> Any:
    """Returns a value without interpolations, or as it is written where one fails."""
    try:
        value = node[name]
        if isinstance(value, DictConfig | ListConfig):
            value = OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException:  # such as `${hydra:...}`, outside of Hydra
        value = _written(node)[name]
    return str(value) if isinstance(value, dict | list) else value


def _written(node: DictConfig) -> dict[str, Any]:
    return cast("dict[str, Any]", OmegaConf.to_container(node, resolve=False))


def differing_settings(runs: Sequence[Mapping[str, Setting]]) -> list[str]:
    """Returns the keys whose values differ between runs, choices of groups first.

    A key that passes on the same other key in all runs (`${seed}`) is left out. So is
    what a choice tells: a key inside of a group (`protocol.shuffle`) from
    which runs have chosen differently differs where it does so among runs of the same
    choice. So is one that a run lacks because the object that it belongs to is of
    another class. To lack a key is the same as to have nothing there (null, an empty
    list). A run without any settings is left out of account.

    Args:
        runs: The settings of each run, from `flat_settings`.

    >>> runs = [{"seed": Setting(0, 0), "n": Setting(5, 5)}, {"seed": Setting(1, 1)}]
    >>> differing_settings(runs)
    ['seed', 'n']
    """
    runs = [run for run in runs if run]
    choices = _differing_choices(runs)
    differing: list[str] = []
    for key in dict.fromkeys(key for run in runs for key in run):
        if any(isinstance(run.get(key, _NONE).value, Choice) for run in runs):
            continue
        owners = [group for group in choices if is_within(key, _key(group))]
        parts: dict[tuple[str, ...], list[Mapping[str, Setting]]] = {}
        for run in runs:
            chosen = tuple(run[group].value for group in owners)
            parts.setdefault(chosen, []).append(run)
        if any(_differs(key, part, differing) for part in parts.values()):
            differing.append(key)
    return [*choices, *differing]


def _differing_choices(runs: Sequence[Mapping[str, Setting]]) -> list[str]:
    """Returns the groups of which all runs tell their choice, and not all the same."""
    found = []
    for key in runs[0] if runs else ():
        values = [run[key].value for run in runs if key in run]
        known = len(values) == len(runs) and all(isinstance(v, Choice) for v in values)
        if known and len(set(values)) > 1:
            found.append(key)
    return found


def _differs(
    key: str, runs: Sequence[Mapping[str, Setting]], differing: Sequence[str]
) -> bool:
    """Returns whether a key differs between runs, and no other key implies it."""
    found = [run[key] for run in runs if key in run]
    if not found:
        return False
    if len({repr(setting.value) for setting in found}) > 1:
        return not _is_alias(found)
    if len(found) == len(runs) or found[0].value in _NOTHING:
        return False
    return not _is_told(key, runs, differing)


def _is_alias(found: Sequence[Setting]) -> bool:
    """Returns whether all write the same interpolation."""
    return "${" in str(found[0].written) and len({str(s.written) for s in found}) == 1


def _is_told(
    key: str, runs: Sequence[Mapping[str, Setting]], differing: Sequence[str]
) -> bool:
    """Returns whether the class around a key says which runs lack it."""
    parts = key.split(".")
    around = [".".join(parts[:i]) for i in range(1, len(parts))]
    for owner in {*around, *(f"{own}._target_" for own in around)} & set(differing):
        having = {run.get(owner, _NONE).value for run in runs if key in run}
        lacking = {run.get(owner, _NONE).value for run in runs if key not in run}
        if not having & lacking:
            return True
    return False


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Returns the shortest endings of keys that tell them apart.

    >>> short_names(["seed", "my.client.lr", "my.server.lr"])
    {'seed': 'seed', 'my.client.lr': 'client.lr', 'my.server.lr': 'server.lr'}
    """
    names = {}
    for key in keys:
        parts = _key(key).split(".")
        endings = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        others = [f".{_key(other)}" for other in keys if other != key]
        alone = (e for e in endings if not any(o.endswith(f".{e}") for o in others))
        names[key] = next(alone, key)
    return names


def shown(settings: Mapping[str, Setting], key: str) -> str:
    """Returns a value as a table and a legend show it."""
    if key not in settings:
        return ""
    value = settings[key].value
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return value.rpartition(".")[2] if isinstance(value, Target) else str(value)


def is_of_group(key: str, group: str) -> bool:
    """Returns whether a key is a choice of a group, or an option in it.

    >>> is_of_group("data/partitioner", "data"), is_of_group("database.url", "data")
    (True, False)
    """
    return is_within(_key(key), group)
