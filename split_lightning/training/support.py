"""What of Lightning goes with split learning, and what must be refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from split_lightning.callbacks.confusion_matrix import ConfusionMatrix
from split_lightning.callbacks.confusion_picture import ConfusionPicture
from split_lightning.callbacks.drift_monitor import DriftMonitor
from split_lightning.callbacks.histograms import Histograms
from split_lightning.callbacks.partition_picture import PartitionPicture
from split_lightning.callbacks.resume_checkpoint import ResumeCheckpoint
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.engines.remote import NO_SITES
from split_lightning.protocols.protocol import Protocol
from split_lightning.protocols.round_robin import RoundRobinWeightPassing

if TYPE_CHECKING:
    from split_lightning.module import SplitLightningModule

_PRECISIONS = ("32-true", "64-true", "bf16-true", "bf16-mixed")
# Callbacks that look at samples, outputs or gradients of clients.
LOOK_AT_CLIENTS = (
    ConfusionMatrix,
    ConfusionPicture,
    DriftMonitor,
    Histograms,
    PartitionPicture,
)
_CALLBACKS = (BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging)


def refuse_unsupported(trainer: pl.Trainer) -> None:
    """Stops where the Trainer is told what would be ignored or train wrongly.

    Raises:
        MisconfigurationException: Names what is refused, and what to use instead.
    """
    if trainer.gradient_clip_val is not None:
        raise MisconfigurationException(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) knows nothing of "
            "parties. Use SplitLightningModule(gradient_clip_val=...), in a "
            "configuration `model.gradient_clip_val`, which clips each one's gradient."
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) knows "
            "nothing of turns. Use SplitLightningModule(accumulate_grad_batches=...), "
            "in a configuration `model.accumulate_grad_batches`."
        )
    require_processes(trainer)
    if trainer.precision not in _PRECISIONS:
        raise MisconfigurationException(
            f"Trainer(precision={trainer.precision!r}) would scale the client's "
            f"gradient twice. Use one of {_PRECISIONS}."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, _CALLBACKS):
            raise MisconfigurationException(
                f"{type(callback).__name__} needs a single optimizer, and split "
                "learning has one for each segment. Leave it out."
            )


def require_processes(trainer: pl.Trainer) -> None:
    """Stops where several processes would not train as one does.

    Raises:
        MisconfigurationException: Names the strategy, and what to use instead.
    """
    strategy = trainer.strategy
    if isinstance(strategy, SingleDeviceStrategy):
        return
    if not isinstance(strategy, DDPStrategy) or strategy._start_method != "popen":
        start = getattr(strategy, "_start_method", None)
        how = f"(start_method={start!r})" if start else ""
        raise MisconfigurationException(
            f"{type(strategy).__name__}{how} would not train as one process does. Use "
            "Trainer(strategy='ddp'), or one device: Trainer(devices=1, "
            "strategy='auto')."
        )
    if strategy._ddp_kwargs.get("find_unused_parameters"):
        raise MisconfigurationException(
            "DDPStrategy(find_unused_parameters=True) looks for parameters without a "
            "gradient when the server's backward is done, and the client's is still to "
            "come. Use Trainer(strategy='ddp')."
        )


def find_protocol(trainer: pl.Trainer, data: Any) -> tuple[Protocol, list[pl.Callback]]:
    """Returns the protocol among a Trainer's callbacks.

    Returns:
        The protocol, and the callbacks to add: a round robin for a single client that
        has none.

    Raises:
        MisconfigurationException: If there is not one, or no data module.
    """
    if not isinstance(data, SplitDataModule):
        raise MisconfigurationException(
            "Expected the data of a fit to be a SplitDataModule, which plans the "
            "clients' turns, but got "
            f"{'loaders' if data is None else type(data).__name__}. Pass it as "
            "trainer.fit(module, datamodule=data)."
        )
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = [callback for callback in callbacks if isinstance(callback, Protocol)]
    if len(found) > 1:
        names = ", ".join(type(own).__name__ for own in found)
        raise MisconfigurationException(
            f"Expected one protocol among the Trainer's callbacks, but got {names}. "
            "Leave all but one out."
        )
    if found:
        return found[0], []
    if data.num_clients > 1:
        raise MisconfigurationException(
            f"{data.num_clients} clients take turns, and nothing passes the weights "
            "on. Add RoundRobinWeightPassing() to the Trainer's callbacks, or another "
            "protocol; RoundRobinWeightPassing(enabled=False) is for clients that "
            "never share weights."
        )
    protocol = RoundRobinWeightPassing()
    return protocol, [protocol]


def require_fit(
    module: SplitLightningModule,
    trainer: pl.Trainer,
    data: SplitDataModule,
    protocol: Protocol,
) -> None:
    """Stops where a module, a Trainer, data and a protocol do not go together.

    Raises:
        MisconfigurationException: Says what to change.
        ValueError: If an argument has to be another.
    """
    refuse_unsupported(trainer)
    _require_whole_steps(module, protocol)
    _require_one_device(module, trainer, protocol)
    _require_parts(module, trainer, data, protocol)
    _require_like_clients(module, trainer, protocol)
    _require_one_network(module, trainer, data, protocol)
    if module.engine.sites is not NO_SITES:
        _require_sites(module, trainer, protocol)
    if module.engine.spill is not None and (protocol.cohort or protocol.pools_samples):
        raise MisconfigurationException(
            "Expected argument `spill_to` to be null where all clients train one state "
            f"({type(protocol).__name__}): none is ever at rest. Got "
            f"{str(module.engine.spill.folder)!r}."
        )
    if not data.availability.is_trivial and protocol.pools_samples:
        raise MisconfigurationException(
            "Expected argument `availability` to be null, or probabilities of 0, where "
            f"one party has all samples ({type(protocol).__name__}): no client trains "
            f"that could be away. Got {data.availability}."
        )


def _require_sites(
    module: SplitLightningModule, trainer: pl.Trainer, protocol: Protocol
) -> None:
    """Stops where something needs all parties in one process."""
    name, away = type(protocol).__name__, " where parties are at other sites"
    remedy = "Use engine=local, or another protocol."
    if not module.engine.parties_away():
        raise MisconfigurationException(
            f"With {name} no client computes, and there is nothing for other sites to "
            f"do. {remedy}"
        )
    if protocol.cohort:
        raise MisconfigurationException(
            f"With {name} clients step one state together: their gradients are averaged"
            f" before each step, in one process. {remedy}"
        )
    if protocol.in_flight > 1:
        raise MisconfigurationException(
            f"Expected argument `in_flight` to be 1{away} ({name}), but got "
            f"{protocol.in_flight}: weights of batches on their way are kept in one "
            "process."
        )
    require_one_device(trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LOOK_AT_CLIENTS):
            raise MisconfigurationException(
                f"{type(callback).__name__} looks at what stays with the clients, and "
                "cannot be used where they are at other sites. Leave it out."
            )
        by_batch = isinstance(callback, ResumeCheckpoint) and (
            callback.every_n_batches or callback.every_n_minutes
        )
        if by_batch and module.engine.sites.absences is not None:
            raise MisconfigurationException(
                "Expected arguments `every_n_batches` and `every_n_minutes` of "
                "ResumeCheckpoint to be None where clients may become absent "
                "(`deadline`): a round begins again without them. "
                f"Got {callback.every_n_batches} and {callback.every_n_minutes}."
            )


def require_cut(module: SplitLightningModule, protocol: Protocol) -> None:
    """Stops where a protocol needs a network that is cut, or one that is not.

    Raises:
        MisconfigurationException: Says what to change.
        ValueError: If the server trains first, and an argument has to be another.
    """
    name, cuts = type(protocol).__name__, len(set(module.topology.depths)) - 1
    if protocol.unsplit_at is None and not module.topology.is_split:
        raise MisconfigurationException(
            f"Expected argument `cut_layer` to name a layer, since {name} trains a "
            "network that is split, but got None. (In a configuration leave "
            "`topology=unsplit` out.)"
        )
    if protocol.unsplit_at is not None and module.topology.is_split:
        raise MisconfigurationException(
            f"Expected argument `cut_layer` to be None, since with {name} one party "
            f"trains the whole network, but got {module.hparams['cut_layer']!r}. (In a "
            "configuration leave `topology` out.)"
        )
    if protocol.server_work > 1 and cuts > 1:
        raise ValueError(
            "Expected argument `cut_layer` to be one layer where the server trains "
            f"first, on what clients sent, but got {cuts}: behind another cut it "
            "would have no loss of its own, and what clients send at different "
            "depths is no batch that it could draw from."
        )


def _require_whole_steps(module: SplitLightningModule, protocol: Protocol) -> None:
    """Stops where gradients of several batches cannot wait for a step.

    Raises:
        ValueError: If they would.
    """
    reason = protocol.steps_each_batch
    if reason and module.accumulate_grad_batches != 1:
        raise ValueError(
            f"Expected argument `accumulate_grad_batches` to be 1 where {reason} "
            f"({type(protocol).__name__}), but got {module.accumulate_grad_batches}."
        )


def _require_one_device(
    module: SplitLightningModule, trainer: pl.Trainer, protocol: Protocol
) -> None:
    """Stops where several processes cannot share out a step."""
    name = type(protocol).__name__
    if protocol.together and trainer.world_size > 1:
        raise MisconfigurationException(
            f"{trainer.world_size} processes share out the batches of clients that "
            f"train one at a time, and with {name} several take part in a step. Use "
            "one device: Trainer(devices=1, strategy='auto')."
        )
    if protocol.server_work > 1 or protocol.in_flight > 1:
        require_one_device(trainer)
    if module.engine.placement.differ and trainer.world_size > 1:
        raise MisconfigurationException(
            f"{trainer.world_size} processes train the same layers in each step, and "
            "here clients differ in the layers that they have. Use one device: "
            "Trainer(devices=1, strategy='auto')."
        )


def require_one_device(trainer: pl.Trainer) -> None:
    """Stops where something is for one process alone.

    Raises:
        MisconfigurationException: Names the strategy, and what to use instead.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise MisconfigurationException(
            f"{type(trainer.strategy).__name__} is for several processes. Use one "
            "device: Trainer(devices=1, strategy='auto')."
        )


def _require_like_clients(
    module: SplitLightningModule, trainer: pl.Trainer, protocol: Protocol
) -> None:
    """Stops where clients that differ would have to be alike."""
    differ, name = module.engine.placement.differ, type(protocol).__name__
    if differ and protocol.cohort is not None:
        raise MisconfigurationException(
            f"With {name} clients train one state together, and here they differ in "
            "the layers that they have. Average them after rounds "
            "(ParallelSplitLearning(every=1); in a configuration protocol=parallel "
            "protocol.every=1), or let all cut after the same layer."
        )
    if differ and protocol.overlapping:
        raise MisconfigurationException(
            f"With {name} all clients mix their weights into the same ones, and here "
            "they differ in the layers that they have. Let all cut after the same "
            "layer, without networks of their own."
        )
    if differ and module.channel.downlink and not module.topology.has_client_networks:
        raise ValueError(
            "Expected argument `downlink` to be None where clients cut after different "
            "layers, whose gradients are not of one depth in the network, but got "
            f"{type(module.channel.downlink).__name__}."
        )
    if protocol.joint_norm:
        module.engine.require_joint_norm()
    travels = getattr(protocol, "optimizer_state", "keep") == "travel"
    moves = any(len(store.roles) > 1 for store in module.engine.stores)
    kinds = [getattr(make, "func", make) for make in module.makes_optimizer.values()]
    if travels and moves and kinds[0] is not kinds[1]:
        names = [getattr(kind, "__name__", str(kind)) for kind in kinds]
        raise ValueError(
            "Expected argument `optimizer_state` to be 'keep' or 'reset' where layers "
            "go between clients and servers whose optimizers are of different classes, "
            f"but got 'travel'; the client's is {names[0]}, the server's {names[1]}."
        )


def _require_one_network(
    module: SplitLightningModule,
    trainer: pl.Trainer,
    data: SplitDataModule,
    protocol: Protocol,
) -> None:
    """Stops where Lightning would average weights of different clients over time."""
    is_one = protocol.trains_one_network and protocol.num_servers == 1
    if data.num_clients == 1 or (is_one and not module.engine.placement.differ):
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise MisconfigurationException(
                f"{type(callback).__name__} averages one network over time, and here "
                "clients have weights of their own, which it would mix. Leave it out, "
                "or train one network: RoundRobinWeightPassing() with one server "
                "(protocol=round_robin)."
            )


def _require_parts(
    module: SplitLightningModule,
    trainer: pl.Trainer,
    data: SplitDataModule,
    protocol: Protocol,
) -> None:
    """Stops where something does not go with a network for holders of parts."""
    parts, missing = module.topology.parts, module.topology.missing
    if missing is not None and protocol.joint_norm:
        raise MisconfigurationException(
            "Expected argument `joint_norm` to be False where holders lack samples "
            f"(missing={missing!r}): those of a client are not there with the same "
            "samples. Got True (in a configuration `protocol.joint_norm`)."
        )
    lacking = data.missing_parts
    if parts is not None and data.augmentation is not None:
        raise MisconfigurationException(
            f"{type(data.augmentation).__name__} changes whole images, and here no "
            "party has one: it would move pixels from one holder to another. Leave the "
            "augmentation out (`data/augmentation=none`)."
        )
    if lacking.is_trivial:
        return
    if missing is None:
        raise MisconfigurationException(
            f"With {lacking!r} holders lack samples, and the network has no rule for "
            "that. Give `VerticalNetwork` or `vertical_network` one (`missing='zeros'` "
            "or 'skip'; in a configuration `topology.missing`), or leave it out."
        )
    if repr(lacking.parts) != repr(parts):
        raise MisconfigurationException(
            f"Holders lack samples by {lacking.parts!r}, and the network is one for "
            f"{parts!r}. Give both the same `parts`."
        )
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f"{trainer.world_size} processes share out each batch, and a holder that "
            "lacks all of one process's samples would have no gradient there. Use one "
            "device: Trainer(devices=1, strategy='auto')."
        )
