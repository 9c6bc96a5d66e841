"""What a run has chosen: loggers' hyperparameters, and the titles of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from split_lightning.cli.config_keys import as_typed
from split_lightning.runs.keys import is_within

# Hyperparameters by name: the option of a group, or the value of a key.
_GROUPS = {
    "protocol": "protocol",
    "topology": "topology",
    "data": "data",
    "partitioner": "data/partitioner",
    "system": "system",
    "optimizer": "optimizer",
}
_KEYS = {
    "network": "model.network._target_",
    "cut_layer": "model.cut_layer",
    "seed": "seed",
    "num_clients": "num_clients",
    "rounds": "rounds",
    "local_epochs": "local_epochs",
    "clients_per_round": "clients_per_round",
    "batch_size": "batch_size",
    "optimizer_state": "optimizer_state",
    "client_lr": "optimizer.client.lr",
    "server_lr": "optimizer.server.lr",
    "precision": "trainer.precision",
}
# What a run shows, or where it is.
_NO_CHOICES = (
    "callbacks",
    "ckpt_path",
    "logger",
    "name",
    "output_dir",
    "spill_to",
    "trainer.enable_checkpointing",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
)
# The key whose class stands for the option of a group.
_CLASSES = {
    "data": "data.source",
    "data/partitioner": "data.partitioner",
    "optimizer": "optimizer.server",
}


def choice_of(cfg: DictConfig, group: str) -> str | None:
    """Returns the option that was chosen of a group, such as `round_robin`.

    Where Hydra does not know it, or another class was typed, it is that class.
    """
    key = f"{_CLASSES.get(group, group)}._target_"
    choices, typed = {}, []
    if HydraConfig.initialized():
        choices = HydraConfig.get().runtime.choices
        typed = as_typed(HydraConfig.get().overrides.task)
    if group in choices and not any(key in word for word in typed):
        return str(choices[group])
    target = OmegaConf.select(cfg, key)
    return None if target is None else str(target).rpartition(".")[2]


def title_of(cfg: DictConfig) -> str:
    """Returns a one-line title of a run: `${title_of_run:}`."""
    protocol, topology = choice_of(cfg, "protocol"), choice_of(cfg, "topology")
    network = str(OmegaConf.select(cfg, "model.network._target_")).rpartition(".")[2]
    alpha = OmegaConf.select(cfg, "data.partitioner.alpha")
    clients = f"{cfg.num_clients} client{'s' if cfg.num_clients > 1 else ''}"
    parts = [
        protocol
        if topology in (None, "vanilla", "unsplit")
        else f"{protocol} ({topology})",
        f"{network} on {choice_of(cfg, 'data')}",
        f"{clients}, {choice_of(cfg, 'data/partitioner')}"
        + (f" ({alpha})" if isinstance(alpha, int | float) else ""),
    ]
    return ", ".join(map(str, parts))


def summary(cfg: DictConfig, typed: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the choices of a run, flat and plain: loggers' hyperparameters.

    All runs have the same ones: TensorBoard takes its columns from the first.

    Args:
        cfg: The run's configuration.
        typed: What was typed for it, such as `["data.val_share=0.2"]`: what a sweep
            varies is a choice.
    """
    found: dict[str, Any] = {
        name: choice_of(cfg, group) for name, group in _GROUPS.items()
    }
    found |= {name: OmegaConf.select(cfg, key) for name, key in _KEYS.items()}
    chosen = {k: str(v) if OmegaConf.is_list(v) else v for k, v in found.items()}
    for word in as_typed(typed):
        key, _, text = word.lstrip("+").partition("=")
        is_known = key in (*_GROUPS.values(), *_KEYS.values())
        is_shown = any(is_within(key, other) for other in _NO_CHOICES)
        if word.startswith("~") or is_known or is_shown:
            continue
        value = OmegaConf.select(cfg, key)  # of a group or a list: as it was typed
        chosen[key] = value if isinstance(value, bool | int | float | str) else text
    return {name: value for name, value in chosen.items() if value is not None}
