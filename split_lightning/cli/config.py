"""The checks of a run's configuration that need the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf

from split_lightning.cli.choices import choice_of, title_of
from split_lightning.cli.config_keys import (
    as_typed,
    did_you_mean,
    keys_of,
    options_of,
    origin_of,
    used_keys,
)
from split_lightning.cli.config_types import misfit
from split_lightning.cli.data_shape import SHAPE_KEYS
from split_lightning.cli.engine_keys import check_engine
from split_lightning.runs.keys import is_within, value_at
from split_lightning.runs.schema import TrainConfig

# What a sweep may choose by.
METRICS = ("val/accuracy", "val/loss", "train/loss")
# Keys that change nothing unless one of others has a value.
_NEEDS = {
    "model.weights_exclude": ["model.weights"],
    "model.gradient_clip_algorithm": ["model.gradient_clip_val"],
    "engine.certificates": ["engine.listen", "engine.server"],
    "topology.missing": ["topology.missing_parts.probability"],
    "optimizer.scheduler_interval": [
        "optimizer.client_scheduler",
        "optimizer.server_scheduler",
    ],
}

ConfigStore.instance().store(name="schema", node=TrainConfig)


def conf_folder() -> str:
    """Returns the folder of the configuration: in a wheel, or else in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


def direction_of(metric: str) -> str:
    """Returns the direction in which a metric gets better: `${direction_of:...}`.

    >>> direction_of("val/loss"), direction_of("val/accuracy")
    ('minimize', 'maximize')
    """
    return "minimize" if metric.endswith("loss") else "maximize"


OmegaConf.register_new_resolver("direction_of", direction_of, replace=True)


def maker_of(node: DictConfig) -> DictConfig:
    """Returns a factory of an object instead of the object: `${maker_of:...}`.

    >>> maker_of(OmegaConf.create({"_target_": "torch.nn.ReLU"}))
    {'_target_': 'torch.nn.ReLU', '_partial_': True}
    """
    return OmegaConf.create({**node, "_partial_": True})


OmegaConf.register_new_resolver("maker_of", maker_of, replace=True)
OmegaConf.register_new_resolver(
    "title_of_run", lambda *, _root_: title_of(_root_), replace=True
)


def check_values(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Stops where a value is out of range, or would be ignored; imports no class.

    Args:
        cfg: The composed configuration.
        overrides: What was typed, such as `["rounds=3"]`.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    _check_values(plain, TrainConfig, used_keys(plain))
    for override in as_typed(overrides):
        _check_used(cfg, plain, override)
    _check_ranges(cfg)
    _check_choices(cfg)
    check_engine(cfg)


def check_classes(cfg: DictConfig) -> None:
    """Stops where a `_target_` cannot be imported, or does not take its options.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    plain = OmegaConf.to_container(cfg, resolve=False)
    _check_targets(plain)
    _check_types(OmegaConf.to_container(cfg, resolve=True), plain)


def typed_overrides() -> Sequence[str]:
    """Returns the overrides that were typed on the command line.

    Raises:
        ValueError: If a search is configured and this is no sweep.
    """
    if not HydraConfig.initialized():
        return ()
    settings = HydraConfig.get()
    if settings.mode == RunMode.RUN and settings.sweeper.get("params"):
        raise ValueError(
            "`hparams_search`, and an experiment that says what to sweep over "
            "(`hydra.sweeper.params`), is for sweeps: add -m (--multirun)."
        )
    typed: Sequence[str] = settings.overrides.task
    return typed


def _check_values(plain: Any, schema: type, used: set[str], prefix: str = "") -> None:
    """Stops where a key that is used has no value, or a word stands for an object."""
    hints = get_type_hints(schema)
    for spec in fields(schema):
        key, hint = f"{prefix}{spec.name}", hints[spec.name]
        value = plain.get(spec.name)
        if isinstance(hint, type) and is_dataclass(hint):
            _check_values(value, hint, used, f"{key}.")
        elif spec.default == MISSING and value in (None, MISSING):
            if not any(is_within(key, k) or is_within(k, key) for k in used):
                continue
            raise ValueError(
                f"Expected `{key}` to have a value, but got null. Add {key}=VALUE."
            )
        elif hint is Any and not (spec.metadata or _can_be_built(value)):
            raise ValueError(
                f"Expected `{key}` to be an object with a `_target_`, but got "
                f"{value!r}."
            )


def _can_be_built(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value
    return value is None or isinstance(value, list) or "${" in str(value)


def _check_used(cfg: DictConfig, plain: Any, override: str) -> None:
    """Stops where what was typed would change nothing."""
    key = override.lstrip("+~").partition("=")[0]
    is_there = value_at(plain, key) != MISSING  # a choice of a group may not be
    used = {*used_keys(plain), *SHAPE_KEYS}  # those are checked against the source
    if is_there and not any(is_within(key, k) or is_within(k, key) for k in used):
        raise ValueError(
            f"`{override}` would change nothing: {_without_use(cfg, plain, key, used)}"
        )
    needs = _NEEDS.get(key, [])
    if needs and all(value_at(plain, need) in (None, MISSING) for need in needs):
        raise ValueError(
            f"`{override}` would change nothing without `{'` or `'.join(needs)}`."
        )


def _without_use(cfg: DictConfig, plain: Any, key: str, used: set[str]) -> str:
    """Says what in a run has no use for a key, and which keys it uses instead."""
    protocol = str(choice_of(cfg, "protocol"))
    if HydraConfig.initialized():
        protocol = f"protocol={protocol}"
    if key in {spec.name for spec in fields(TrainConfig)}:  # protocols refer to these
        own = used_keys(plain, ["protocol"]) & plain.keys()
        own |= {k for k in keys_of(plain) if is_within(k, "protocol") and "._" not in k}
        known = sorted(own - {"protocol"}, key=lambda k: (k.count("."), k))
        return f"{protocol} does not use `{key}`. {did_you_mean(key, known, protocol)}"
    group = key.partition(".")[0]
    topology, why = choice_of(cfg, "topology"), ""
    if group in ("model", "optimizer", "topology"):
        why = f" ({protocol}{f', topology={topology}' if topology else ''})"
    near = [k for k in keys_of(plain) if k != key and is_within(k, group)]
    near = near or [k for k in keys_of(plain) if k != key]  # a group of one's own
    near = [k for k in near if any(is_within(k, u) or is_within(u, k) for u in used)]
    return f"nothing in this run{why} uses `{key}`. {did_you_mean(key, near)}"


def _check_targets(node: Any, path: str = "") -> None:
    """Stops where a `_target_` cannot be imported, or does not take an option."""
    if not isinstance(node, dict):
        return
    target = str(node.get("_target_", "${"))
    missing = [f"{path}{key}" for key, value in node.items() if value == MISSING]
    if missing and "_target_" in node:
        raise ValueError(
            f"Expected `{missing[0]}` to have a value, but got null. Add "
            f"{missing[0]}=VALUE."
        )
    try:
        options = None if "${" in target else options_of(target)
    except (AttributeError, ImportError, ValueError) as error:
        raise ValueError(
            f"Expected `{path}_target_` to name a class or function that can be "
            f"imported, but got {target!r}: {error}."
        ) from error
    for key, value in node.items():
        if options is not None and key not in options and not key.startswith("_"):
            known = [f"{path}{option}" for option in options]
            raise ValueError(
                f"`{path}{key}={value}` is no option of {target}. "
                f"{did_you_mean(f'{path}{key}', known)}"
            )
        _check_targets(value, f"{path}{key}.")


def _check_types(node: Any, plain: Any, path: str = "") -> None:
    """Stops where an option is not of the type that its class or function asks for."""
    if not isinstance(node, dict):
        return
    known = {
        name: value
        for name, value in node.items()
        if value is not None or origin_of(plain, f"{path}{name}") not in SHAPE_KEYS
    }  # null of the shape: as the source has it, when that is loaded
    if (target := node.get("_target_")) and (wrong := misfit(target, known)):
        name, expected = wrong
        key = origin_of(plain, f"{path}{name}")
        used = f", as {target} takes it" if key != f"{path}{name}" else ""
        raise ValueError(
            f"Expected `{key}` to be of type {expected}{used}, but got {node[name]!r}."
        )
    for key, value in node.items():
        _check_types(value, plain, f"{path}{key}.")


def _check_ranges(cfg: DictConfig) -> None:
    """Stops where a whole number is out of its range."""
    ranges = {
        "seed": (0, 2**32 - 1),
        "num_clients": (1, None),
        "clients_per_round": (1, cfg.num_clients),
        "rounds": (1, None),
        "local_epochs": (1, None),
        "local_steps": (1, None),
        "batch_size": (1, None),
        "threads": (1, None),
        "data.num_classes": (1, None),
        "data.in_channels": (1, None),
        "data.image_size": (1, None),
        "trainer.check_val_every_n_epoch": (1, None),
    }
    for key, (least, most) in ranges.items():
        value = OmegaConf.select(cfg, key)
        is_whole = isinstance(value, int)
        if value is None or (is_whole and least <= value <= (most or value)):
            continue
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(
            f"Expected `{key}` to be an integer {allowed}, but got {value}."
        )


def _check_choices(cfg: DictConfig) -> None:
    """Stops where a value is none of those that are allowed."""
    if cfg.metric not in METRICS:
        raise ValueError(
            f"Expected `metric` to be one of {METRICS}, but got {cfg.metric!r}. (The "
            "test set is never used for choosing.)"
        )
    for key in ("ckpt_path", "model.weights", "spill_to"):
        if OmegaConf.select(cfg, key) == "":  # such as `ckpt_path=$UNSET`
            raise ValueError(f"Expected `{key}` to name a path, or null, but got ''.")
    _check_processes(cfg)
    precision = OmegaConf.select(cfg, "trainer.precision")
    if str(precision) in ("16", "16-mixed"):  # Lightning turns it into bf16 on a CPU
        raise ValueError(
            f"Expected `trainer.precision` to be 32-true or bf16-mixed, but got "
            f"{precision}: its loss scale would reach the client's gradient twice."
        )
    for key in ("trainer.limit_train_batches", "trainer.max_steps"):
        if OmegaConf.select(cfg, key) == 0:
            raise ValueError(
                f"Expected `{key}` to leave something to train, but got 0."
            )


def _check_processes(cfg: DictConfig) -> None:
    """Stops where Lightning would choose how several processes train together."""
    devices = OmegaConf.select(cfg, "trainer.devices")
    strategy = OmegaConf.select(cfg, "trainer.strategy")
    is_one = len(devices) == 1 if OmegaConf.is_list(devices) else str(devices) == "1"
    if not is_one and strategy in ("auto", None):
        raise ValueError(
            "Expected `trainer.strategy` to be ddp where `trainer.devices` asks for "
            f"several ({devices}), but got {strategy}. (The runs of a sweep take one "
            "process each: trainer.devices=1.)"
        )
