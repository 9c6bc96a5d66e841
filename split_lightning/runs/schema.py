"""The types of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

_PLAIN = {"is_plain": True}  # a value of any type that is no object


@dataclass
class DataConfig:
    """A data set and its partition: `conf/data`."""

    source: Any = MISSING
    num_classes: int | None = None
    in_channels: int | None = None
    image_size: int | None = None
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
    cut_layer: Any = field(default=MISSING, metadata=_PLAIN)  # a layer, or a list
    client_networks: Any = None
    hop_layer: int | str | None = None
    head_layer: int | str | None = None
    weights: str | None = None
    weights_exclude: list[str] = field(default_factory=list)
    criterion: Any = None
    channels_last: bool = False
    non_finite: str = "stop"
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str = "norm"
    accumulate_grad_batches: int = 1


@dataclass
class TopologyConfig:
    """Where the network is cut, and where the labels are: `conf/topology`."""

    network: Any = MISSING
    cut_layers: Any = field(default=None, metadata=_PLAIN)
    labels: str = MISSING
    label_holder: int | None = None
    parts: Any = None
    join: str | None = None
    missing: str | None = None
    missing_parts: Any = None
    client_networks: Any = "${model.client_networks}"
    client_optimizer: Any = "${optimizer.client}"
    client_scheduler: Any = "${optimizer.client_scheduler}"


@dataclass
class SystemConfig:
    """Devices, links, and absences: `conf/system`."""

    clock: Any = None
    availability: Any = None


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
    local_steps: int | None = None
    clients_per_round: int | None = None
    batch_size: int = MISSING
    threads: int | None = None
    optimizer_state: str = MISSING
    server_optimizer_state: str = MISSING
    buffers: str = MISSING
    spill_to: str | None = None
    ckpt_path: str | None = None
    metric: str = MISSING
    output_dir: str = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    protocol: Any = MISSING
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: Any = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] | None = field(default_factory=dict)
    engine: Any = MISSING
    channel: Any = None
    datamodule: Any = MISSING
    module: Any = MISSING
