"""`VirtualClock`: the seconds that a run would take on other devices and links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from split_lightning.channel import num_bytes
from split_lightning.data.asynchronous_schedule import AsynchronousSchedule
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.data.schedule import PooledSchedule
from split_lightning.data.seconds import EqualSeconds
from split_lightning.kinds import places_of
from split_lightning.models.segment import Stretches
from split_lightning.route import Party, Stage
from split_lightning.system import (
    Holder,
    System,
    SystemSeconds,
    Timeline,
    Work,
    crossing_of,
    work_of,
)
from split_lightning.system.timeline import Itinerary

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
        self._itineraries: dict[int, Itinerary] = {}  # by kind of client
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
        self._pooled = isinstance(data.schedule, PooledSchedule)
        self._example = pl_module.fed(data.example())
        self._itineraries.clear()
        self.timeline = Timeline(
            self.system,
            *self._of_client(0),
            self._of_client,
            _holders_of(pl_module, self._example),
            getattr(pl_module, "label_holder", 0),
        )
        if trainer.ckpt_path is not None:
            self.timeline.load_state_dict(self._state_to_go_on())
        self._state = None
        self._in_flight = data.schedule.in_flight
        if isinstance(data.schedule, AsynchronousSchedule):
            self._tell(data.schedule, trainer, pl_module)
        if self not in pl_module.parties.listeners:
            pl_module.parties.listeners.append(self)

    def _state_to_go_on(self) -> dict[str, Any]:
        """Returns the times of the run that goes on.

        Raises:
            ValueError: If it had no clock, or one of another system.
        """
        if self._state is None:
            raise ValueError(
                "Expected `ckpt_path` to be a checkpoint of a run with a virtual "
                "clock, to go on with its time, but it has none: how long its rounds "
                "so far took is not known. Leave the clock out (system=none), or begin "
                "anew."
            )
        before, now = self._state.get("system"), repr(self.system)
        if before not in (None, now):
            raise ValueError(
                "Expected the devices and links that the run of `ckpt_path` began with "
                f"(`system`), to go on with its time ({before}), but got {now}."
            )
        return self._state

    def _of_client(self, client_id: int) -> Itinerary:
        """Returns who computes what for a client, and what that takes."""
        parties = self._module.parties
        kind = parties.kinds.kind_of(client_id, parties.num_clients)
        if kind not in self._itineraries:
            route = places_of(parties.route_of(client_id))
            if self._pooled:  # one network, with all samples
                route = [Stage("server", 0)]
            places = self._module.places(client_id)
            work = work_of({str(i): own for i, own in enumerate(places)}, self._example)
            times = getattr(self._module, "server_work", 1)
            scaled = [
                Work(times * own.forward, times * own.backward)
                if stage.party == "server"
                else own
                for stage, own in zip(route, work, strict=True)
            ]
            self._itineraries[kind] = (route, scaled)
        return self._itineraries[kind]

    def _tell(
        self, schedule: AsynchronousSchedule, trainer: pl.Trainer, module: Any
    ) -> None:
        """Tells a schedule that plans by time how long things take."""
        if module.holders.number > 1:
            raise MisconfigurationException(
                "AsynchronousSchedule plans by the times of clients that are a device "
                "each, and here each is a group of holders. Leave the clock out "
                "(system=none), or let clients take turns."
            )
        route, work = self._of_client(0)
        with trainer.precision_plugin.train_step_context():
            crossing = crossing_of(module.stages(), self._example)
        forth, back = crossing[0]
        crossing[0] = (forth + _label_bytes(route, 0), back)
        weight_bytes = module.parties.clients.weight_bytes
        schedule.seconds = SystemSeconds(
            self.system, route, work, crossing, weight_bytes
        )
        self._schedule = schedule

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # The module has set its counts by now.
        self._crossed, self._crossed_by_holder = self._by_cut(), self._by_holder()

    def stepped(self, samples: Mapping[int, int], server: int) -> None:
        """Clients made a step on some samples each, with a server."""
        assert self.timeline is not None
        before, self._crossed = self._crossed, self._by_cut()
        routes = {k: self._of_client(k)[0] for k in samples}
        crossing = []
        for place, (now, then) in enumerate(zip(self._crossed, before, strict=True)):
            through = [k for k, route in routes.items() if route[place].is_cut]
            count = sum(samples[k] for k in through) or 1
            labels = max((_label_bytes(routes[k], place) for k in through), default=0)
            crossing.append(_of_a_sample(then, now, count, labels))
        before, self._crossed_by_holder = self._crossed_by_holder, self._by_holder()
        of_holders = []
        for holder, (now, then) in enumerate(
            zip(self._crossed_by_holder, before, strict=True)
        ):
            has_labels = holder == self.timeline.label_holder
            route, *_ = routes.values()
            labels = _label_bytes(route, 0) * has_labels
            count = sum(samples.values())
            of_holders.append(_of_a_sample(then, now, count, labels))
        self.timeline.step(samples, server, crossing, self._in_flight, of_holders)

    def handed_over(
        self, sender: int | None, receiver: int | None, num_bytes: int, server: int
    ) -> None:
        """A client took weights over from another; `None` is its server."""
        assert self.timeline is not None
        self.timeline.hand_over(sender, receiver, num_bytes, server)

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
        if self._schedule is not None:
            self._schedule.seconds, self._schedule = EqualSeconds(), None

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.timeline is None:
            return {}
        return {"system": repr(self.system), **self.timeline.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = dict(state_dict) or None


def _holders_of(module: Any, example: Tensor) -> list[Holder]:
    """Returns what each of a client's holders has to do; none where it is one."""
    stretches = getattr(module, "stretches_of_holders", [[0]])
    if len(stretches) == 1:
        return []
    sizes = [num_bytes(module.client.state_of(*own).values()) for own in stretches]
    works = [
        work_of({"holder": Stretches([module.client], [own[0]])}, example)[0]
        for own in stretches
    ]
    pairs = zip(works, sizes, strict=True)
    return [Holder(work, size / sum(sizes)) for work, size in pairs]


def _of_a_sample(
    before: Sequence[int], now: Sequence[int], count: int, labels: int
) -> tuple[float, float]:
    """Returns the bytes, forth and back, by which counts have grown, for a sample.

    Labels go along with what is sent, if anything is.
    """
    forth, back = (n - b for n, b in zip(now, before, strict=True))
    return (forth / count + labels if forth else 0.0), back / count


def _label_bytes(route: Sequence[Stage], place: int) -> int:
    """Returns the bytes of a label at a cut: at the first, if a server has the loss."""
    is_first = place == [stage.is_cut for stage in route].index(True)
    return _BYTES_PER_LABEL if is_first and route[-1].party == "server" else 0


def virtual_seconds(trainer: pl.Trainer) -> float | None:
    """Returns the virtual seconds of a run so far; `None` where it has no clock."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    clocks = [c for c in callbacks if isinstance(c, VirtualClock)]
    return clocks[0].seconds if clocks else None
