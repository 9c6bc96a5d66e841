"""`VirtualClock`: the seconds that a run would take on other devices and links."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from split_lightning.data.asynchronous_schedule import AsynchronousSchedule
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.data.schedule import PooledSchedule
from split_lightning.data.seconds import EqualSeconds
from split_lightning.route import Party, Stage
from split_lightning.system import (
    System,
    SystemSeconds,
    Timeline,
    Work,
    crossing_of,
    work_of,
)

_BYTES_PER_LABEL = 8


class VirtualClock(pl.Callback):
    """Keeps the time of a run on the devices and links of a system.

    Each step, hand-off and averaging takes its time on a `Timeline`, from the counted
    operations of each party's layers and from the bytes that cross; so whatever waits
    for each other does so, and all else goes on at the same time. Nothing waits in
    truth. Not in it: optimizer steps, validation, tests, and what memory allows.

    `system/virtual_seconds` is logged at the end of each round: the time when all of it
    is done.

    Args:
        system: Devices and links.
    """

    def __init__(self, system: System) -> None:
        self.system = system
        self.timeline: Timeline | None = None
        self._state: dict[str, Any] | None = None  # waits for the fit's start
        self._module: Any = None
        self._crossed: list[list[int]] = []
        self._in_flight = 1
        self._schedule: AsynchronousSchedule | None = None

    @property
    def seconds(self) -> float:
        """Virtual seconds since the start of the run."""
        return 0.0 if self.timeline is None else self.timeline.now

    @override
    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if trainer.world_size > 1:
            raise MisconfigurationException(
                "A virtual clock is for one process, which sees all that crosses; but "
                f"there are {trainer.world_size}. Use trainer.devices=1, or leave the "
                "clock out (system=none)."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._module = pl_module
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, SplitDataModule):
            raise MisconfigurationException(
                "A virtual clock counts the work of an image of the data, and needs "
                f"a SplitDataModule (`datamodule=...`), but got {data!r}."
            )
        route = getattr(pl_module, "route", None)
        if route is None:  # of one network: a client's, or whoever has all samples
            pooled = isinstance(data.schedule, PooledSchedule)
            route = [Stage("server" if pooled else "client", 0)]
        example = data.example().to(pl_module.device)
        work = work_of(pl_module.stages(), pl_module.laid_out(example))
        times = getattr(pl_module, "server_work", 1)
        scaled = [
            Work(times * own.forward, times * own.backward)
            if stage.party == "server"
            else own
            for stage, own in zip(route, work, strict=True)
        ]
        self.timeline = Timeline(self.system, route, scaled)
        if self._state is not None and trainer.ckpt_path is not None:
            self.timeline.load_state_dict(self._state)
        self._state = None
        self._in_flight = data.schedule.in_flight
        if isinstance(data.schedule, AsynchronousSchedule):
            self._tell(data.schedule, trainer, pl_module, example)
        if self not in pl_module.parties.listeners:
            pl_module.parties.listeners.append(self)

    def _tell(
        self,
        schedule: AsynchronousSchedule,
        trainer: pl.Trainer,
        module: Any,
        example: Tensor,
    ) -> None:
        """Tells a schedule that plans by time how long things take."""
        assert self.timeline is not None
        with trainer.precision_plugin.train_step_context():
            crossing = crossing_of(module.stages(), module.laid_out(example))
        schedule.seconds = SystemSeconds(
            self.system,
            self.timeline.route,
            self.timeline.work,
            self._with_labels(crossing),
            module.parties.clients.weight_bytes,
        )
        self._schedule = schedule

    def _with_labels(
        self, crossing: list[tuple[float, float]]
    ) -> list[tuple[float, float]]:
        """Returns the bytes of a sample that cross the cuts, and its label's."""
        assert self.timeline is not None
        sends = bool(crossing) and crossing[0][0] > 0
        if sends and self.timeline.route[-1].party == "server":
            crossing[0] = (crossing[0][0] + _BYTES_PER_LABEL, crossing[0][1])
        return crossing

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._crossed = self._by_cut()  # the module has set its counts by now

    def stepped(self, samples: Mapping[int, int], server: int) -> None:
        """Clients made a step on some samples each, with a server."""
        assert self.timeline is not None
        before, self._crossed = self._crossed, self._by_cut()
        count = sum(samples.values())
        crossing = [
            ((now[0] - then[0]) / count, (now[1] - then[1]) / count)
            for now, then in zip(self._crossed, before, strict=True)
        ]
        self.timeline.step(
            samples, server, self._with_labels(crossing), self._in_flight
        )

    def handed_over(self, sender: int, receiver: int, num_bytes: int) -> None:
        """A client took weights over from another."""
        assert self.timeline is not None
        self.timeline.hand_over(sender, receiver, num_bytes)

    def began_turn(self, client_id: int, num_bytes: int) -> None:
        """A client began a turn from the newest weights, of so many bytes."""
        assert self.timeline is not None
        self.timeline.begin_turn(client_id, num_bytes)

    def handed_in(self, client_id: int, num_bytes: int) -> None:
        """A client that is done with its turn handed in so many bytes of weights."""
        assert self.timeline is not None
        self.timeline.hand_in(client_id, num_bytes)

    def averaged(self, party: Party, sent: Mapping[int, int]) -> None:
        """Parties sent so many bytes of weights each, and got the mean back."""
        assert self.timeline is not None
        if party == "client":
            self.timeline.average_clients(sent)
        else:
            self.timeline.average_servers(sent)

    def exchanged(self, sent: Mapping[int, int]) -> None:
        """Clients sent so many bytes of something else each, and got a mean back."""
        assert self.timeline is not None
        self.timeline.exchange(sent)

    def _by_cut(self) -> list[list[int]]:
        channel = getattr(self._module, "channel", None)
        return [] if channel is None else [list(own) for own in channel.by_cut]

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.log("system/virtual_seconds", self.seconds)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit" and self in pl_module.parties.listeners:
            pl_module.parties.listeners.remove(self)
        if self._schedule is not None:
            self._schedule.seconds, self._schedule = EqualSeconds(), None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.timeline is None else self.timeline.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = dict(state_dict) or None


def virtual_seconds(trainer: pl.Trainer) -> float | None:
    """Returns the virtual seconds of a run so far; `None` where it has no clock."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    clocks = [c for c in callbacks if isinstance(c, VirtualClock)]
    return clocks[0].seconds if clocks else None
