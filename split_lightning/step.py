"""`split_step`: one training step, from party to party along the network and back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from split_lightning.channel import Channel
from split_lightning.message import Computed, Direction, Values, role_of
from split_lightning.party import Party


class Waypoint(NamedTuple):
    """A party on a route.

    Attributes:
        name: Its name in messages.
        party: What computes for it here: clients that share a state share one.
        segment: The number of the segment.
    """

    name: str
    party: Party
    segment: int


class Batch(NamedTuple):
    """What one client brings to a step.

    Attributes:
        inputs: Its samples, of shape `(B, ...)`.
        targets: Their labels, of shape `(B,)`.
        label_party: The name of the party that has the labels.
        share: What its gradient counts in a mean over clients that share a state;
            `None`: it counts as it is.
    """

    inputs: Tensor
    targets: Tensor
    label_party: str
    share: Tensor | None = None


# For each place in the network, and for each client of the step, the parties that
# compute there, side by side.
Route: TypeAlias = list[list[tuple[Waypoint, ...]]]


class StepLosses(NamedTuple):
    """The losses of a step, detached.

    Attributes:
        total: The mean loss over all samples.
        own: Each client's mean loss.
    """

    total: Tensor
    own: list[Tensor]


def split_step(
    number: int,
    batches: Sequence[Batch],
    route: Route,
    channel: Channel,
    scale: float = 1.0,
) -> StepLosses:
    """Runs the forward pass along a route, and the backward pass in its two stages.

    Vanilla split learning (Gupta and Raskar 2018, https://arxiv.org/abs/1810.06060),
    U-shapes, several servers in a row, holders of parts (joined along the features) and
    clients that act together (joined along the batch) are all routes. No optimizer
    steps.

    Args:
        number: Names the step.
        batches: One batch for each client of the step.
        route: Who computes.
        channel: Delivers what parties send each other.
        scale: What the loss is multiplied by before the backward pass.
    """
    flow = _Flow(number, batches, route, channel)
    for place in range(len(route)):
        flow.forward(place)
    losses = flow.loss(scale)  # stage 1: down to the last cut
    for place in reversed(range(len(route) - 1)):
        flow.backward(place)  # stage 2: on from cut to cut
    return losses


class _Flow:
    """What is on its way between the parties of a step.

    `sent` has, for each place and client, what comes to the place: pairs of a sender
    and its values. `returned` has for each client the gradients, by receiver.
    """

    def __init__(
        self, number: int, batches: Sequence[Batch], route: Route, channel: Channel
    ) -> None:
        self.number = number
        self.batches = batches
        self.route = route
        self.channel = channel
        self.sizes = [len(batch.targets) for batch in batches]
        self.targets = [batch.targets for batch in batches]
        self.sent: list[list[list[tuple[str, Values]]]] = []
        self.sent.append([[("", (batch.inputs,))] for batch in batches])
        self.returned: list[dict[str, Values]] = []
        self.labelled: set[int] = set()

    def forward(self, place: int) -> None:
        """Lets the parties at a place compute on what they are sent."""
        arrived: list[dict[str, Values]] = []
        for client, waypoints in enumerate(self.route[place]):
            arrived.append(
                {own.name: self._receive(client, own.name, place) for own in waypoints}
            )
            self._send_labels(client, place)
        self.sent.append([[] for _ in self.batches])
        for party, members in by_party(self.route[place]):
            several = [arrived[client][waypoint.name] for client, waypoint in members]
            sizes = [self.sizes[client] for client, _ in members]
            outputs = party.forward((self.number, place), several, sizes)
            for (client, waypoint), values in zip(members, outputs, strict=True):
                self.sent[-1][client].append((waypoint.name, values))
                self._notify(waypoint, "forward", client)

    def _receive(self, client: int, name: str, place: int) -> Values:
        values: Values = ()
        for sender, own in self.sent[place][client]:
            ends = (sender or name, name)
            values += self.channel.send("smashed", *ends, own, self.number, place - 1)
        return values

    def _send_labels(self, client: int, place: int) -> None:
        """Sends a client's labels right behind its first smashed data."""
        here = {waypoint.name for waypoint in self.route[place][client]}
        before = {sender for sender, _ in self.sent[place][client]}
        is_last = place == len(self.route) - 1
        if client in self.labelled or not (is_last or (place and here - before)):
            return
        self.labelled.add(client)
        ends = self.batches[client].label_party, self.route[-1][client][0].name
        own = (self.batches[client].targets,)
        (self.targets[client],) = self.channel.send("labels", *ends, own, self.number)

    def loss(self, scale: float) -> StepLosses:
        """Lets those that have the labels compute the loss, and stage 1."""
        place = len(self.route) - 1
        totals, own = list[Tensor](), [torch.empty(0)] * len(self.batches)
        gradients: list[dict[str, Values]] = [{} for _ in self.batches]
        for party, members in by_party(self.route[place]):
            clients = [client for client, _ in members]
            targets = [self.targets[client] for client in clients]
            weights = self._weights(party, clients)
            found = party.loss((self.number, place), targets, weights, scale)
            totals.append(found.total)
            for (client, waypoint), loss, values in zip(
                members, found.own, found.gradients, strict=True
            ):
                own[client] = loss
                gradients[client][waypoint.name] = self._weigh_out(
                    party, client, values
                )
                self._notify(waypoint, "backward", client)
        self._return(place, gradients)
        return StepLosses(torch.stack(totals).sum() if totals[1:] else totals[0], own)

    def backward(self, place: int) -> None:
        """Lets the parties at a place continue the backward pass: stage 2."""
        arrived, gradients = self.returned, [dict[str, Values]() for _ in self.batches]
        for party, members in by_party(self.route[place]):
            several = [
                self._weigh_in(party, client, arrived[client][waypoint.name])
                for client, waypoint in members
            ]
            found = party.backward((self.number, place), several)
            for (client, waypoint), values in zip(members, found, strict=True):
                gradients[client][waypoint.name] = self._weigh_out(
                    party, client, values
                )
                self._notify(waypoint, "backward", client)
        self._return(place, gradients)

    def _return(self, place: int, gradients: list[dict[str, Values]]) -> None:
        """Sends gradients back to the parties before a place."""
        self.returned = [{} for _ in self.batches]
        if place == 1:
            gradients = self.channel.lower(gradients)
        for client, by_name in enumerate(gradients if place else ()):
            for name, values in by_name.items():
                rest = iter(values)
                for sender, own in self.sent[place][client]:
                    part = tuple(islice(rest, len(own)))
                    self.returned[client][sender] = self.channel.send(
                        "gradient", name, sender, part, self.number, place - 1
                    )

    # Clients that share a state act on the mean of their gradients: a client multiplies
    # what it gets by its share, and what it sends on is as it was.

    def _weights(self, party: Party, clients: Sequence[int]) -> list[Tensor] | None:
        """Returns what each client's mean loss counts; `None`: one mean over all."""
        if len(self.batches) == 1 or role_of(party.name) == "server":
            return None
        total = sum(self.sizes)
        parts = [torch.tensor(self.sizes[client]) for client in clients]
        shares = [self.batches[client].share for client in clients]
        return [
            n / total if share is None else share * n / total
            for n, share in zip(parts, shares, strict=True)
        ]

    def _weigh_in(self, party: Party, client: int, values: Values) -> Values:
        share = self.batches[client].share
        if share is None or role_of(party.name) == "server":
            return values
        return tuple(None if v is None else v * share.to(v) for v in values)

    def _weigh_out(self, party: Party, client: int, values: Values) -> Values:
        share = self.batches[client].share
        if share is None or role_of(party.name) == "server":
            return values
        return tuple(None if v is None else v * (1 / share).to(v) for v in values)

    def _notify(self, waypoint: Waypoint, direction: Direction, client: int) -> None:
        size = self.sizes[client]
        self.channel.notify(Computed(waypoint.name, waypoint.segment, direction, size))


def by_party(
    waypoints: Sequence[tuple[Waypoint, ...]],
) -> list[tuple[Party, list[tuple[int, Waypoint]]]]:
    """Returns for each party the clients that it computes for."""
    members: dict[Party, list[tuple[int, Waypoint]]] = {}
    for client, own in enumerate(waypoints):
        for waypoint in own:
            members.setdefault(waypoint.party, []).append((client, waypoint))
    return list(members.items())
