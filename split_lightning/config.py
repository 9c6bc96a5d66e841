"""The types of a run's configuration, and the checks that need the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

# What a sweep may choose by.
METRICS = ("val/accuracy", "val/loss", "train/loss")


@dataclass
class DataConfig:
    """A data set and how it is dealt out: `conf/data`."""

    source: Any = MISSING
    num_classes: int = MISSING
    in_channels: int = MISSING
    image_size: int = MISSING
    mean: list[float] = MISSING
    std: list[float] = MISSING
    val_share: float = MISSING
    root: str | None = None
    partitioner: Any = None
    augmentation: Any = None


@dataclass
class ModelConfig:
    """A network and its cut: `conf/model`."""

    network: Any = MISSING
    cut_layer: Any = MISSING
    criterion: Any = None
    channels_last: bool = False
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str = "norm"
    accumulate_grad_batches: int = 1


@dataclass
class ProtocolConfig:
    """Who acts in which step, and how weights flow: `conf/protocol`."""

    module: Any = MISSING
    schedule: Any = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    ignores: list[str] = field(default_factory=list)


@dataclass
class OptimizerConfig:
    """The parties' optimizers and schedulers: `conf/optimizer`."""

    client: Any = MISSING
    server: Any = MISSING
    client_scheduler: Any = None
    server_scheduler: Any = None
    scheduler_interval: str = "round"


@dataclass
class TrainConfig:
    """One run: `conf/train.yaml`."""

    name: str = MISSING
    seed: int = MISSING
    num_clients: int = MISSING
    rounds: int = MISSING
    local_epochs: int = MISSING
    clients_per_round: int | None = None
    batch_size: int = MISSING
    optimizer_state: str = MISSING
    ckpt_path: str | None = None
    metric: str = MISSING
    output_dir: str = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: Any = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: Any = None
    datamodule: Any = MISSING


ConfigStore.instance().store(name="schema", node=TrainConfig)


def check(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Stops where a configuration is out of range, or would be ignored.

    Args:
        cfg: The composed configuration.
        overrides: What was typed, such as `["rounds=3"]`.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    ranges = {
        "seed": 0,
        "num_clients": 1,
        "rounds": 1,
        "local_epochs": 1,
        "batch_size": 1,
    }
    for key, least in ranges.items():
        if cfg[key] < least:
            raise ValueError(
                f"Expected `{key}` to be an integer of at least {least}, but got "
                f"{cfg[key]}."
            )
    if cfg.metric not in METRICS:
        raise ValueError(
            f"Expected `metric` to be one of {METRICS}, but got {cfg.metric!r}. (The "
            "test set is never used for choosing.)"
        )
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        for ignored in cfg.protocol.ignores:
            if f"{key}.".startswith(f"{ignored}."):
                raise ValueError(
                    f"`{key}={value}` would change nothing: this protocol does not use "
                    f"`{ignored}`. Leave it out."
                )


def summary(cfg: DictConfig) -> dict[str, Any]:
    """Returns the choices of a run, flat and plain, as TensorBoard's hyperparameters."""
    keys = {
        "seed": "seed",
        "num_clients": "num_clients",
        "rounds": "rounds",
        "local_epochs": "local_epochs",
        "clients_per_round": "clients_per_round",
        "batch_size": "batch_size",
        "optimizer_state": "optimizer_state",
        "network": "model.network._target_",
        "cut_layer": "model.cut_layer",
        "partitioner": "data.partitioner._target_",
        "client_lr": "optimizer.client.lr",
        "server_lr": "optimizer.server.lr",
        "precision": "trainer.precision",
    }
    chosen = {name: OmegaConf.select(cfg, key) for name, key in keys.items()}
    return {name: value for name, value in chosen.items() if value is not None}
