"""`Engine`: carries out plans, in this process or with parties at other sites."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from operator import is_
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from split_lightning.batch_norm import Normalisation, is_only_mixer, statistics
from split_lightning.channel import Channel
from split_lightning.digests import digest
from split_lightning.engines.remote import (
    NO_SITES,
    RemoteParty,
    RemoteSite,
    SampleRef,
    Sites,
    options_of,
)
from split_lightning.message import AGGREGATOR, Values, role_of
from split_lightning.party import BackwardPass, Party, Stepping, step
from split_lightning.placement import PartyType, Placement
from split_lightning.running_mean import StateMean
from split_lightning.spill import SpillFolder
from split_lightning.step import (
    Batch,
    Labels,
    Member,
    Route,
    StepLosses,
    Visit,
    split_step,
)
from split_lightning.store import PARTS, Part, Seat, State, StateStore
from split_lightning.task import Task

# How clients that share a state step it: by the mean of their gradients, weighted by
# samples, or by the sum.
Cohort: TypeAlias = Literal["mean", "sum"]


_ROLES = ("client", "server")


class Samples(Protocol):
    """The batch of one client in a step, such as a `ClientBatch`."""

    @property
    def client_id(self) -> int:
        """The client."""

    @property
    def inputs(self) -> Tensor:
        """Its samples, of shape `(B, ...)`."""

    @property
    def targets(self) -> Tensor:
        """Their labels, of shape `(B,)`."""

    @property
    def ref(self) -> SampleRef | None:
        """Names them, where they are at the client's site."""


class Live(NamedTuple):
    """What is live for the clients of a step, until states move.

    Attributes:
        clients: The clients.
        route: The parties, in order.
        parties: The parties.
        counted: What counts the samples that each party trains on: the counter, the
            party's name in it, and the position of its client in the step.
    """

    clients: tuple[int, ...]
    route: Route
    parties: list[Any]
    counted: list[tuple[Counter[str], str, int]]


class Engine:
    """Carries out plans, with few live copies of each segment.

    Args:
        sites: The parties at other sites; `None`: all are in this process.
        spill_to: A folder for files of states at rest; they are removed in the end.
            `None`: in memory. A checkpoint has all of them, and is made in memory.

    Attributes:
        stores: One for each segment.
        placement: Which party has which segment.
        channel: Delivers messages.
        cohort: How clients of a step share one state; `None`: each has its own.
        may_discard: Whether a step may be discarded; then its buffers are kept.
        passed_on: The parts of a state that clients continue from, one after another.
        joint_norm: Whether BatchNorm of clients that share a state sees their samples
            as one batch.
        optimizers: The optimizers, by role.
        accumulated: Number of batches whose gradients wait for a step.
        means: The means in progress, by segment.
        seen: The clients that ever trained.
        last_client: The client that trained last; 0 before training.
        barrier: For each site its name of the state from which it resumes; others
            begin at the start.
    """

    def __init__(
        self, spill_to: str | Path | None = None, sites: Sites | None = None
    ) -> None:
        self.sites = sites or NO_SITES
        self.spill = None if spill_to is None else SpillFolder(spill_to)
        self.cohort: Cohort | None = None
        self.may_discard = False
        self.passed_on: Sequence[Part] = PARTS
        self.joint_norm = False
        self.optimizers: Mapping[str, Stepping] = {}
        self.backward_pass: BackwardPass = torch.autograd.backward
        self.party_type: Callable[..., Any] = Party
        self.clip: Callable[[list[nn.Parameter]], Any] | None = None
        self.serve: Callable[[Party, Engine], Any] = _itself
        self.raw: Mapping[str, Optimizer] = {}
        self._parameters: list[nn.Parameter] = []
        self.least_samples = 1  # that BatchNorm of a server needs in a batch
        self.copies = nn.ModuleList()  # live copies beside the first of each segment

    def build(
        self,
        modules: Sequence[nn.Module],
        depths: Sequence[int],
        placement: Placement,
        channel: Channel,
        task: Task,
    ) -> None:
        """Takes over the segments of a network.

        Args:
            modules: The segments.
            depths: The depth of each in the network.
            placement: Which party has which of them.
            channel: Delivers messages.
            task: The loss.
        """
        at_rest: Any = dict if self.spill is None else self.spill.store
        self.placement, self.channel, self.task = placement, channel, task
        self.stores: list[StateStore] = []
        for number, (module, depth) in enumerate(zip(modules, depths, strict=True)):
            roles = placement.roles_of(number)
            # Layers that clients and servers may have are live once for each.
            seats = [Seat(module, roles[0])]
            seats += [Seat(copy.deepcopy(module), role) for role in roles[1:]]
            self.copies.extend(seat.module for seat in seats[1:])
            self.stores.append(StateStore(depth, seats, at_rest))
        self.num_depths = 1 + max(depths)
        self.forget()

    def set_unsplit(self, role: str) -> None:
        """Sets the role that has the whole network, where it is not cut."""
        self.placement = Placement([(PartyType(role),)])
        (store,) = self.stores
        store.seats = [seat._replace(role=role) for seat in store.seats]
        store.roles = [role]
        store.forget()

    def restore_placement(self, state: Mapping[str, Any]) -> None:
        """Restores the placement of a checkpoint without its protocol.

        Args:
            state: What `state_dict` returned.
        """
        placed = state["placement"]
        if placed["unsplit_at"] is not None:
            self.set_unsplit(placed["unsplit_at"])
        counts = placed["num_clients"], placed["num_groups"]
        self.placement = self.placement.with_clients(*counts)
        self.cohort = placed["cohort"]

    def forget(self) -> None:
        """Returns to the time before the first step; the live weights stay."""
        for store in self.stores:
            store.forget()
        self.means: dict[int, StateMean] = {}
        # Of clients' batches on their way: by party and depth older parameters.
        self.stash: dict[tuple[int, int], dict[str, dict[int, State]]] = {}
        self.accumulated, self.number, self.last_client = 0, 0, 0
        self._changes = 0
        self.seen: set[int] = set()
        self.barrier: Mapping[str, str] = {}
        self._live: Live | None = None
        # The samples of the step that sites have begun ahead, and these sites.
        self._ahead: tuple[list[SampleRef | None], set[RemoteSite]] = [], set()
        self._unsettled: list[Future[Any]] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []  # before the step

    @property
    def num_live(self) -> int:
        """How many clients' segments are live at once."""
        counts = [
            sum(seat.role == "client" for seat in store.seats) for store in self.stores
        ]
        return max(1, *counts)

    def make_room(self, num_clients: int) -> None:
        """Makes live copies for as many clients as train in one step."""
        for store in self.stores:
            mine = [seat for seat in store.seats if seat.role == "client"]
            more = num_clients - len(mine) if mine else 0
            seats = [Seat(copy.deepcopy(mine[0].module), "client") for _ in range(more)]
            store.add_seats(seats)
            self.copies.extend(seat.module for seat in seats)

    def follow(
        self,
        num_clients: int,
        num_servers: int | None,
        unsplit_at: str | None,
        cohort: Cohort | None,
        joint_norm: bool,
        serve: Callable[[Party, Engine], Any],
    ) -> None:
        """Prepares for a protocol.

        Args:
            num_clients: Number of clients.
            num_servers: Number of servers; `None`: one for each client.
            unsplit_at: Which role has the whole network, if it is not split.
            cohort: How clients of a step share one state.
            joint_norm: Whether BatchNorm of a cohort sees all its samples as one batch.
            serve: Returns what computes for a server.
        """
        if unsplit_at is not None:
            self.set_unsplit(unsplit_at)
        self.placement = self.placement.with_clients(num_clients, num_servers)
        self.cohort, self.joint_norm, self.serve = cohort, joint_norm, serve
        self.changed()

    def require_joint_norm(self) -> None:
        """Stops where a client's layers beside BatchNorm may mix clients' samples.

        Raises:
            ValueError: Says what to change.
        """
        for number, store in enumerate(self.stores):
            is_clients = "client" in self.placement.roles_of(number)
            if is_clients and not is_only_mixer(store.seats[0].module):
                raise ValueError(
                    "Expected argument `joint_norm` to be False where the client "
                    "segment has layers beside BatchNorm that keep buffers: they may "
                    "mix clients' samples. Got True."
                )

    def parameters(self, role: str) -> list[nn.Parameter]:
        """Returns the live parameters that parties of a role may have."""
        is_one = len(self.stores) == 1  # not split: one optimizer for all roles
        seats = (seat for store in self.stores for seat in store.seats)
        return [
            p
            for seat in seats
            if is_one or seat.role == role
            for p in seat.module.parameters()
        ]

    def use(
        self, optimizers: Mapping[str, Optimizer], steps: Mapping[str, Stepping]
    ) -> None:
        """Uses the optimizers of each role, and their wrappers.

        One optimizer is for all roles.
        """
        first = next(iter(optimizers))
        roles = {role: role if role in optimizers else first for role in _ROLES}
        self.raw = {role: optimizers[own] for role, own in roles.items()}
        self.optimizers = {role: steps[own] for role, own in roles.items()}
        for store in self.stores:
            store.optimizers = self.raw
        self._parameters = [
            parameter
            for store in self.stores
            for seat in store.seats
            for parameter in seat.module.parameters()
        ]

    # Which party has what

    def segments_of(
        self, client_id: int, role: str = ""
    ) -> list[tuple[StateStore, str]]:
        """Returns the segments on a client's route, each with the party that has it."""
        names = self.placement.of(client_id)
        return [
            (store, name)
            for store, name in zip(self.stores, names, strict=True)
            if name is not None and name.startswith(role)
        ]

    def state_name(self, name: str) -> str:
        """Returns the name of a party's state: a cohort has one."""
        if self.cohort is None or role_of(name) != "client":
            return name
        return "client/all" + name.partition(".")[1] + name.partition(".")[2]

    # Training

    def compute(
        self,
        several: Sequence[Samples],
        scale: float = 1.0,
        upcoming: Sequence[Samples] = (),
    ) -> StepLosses:
        """Runs a step's forward pass, and both stages of its backward pass.

        Args:
            several: The batch of each client of the step.
            scale: What the loss is multiplied by before the backward pass.
            upcoming: The batches of the next step, where nothing before it concerns its
                clients. Sites that take no part in this step begin it meanwhile.
        """
        clients = tuple([own.client_id for own in several])
        batches = [
            Batch(own.ref or own.inputs, own.ref or own.targets) for own in several
        ]
        if self.cohort == "mean" and len(batches) > 1:
            sizes = [len(own.targets) for own in several]
            shares = [torch.tensor(size) / sum(sizes) for size in sizes]
            pairs = zip(batches, shares, strict=True)
            batches = [batch._replace(share=share) for batch, share in pairs]
        if self._live is None or self._live.clients != clients or self.stash:
            self._live = self._bring(clients)
        if self.may_discard:
            seats = (seat for store in self.stores for seat in store.seats)
            self._buffers = kept_buffers(seats)
        if self.cohort and self.joint_norm:
            self._exchange_statistics(clients)
        self.channel.recent.clear()
        self._settle(wait=False)
        self._require_begun(several)
        self._begin(upcoming, clients)
        route = self._live.route
        losses = split_step(self.number, batches, route, self.channel, scale)
        self.number += 1
        self.accumulated += 1
        return losses

    def _require_begun(self, several: Sequence[Samples]) -> None:
        """Takes back what sites began ahead, if another step came than expected."""
        expected, sites = self._ahead
        found = [own.ref for own in several]
        if not all(map(is_, found, expected)) or len(found) != len(expected):
            for site in sites:
                site.take_back()
        self._ahead = [], set()

    def _begin(self, several: Sequence[Samples], busy: Sequence[int]) -> None:
        """Has sites run the first segments of the next step ahead.

        Args:
            several: The batches of this step.
            busy: The clients whose sites compute the current step.
        """
        sites = {self.sites.of(n) for k in busy for _, n in self.segments_of(k)}
        self._ahead = [own.ref for own in several], set()
        for own in several:
            for store, name in self.segments_of(own.client_id):
                site = self.sites.of(name)
                if store.depth > 0 or site in {None, *sites} or own.ref is None:
                    continue
                assert site is not None
                # Random numbers are drawn in the order of the steps.
                if not site.draws(name, 0) and self._leaves(name, own.client_id):
                    self._provide(name, own.client_id, site)
                    site.begin(name, (self.number + 1, 0), own.ref)
                    self._ahead[1].add(site)

    def _leaves(self, name: str, client_id: int) -> bool:
        """Returns whether another party gets the outputs of a party's first segment."""
        found = self.segments_of(client_id)
        return (name, 1) not in {(own, store.depth) for store, own in found}

    def _provide(self, name: str, client_id: int, site: RemoteSite) -> None:
        """Sees to it that a party has its states at its site."""
        for number, store in enumerate(self.stores):
            if self.placement.of(client_id)[number] == name:
                site.provide(store, number, name)

    def _bring(self, clients: tuple[int, ...]) -> Live:
        """Makes live what a step of some clients needs."""
        if len({self.placement.group_of(client) for client in clients}) > 1:
            raise ValueError(
                "Expected the clients of a step to share a server, but those of "
                f"{list(clients)} do not."
            )
        segments: dict[str, dict[int, Any]] = {}
        members: list[list[Member]] = [[] for _ in range(self.num_depths)]
        counted = list[tuple[Counter[str], str, int]]()
        for number, store in enumerate(self.stores):
            wanted = []
            for position, client in enumerate(clients):
                name = self.placement.of(client)[number]
                if name is not None:
                    members[store.depth].append(Member(position, name, number))
                    wanted.append(self.state_name(name))
                    counted.append((store.samples, wanted[-1], position))
            is_passed_on = bool(store.last) and self.placement.num_groups == 1
            if self.placement.num_clients > 1 and not is_passed_on:
                store.remember_start()
            sites = {name: self.sites.of(name) for name in wanted}
            for name, site in sites.items():
                if site is not None:
                    site.provide(store, number, name)
                    segments.setdefault(name, {})[store.depth] = None
            here = [name for name, site in sites.items() if site is None]
            for name, seat in store.check_out(here).items():
                segments.setdefault(name, {})[store.depth] = seat
        parties = {
            name: self._party(name, own, clients) for name, own in segments.items()
        }
        visits = [self.visits(own, parties) for own in members]
        labels = [self.way_of_labels(client) for client in clients]
        self.seen.update(clients)
        self.last_client = clients[0]
        return Live(clients, Route(visits, labels), list(parties.values()), counted)

    def visits(
        self, members: Sequence[Member], parties: Mapping[str, Any]
    ) -> list[Visit]:
        """Returns the parties at a depth, each with the clients it computes for."""
        found: dict[str, list[Member]] = {}
        for member in members:
            found.setdefault(self.state_name(member.name), []).append(member)
        return [
            Visit(parties[name], own, role_of(name) == "client")
            for name, own in found.items()
        ]

    def way_of_labels(self, client: int) -> Labels:
        """Returns the way of a client's labels: behind its first smashed data."""
        parties: list[set[str]] = [set() for _ in range(self.num_depths)]
        for store, name in self.segments_of(client):
            parties[store.depth].add(name)
        cuts = (n for n in range(1, len(parties)) if parties[n] != parties[n - 1])
        (last,) = parties[-1]
        depth = next(cuts, len(parties) - 1)
        return Labels(self.placement.label_party(client), last, depth)

    def _party(
        self, name: str, segments: Mapping[int, Any], clients: tuple[int, ...]
    ) -> Any:
        site = self.sites.of(name)
        if site is not None:
            ways = [self.way_of_labels(client) for client in clients]
            sends = any(own.sender == name != own.receiver for own in ways)
            return RemoteParty(name, site, list(segments), sends)
        normalisation: Normalisation = "joint"
        if self.cohort and not self.joint_norm and role_of(name) == "client":
            mixes = all(is_only_mixer(seat.module) for seat in segments.values())
            normalisation = "by_client" if mixes else "apart"
        oldest = min((key for key in self.stash if key[0] == clients[0]), default=None)
        stash = {} if oldest is None else self.stash[oldest].get(name, {})
        party = self.party_type(
            name, segments, self.task, normalisation, stash, self.backward_pass
        )
        return self.serve(party, self) if role_of(name) == "server" else party

    def parties(self) -> list[Any]:
        """Returns the parties of the last step."""
        return [] if self._live is None else self._live.parties

    def step(self) -> None:
        """Steps the optimizers of the parties of the last step."""
        self.accumulated = 0
        for site, names in self._by_site().items():
            roles = dict.fromkeys(map(role_of, names))
            options = {role: options_of(self.raw[role]) for role in roles}
            self._unsettled.append(site.step(names, options))
        step(self.parties(), self.optimizers, self.clip)

    def _by_site(self) -> dict[RemoteSite, list[str]]:
        """Returns the parties of the last step that are at other sites, by site."""
        found: dict[RemoteSite, list[str]] = {}
        for party in self.parties():
            if isinstance(party, RemoteParty):
                found.setdefault(party.site, []).append(party.name)
        return found

    def are_sound(self) -> bool:
        """Returns whether the gradients of parties at other sites are finite."""
        found = [
            site.call("is_sound", names) for site, names in self._by_site().items()
        ]
        return all(sound.result() for sound in found)

    def settle(self) -> None:
        """Waits until parties at other sites have stepped.

        Raises:
            NotFinite: If one has not, because of a number that is not finite.
        """
        self._settle(wait=True)

    def _settle(self, wait: bool) -> None:
        left, self._unsettled = self._unsettled, []
        for stepped in left:
            if wait or stepped.done():
                stepped.result()
            else:
                self._unsettled.append(stepped)

    def step_one(self, party: Party) -> None:
        """Steps one party, apart from the step that Lightning counts."""
        if self.clip is not None:
            self.clip(party.parameters())
        optimizer = self.raw[party.role]
        optimizer.step()
        optimizer.zero_grad()

    def gradients(self) -> list[Tensor]:
        """Returns the gradients that there are now."""
        found = [parameter.grad for parameter in self._parameters]
        return [gradient for gradient in found if gradient is not None]

    def discard(self) -> None:
        """Drops the gradients that wait for a step, and what buffers have learned."""
        self.accumulated = 0
        for site, names in self._by_site().items():
            site.call("discard", names)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        for buffer, before in self._buffers:
            buffer.copy_(before)

    def trained(self, counts: Sequence[int]) -> None:
        """Notes on how many samples each client of the last step trained."""
        assert self._live is not None
        for samples, name, position in self._live.counted:
            samples[name] += counts[position]
        for client in self._live.clients if self.stash else ():
            del self.stash[min(key for key in self.stash if key[0] == client)]

    def _exchange_statistics(self, clients: Iterable[int]) -> None:
        """Sends what BatchNorm of clients needs to see their samples as one batch."""
        for _ in range(2):  # in the forward pass and in the backward pass
            own: dict[str, Values] = {}
            for client in clients:
                for store, name in self.segments_of(client, "client"):
                    payload = statistics(store.seats[0].module)
                    own[name] = own.get(name, ()) + payload
            for name, payload in own.items():
                self.channel.send("statistics", name, AGGREGATOR, payload)
            for name, payload in own.items():
                self.channel.send("statistics", AGGREGATOR, name, payload)

    def changed(self) -> None:
        """Notes that states moved: the next step looks them up."""
        self._live = None
        self._changes += 1

    @property
    def version(self) -> tuple[int, int]:
        """Is the same as long as no state changes."""
        return self.number, self._changes

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Returns all states at rest, in plain containers."""
        if self.sites.absences is not None:
            self._fetch_passed_on()
        return {
            "stores": [store.state_dict() for store in self.stores],
            "means": {n: mean.state_dict() for n, mean in self.means.items()},
            "stash": [[*key, own] for key, own in self.stash.items()],
            "accumulated": self.accumulated,
            "number": self.number,
            "seen": sorted(self.seen),
            "last_client": self.last_client,
            "barrier": self.sites.keep(),
            "num_live": self.num_live,
            "placement": {
                "num_clients": self.placement.num_clients,
                "num_groups": self.placement.num_groups,
                "unsplit_at": None if len(self.stores) > 1 else self.stores[0].roles[0],
                "cohort": self.cohort,
            },
        }

    def _fetch_passed_on(self) -> None:
        """Fetches the states that others continue from: their site may go away."""
        for store in self.stores:
            newest = [] if store.newest is None else [store.newest]
            for name in {*store.last.values(), *newest}:
                for part in self.passed_on:
                    if store.fetch(name, part):
                        self.changed()

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continues from what `state_dict` returned."""
        self.changed()
        self.barrier = state["barrier"]
        for number, store in enumerate(self.stores):
            store.load_state_dict(state["stores"][number])
            for part, states in store.own.items():
                for name in [name for name in states if states[name] is None]:
                    site = self.sites.of(name)
                    if site is None:
                        raise ValueError(
                            "Expected `ckpt_path` to be a checkpoint of a run in one "
                            f"process, but {name} was at another site. Resume it with "
                            "the engine that it began with."
                        )
                    states[name] = site.state_of(name, number, part)
        self.means = {}
        for number, mean in state["means"].items():
            self.means[number] = StateMean()
            self.means[number].load_state_dict(mean, device)
        self.stash = {(client, n): own for client, n, own in state["stash"]}
        self.accumulated, self.number = state["accumulated"], state["number"]
        self.seen, self.last_client = set(state["seen"]), state["last_client"]

    def open(self) -> None:
        """Makes the folder for states at rest, if there is one.

        Raises:
            ValueError: If it cannot be written.
        """
        if self.spill is not None:
            self.spill.open()

    def digest(self) -> str:
        """Returns a digest of the layers and weights that clients may have."""
        own = [store for store in self.stores if "client" in store.roles]
        return digest([store.seats[0].module for store in own])

    def parties_away(self) -> list[str]:
        """Returns the parties at other sites."""
        clients = range(self.placement.num_clients)
        names = dict.fromkeys(n for k in clients for n in self.placement.of(k) if n)
        return [name for name in names if self.sites.of(name) is not None]

    def close(self) -> None:
        """Forgets all states but the live ones, and removes the folder."""
        self.sites.close()
        self.forget()
        if self.spill is not None:
            self.spill.close()


def kept_buffers(seats: Iterable[Seat]) -> list[tuple[Tensor, Tensor]]:
    """Returns the buffers of live copies, each with its values now."""
    return [(own, own.clone()) for seat in seats for own in seat.module.buffers()]


def _itself(party: Party, engine: Engine) -> Any:
    return party
