"""`VirtualClock`: the seconds that a run would take on other devices and links."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from split_lightning.channel import Channel
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.engines.dry_run import dry_step, measure_segments
from split_lightning.message import num_bytes
from split_lightning.observers.clock import Clock
from split_lightning.observers.system_seconds import SystemSeconds
from split_lightning.protocols.protocol import Protocol
from split_lightning.store import WEIGHTS, tensors_in
from split_lightning.system.seconds import EqualSeconds
from split_lightning.system.system import System


class VirtualClock(pl.Callback):
    """Keeps the time of a run on the devices and links of a system.

    Each computation and each message takes its time on a `Clock`: from the counted
    operations of each party's segments, and from the bytes that are sent. Parties that
    do not wait for each other work at the same time. The run itself never waits. Not
    counted: optimizer steps, validation, tests, and the limits of memory.

    `system/virtual_seconds` is logged at the end of each round: the time when all of it
    is done.

    Args:
        system: Devices and links.
    """

    def __init__(self, system: System) -> None:
        self.system = system
        self.clock: Clock | None = None
        self._state: dict[str, Any] | None = None  # until the fit starts
        self._data: SplitDataModule | None = None

    @property
    def seconds(self) -> float:
        """Virtual seconds since the start of the run."""
        return 0.0 if self.clock is None else self.clock.now

    @override
    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if trainer.world_size > 1:
            raise MisconfigurationException(
                "A virtual clock is for one process, which sees all messages; but "
                f"there are {trainer.world_size}. Use trainer.devices=1, or leave the "
                "clock out (system=none)."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, SplitDataModule):
            raise MisconfigurationException(
                "A virtual clock counts the work of an image of the data, and needs "
                f"a SplitDataModule (`datamodule=...`), but got {data!r}."
            )
        self.clock, seconds = new_clock(
            self.system, pl_module, data.protocol, pl_module.fed(data.example())
        )
        if seconds is not None:
            self._data, data.seconds = data, seconds
        if trainer.ckpt_path is not None:
            self.clock.load_state_dict(self._state_to_continue())
        self._state = None
        self.clock.watch(pl_module.channel)

    def _state_to_continue(self) -> dict[str, Any]:
        """Returns the times of the run that continues.

        Raises:
            ValueError: If it had no clock, or one of another system.
        """
        if self._state is None:
            raise ValueError(
                "Expected `ckpt_path` to be a checkpoint of a run with a virtual "
                "clock, to continue its time, but it has none: how long its rounds "
                "so far took is not known. Leave the clock out (system=none), or begin "
                "anew."
            )
        before, now = self._state.get("system"), repr(self.system)
        if before not in (None, now):
            raise ValueError(
                "Expected the devices and links that the run of `ckpt_path` began with "
                f"(`system`), to continue its time ({before}), but got {now}."
            )
        return self._state

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.log("system/virtual_seconds", self.seconds)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit" and self.clock is not None:
            self.clock.leave(pl_module.channel)
        if self._data is not None:
            self._data.seconds, self._data = EqualSeconds(), None

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.clock is None:
            return {}
        return {"system": repr(self.system), **self.clock.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = dict(state_dict) or None


def new_clock(
    system: System, module: Any, protocol: Protocol, example: Tensor
) -> tuple[Clock, SystemSeconds | None]:
    """Returns a clock for a module and a protocol.

    Returns:
        The clock, and how long things take, for a protocol that plans by time.

    Raises:
        MisconfigurationException: If such a protocol has clients that are groups of
            holders.
    """
    engine = module.engine
    measured = measure_segments(engine, example)
    holders = 1 if module.topology.parts is None else len(module.topology.parts)
    plans_by_time = protocol.overlapping
    keeps_buffers = getattr(protocol, "buffers", "average") == "keep"

    def clock() -> Clock:
        return Clock(
            system,
            lambda segment: measured[segment].work,
            holders,
            protocol.server_work,
            protocol.in_flight,
            shares_means=not plans_by_time,
        )

    if not plans_by_time:
        return clock(), None
    if holders > 1:
        raise MisconfigurationException(
            f"{type(protocol).__name__} plans by the times of clients that are a "
            "device each, and here each is a group of holders. Leave the clock out "
            "(system=none), or let clients take turns."
        )
    weights = [
        tensor
        for store, name in engine.segments_of(0, "client")
        for part in (WEIGHTS[:1] if keeps_buffers else WEIGHTS)
        for tensor in tensors_in(store.peek(name, part))
    ]

    def run_step(client_id: int, num_samples: int, channel: Channel) -> None:
        dry_step(engine, measured, {client_id: num_samples}, channel)

    def one_in_flight() -> Clock:
        own = clock()
        own.in_flight = 1
        return own

    seconds = SystemSeconds(system, one_in_flight, run_step, num_bytes(weights))
    return clock(), seconds


def virtual_seconds(trainer: pl.Trainer) -> float | None:
    """Returns the virtual seconds of a run so far; `None` where it has no clock."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    clocks = [c for c in callbacks if isinstance(c, VirtualClock)]
    return clocks[0].seconds if clocks else None
