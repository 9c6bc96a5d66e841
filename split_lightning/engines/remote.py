"""Parties at other sites: what stands for them, their states and their samples here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from split_lightning.engines.hello import ClientData
from split_lightning.message import Values, role_of
from split_lightning.party import Key, Losses
from split_lightning.pending import then
from split_lightning.placement import client_of
from split_lightning.store import PARTS, WEIGHTS, Part, State, StateAway, StateStore
from split_lightning.system.absences import Absences

if TYPE_CHECKING:
    from split_lightning.engines.shapes import Shapes

# The calls of a step, which do not look at states.
_STEPS = ("forward", "labels", "loss", "backward", "step", "is_sound", "discard")


class Call(NamedTuple):
    """What a site is asked to do: the name of a method of `Site`, and its arguments."""

    method: str
    arguments: tuple[Any, ...]


class SiteAbsent(RuntimeError):
    """A site was silent for too long.

    Attributes:
        client_id: The client that it computes for.
        reason: Says that it is absent.
    """

    def __init__(self, site: str, seconds: float) -> None:
        self.reason = f"{site} has been silent for {seconds:g} s (`deadline`)."
        super().__init__(
            f"{self.reason} Start it again, and resume the run from its last "
            "checkpoint."
        )
        self.client_id = client_of_site(site)


class RemoteSite:
    """A site with parties, as the process with the Trainer sees it.

    Args:
        name: Such as `client-3`.
        deliver: Takes a call to the site, in order; the future gets the reply.
    """

    def __init__(self, name: str, deliver: Callable[[Call], Future[Any]]) -> None:
        self.name = name
        self.deliver = deliver
        self.reset()

    def reset(self) -> None:
        """Forgets what the site knows: it begins a session."""
        self._options: dict[str, Any] = {}  # of optimizers, as the site knows them
        # The versions of the common states that the site has, by segment, role and
        # part; `None`: that of the start.
        self._common: dict[tuple[int, str, Part], int | None] = {}
        self._lent: dict[tuple[int, str], Any] = {}
        self._draws: dict[tuple[str, int], bool] = {}
        # What parties compute ahead of their step, by party.
        self._ahead: dict[str, Future[Any]] = {}

    def draws(self, party: str, depth: int) -> bool:
        """Returns whether a party's segment draws random numbers, or may."""
        return self._draws.get((party, depth), True)

    def note_draws(self, party: str, depth: int, draws: bool) -> None:
        """Notes whether a party's segment has drawn random numbers."""
        self._draws[party, depth] = draws

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Asks the site to do something; calls are carried out in order.

        A call that looks at a party's state takes back what it computed ahead.
        """
        if method not in _STEPS:
            every = method == "keep"
            self.take_back([p for p in self._ahead if every or p in arguments])
        return self.deliver(Call(method, arguments))

    def begin(self, party: str, key: Key, samples: SampleRef) -> None:
        """Has a party run its first segment ahead of its step."""
        call = Call("begin", (party, key, (samples,)))
        self._ahead[party] = self.deliver(call)

    def begun(self, party: str) -> Future[Any] | None:
        """Returns what a party computed ahead, now that its step is there."""
        return self._ahead.pop(party, None)

    def take_back(self, parties: Iterable[str] | None = None) -> None:
        """Takes back what parties computed ahead; `None`: all of them."""
        for party in list(self._ahead if parties is None else parties):
            del self._ahead[party]
            self.deliver(Call("take_back", (party,)))

    def provide(self, store: StateStore, segment: int, party: str) -> None:
        """Sees to it that a party has its state of a segment at the site."""
        for part in PARTS:
            own = store.own[part].get(party)
            if isinstance(own, StateAway):
                continue
            if store.has_own(party, part):  # it was another party's, here
                self.call("write", party, segment, part, store.peek(party, part))
                store.drop(party, [part])
            else:
                self._adopt(store, segment, party, part)
            store.own[part][party] = self.state_of(party, segment, part)

    def _adopt(self, store: StateStore, segment: int, party: str, part: Part) -> None:
        """Lets a party continue from the common state; sends it where it is new."""
        role = role_of(party)
        common = store.common[role].get(part)
        if part == "optimizer":
            self.call("write", party, segment, part, common or {})
            return
        is_start = common is store.start.get(part)
        version = None if is_start else store.version_of_common(role, part)
        key = segment, role, part
        if self._common.get(key) != version:
            self.call("share", segment, role, part, None if is_start else common)
            self._common[key] = version
        self.call("adopt", party, segment, part)

    def lend(self, store: StateStore, segment: int, party: str, token: Any) -> None:
        """Sees to it that the site can evaluate a segment with a party's weights.

        Args:
            store: The states of the segment.
            segment: Its number.
            party: The party, which may be at another site.
            token: Is the same as long as no state changes.
        """
        if self._lent.get((segment, party)) == token:
            return
        self._lent[segment, party] = token
        for part in WEIGHTS:
            own = store.own[part].get(party)
            if own is None:
                self._adopt(store, segment, party, part)
            elif not isinstance(own, _AtSite):
                self.call("write", party, segment, part, own)
            elif own.site is not self:
                self.call("write", party, segment, part, own.fetch())

    def step(self, parties: Sequence[str], options: Mapping[str, Any]) -> Future[Any]:
        """Lets parties step, with the options that their optimizers have now."""
        new = {k: v for k, v in options.items() if self._options.get(k) != v}
        self._options |= new
        return self.call("step", list(parties), new)

    def state_of(self, party: str, segment: int, part: Part) -> StateAway:
        """Returns what stands for a part of a party's state that is at the site."""
        return _AtSite(self, party, segment, part)


class Sites(ABC):
    """The sites of a run.

    Attributes:
        absences: Which clients were absent; `None`: all are waited for.
    """

    absences: Absences | None = None

    @abstractmethod
    def of(self, party: str) -> RemoteSite | None:
        """Returns the site of a party; `None`: it is in this process."""

    @abstractmethod
    def meet(
        self, parties: Sequence[str], agreed: Mapping[str, str]
    ) -> list[ClientData]:
        """Waits until all sites have said hello, unless they have.

        Args:
            parties: The parties at sites.
            agreed: Digests of what all have to agree on, by key.

        Returns:
            What clients say about their samples.
        """

    @abstractmethod
    def expect(self, shapes: Shapes) -> None:
        """Takes notice of what sites send looks like, before the first session."""

    @abstractmethod
    def begin(self, barrier: Mapping[str, str]) -> None:
        """Begins a session of training.

        Args:
            barrier: For each site the state from which it begins; others begin at the
                start of training.
        """

    @abstractmethod
    def keep(self) -> Mapping[str, str]:
        """Has all sites save their states; returns the name of each site's."""

    @abstractmethod
    def end(self, final: Mapping[str, Sequence[tuple[int, str]]]) -> None:
        """Tells the sites that the run is complete.

        Args:
            final: For each site the segments of the final networks of its clients, each
                with the party that has its weights.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends all connections; sites wait for the run to be resumed."""


class _NoSites(Sites):
    @override
    def of(self, party: str) -> RemoteSite | None:
        return None

    @override
    def meet(self, *unused: Any) -> list[ClientData]:
        return []

    @override
    def expect(self, shapes: Shapes) -> None:
        pass

    @override
    def begin(self, barrier: Mapping[str, str]) -> None:
        pass

    @override
    def keep(self) -> Mapping[str, str]:
        return {}

    @override
    def end(self, final: Mapping[str, Sequence[tuple[int, str]]]) -> None:
        pass

    @override
    def close(self) -> None:
        pass


NO_SITES = _NoSites()  # all parties are in this process


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns the plain options of an optimizer's groups, such as the learning rate."""
    plain = (bool, int, float, str, tuple, list, type(None))
    return [
        {k: v for k, v in group.items() if k != "params" and isinstance(v, plain)}
        for group in optimizer.param_groups
    ]


class _AtSite(StateAway):
    """A part of a party's state that is at its site."""

    def __init__(self, site: RemoteSite, party: str, segment: int, part: Part) -> None:
        self.site = site
        self.name = party, segment, part

    def fetch(self) -> State:
        state: State = self.site.call("read", *self.name).result()
        return state


class Kept(NamedTuple):
    """Stands for a value that stays at a site.

    Attributes:
        number: Its number there.
        requires_grad: Whether it needs a gradient.
    """

    number: int
    requires_grad: bool


@dataclass
class SampleRef:
    """Names samples at a client's site: a batch of a plan, or of an evaluation.

    Attributes:
        part: `train`, `val` or `test`.
        round: The round.
        client_id: The client.
        number: The number of the batch among the client's.
        pass_number: The client's pass over its samples.
        start: The position of the first sample in the order of the pass.
        num_samples: Number of samples.
        labels: The labels, once they are on their way.
    """

    part: str
    round: int
    client_id: int
    number: int
    pass_number: int
    start: int
    num_samples: int
    labels: Future[Values] | None = None

    def __len__(self) -> int:
        return self.num_samples


class RemoteParty:
    """A party at another site. It takes the same calls as `Party`, for one client.

    What it returns are futures; the channel waits for them.

    Args:
        name: Such as `client/3`.
        site: Its site.
        depths: The depths of its segments in the network.
        sends_labels: Whether the party that computes the loss needs its labels.
    """

    def __init__(
        self,
        name: str,
        site: RemoteSite,
        depths: Sequence[int],
        sends_labels: bool,
    ) -> None:
        self.name, self.role = name, role_of(name)
        self.site = site
        self.depths = set(depths)
        self.sends_labels = sends_labels

    def forward(
        self, key: Key, several: Sequence[Values], sizes: Sequence[int]
    ) -> list[Any]:
        """Has the site run a segment; returns the smashed data as a future."""
        (values,) = several
        begun = self.site.begun(self.name) if key[1] == 0 else None
        if begun is not None:
            self._send_labels(values)
            return [begun]
        stays = key[1] + 1 in self.depths
        # All parties draw from one sequence of random numbers, in the order of a step.
        random = torch.get_rng_state() if self.site.draws(self.name, key[1]) else None
        reply = self.site.call("forward", self.name, key, values, stays, random)
        self._send_labels(values)
        if random is not None:
            new = reply.result()[1]
            torch.set_rng_state(new)
            self.site.note_draws(self.name, key[1], not torch.equal(new, random))
        return [then(reply, lambda found: found[0])]

    def _send_labels(self, values: Values) -> None:
        for value in values:
            if isinstance(value, SampleRef) and self.sends_labels:
                value.labels = self.site.call("labels", value)

    def loss(
        self,
        key: Key,
        targets: Sequence[Any],
        weights: Sequence[Tensor] | None = None,
        shares: Sequence[Tensor] | None = None,
        scale: float = 1.0,
    ) -> Future[Losses]:
        """Has the site run stage 1 of the backward pass."""
        weight = None if weights is None else weights[0]
        reply = self.site.call("loss", self.name, key, targets[0], weight, scale)
        losses: Future[Losses] = then(
            reply, lambda found: Losses(found[0], [found[1]], [found[2]])
        )
        return losses

    def backward(
        self,
        key: Key,
        gradients: Sequence[Values],
        shares: Sequence[Tensor] | None = None,
    ) -> list[Any]:
        """Has the site run stage 2 of the backward pass."""
        return [self.site.call("backward", self.name, key, gradients[0])]

    def parameters(self) -> list[nn.Parameter]:
        """Returns no parameters: they are at the site."""
        return []


def site_of(party: str) -> str:
    """Returns the name of a party's site.

    >>> site_of("client/3")
    'client-3'
    """
    return party.replace("/", "-")


def client_of_site(site: str) -> int:
    """Returns the client that a site computes for.

    >>> client_of_site("client-3.1")
    3
    """
    return client_of(site.replace("-", "/"))
