"""`VirtualClock`: the seconds that a run would take on other devices and links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from split_lightning.channel import num_bytes
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.data.schedule import PooledSchedule
from split_lightning.models.segment import OneStretch, Segment
from split_lightning.route import Party, Stage
from split_lightning.system import Holder, System, Timeline, Work, work_of

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
        self._crossed_by_holder: list[list[int]] = []

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
        example = pl_module.laid_out(data.example().to(pl_module.device))
        work = work_of(pl_module.stages(), example)
        times = getattr(pl_module, "server_work", 1)
        scaled = [
            Work(times * own.forward, times * own.backward)
            if stage.party == "server"
            else own
            for stage, own in zip(route, work, strict=True)
        ]
        holders = _holders_of(pl_module, route[0], example)
        label_holder = getattr(pl_module, "label_holder", 0)
        self.timeline = Timeline(self.system, route, scaled, holders, label_holder)
        if self._state is not None and trainer.ckpt_path is not None:
            self.timeline.load_state_dict(self._state)
        self._state = None
        if self not in pl_module.parties.listeners:
            pl_module.parties.listeners.append(self)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # The module has set its counts by now.
        self._crossed, self._crossed_by_holder = self._by_cut(), self._by_holder()

    def stepped(self, samples: Mapping[int, int], server: int) -> None:
        """Clients made a step on some samples each, with a server."""
        assert self.timeline is not None
        before, self._crossed = self._crossed, self._by_cut()
        count = sum(samples.values())
        crossing = _of_a_sample(before, self._crossed, count)
        before, self._crossed_by_holder = self._crossed_by_holder, self._by_holder()
        of_holders = _of_a_sample(before, self._crossed_by_holder, count)
        if crossing and self.timeline.route[-1].party == "server":  # with the labels
            own, place = of_holders or crossing, self.timeline.label_holder
            own[place] = (own[place][0] + _BYTES_PER_LABEL, own[place][1])
        self.timeline.step(samples, server, crossing, of_holders)

    def handed_over(self, sender: int, receiver: int, num_bytes: int) -> None:
        """A client took weights over from another."""
        assert self.timeline is not None
        self.timeline.hand_over(sender, receiver, num_bytes)

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

    def _by_holder(self) -> list[list[int]]:
        channel = getattr(self._module, "channel", None)
        return [] if channel is None else [list(own) for own in channel.by_holder]

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.log("system/virtual_seconds", self.seconds)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit" and self in pl_module.parties.listeners:
            pl_module.parties.listeners.remove(self)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.timeline is None else self.timeline.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = dict(state_dict) or None


def _holders_of(module: Any, first: Stage, example: Tensor) -> list[Holder]:
    """Returns what each of a client's holders has to do; none where it is one."""
    if first.num_holders == 1:
        return []
    segment: Segment = module.client
    sizes = [
        num_bytes(segment.state_of(*own).values())
        for own in module.stretches_of_holders
    ]
    works = [
        work_of({first.name: OneStretch(segment, own)}, example)[0]
        for own in first.stretches
    ]
    pairs = zip(works, sizes, strict=True)
    return [Holder(work, size / sum(sizes)) for work, size in pairs]


def _of_a_sample(
    before: Sequence[Sequence[int]], now: Sequence[Sequence[int]], count: int
) -> list[tuple[float, float]]:
    """Returns the bytes, forth and back, by which counts have grown, for a sample."""
    pairs = zip(before, now, strict=True)
    return [((n[0] - b[0]) / count, (n[1] - b[1]) / count) for b, n in pairs]


def virtual_seconds(trainer: pl.Trainer) -> float | None:
    """Returns the virtual seconds of a run so far; `None` where it has no clock."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    clocks = [c for c in callbacks if isinstance(c, VirtualClock)]
    return clocks[0].seconds if clocks else None
