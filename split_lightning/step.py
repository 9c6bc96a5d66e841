"""`split_step`: one training step, from party to party along the network and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from split_lightning.channel import Channel
from split_lightning.message import Computed, Direction, Values
from split_lightning.party import Party
from split_lightning.pending import here, then


class Member(NamedTuple):
    """A client at a party.

    Attributes:
        client: Its position among the clients of the step.
        name: The party's name in messages.
        segment: The number of the segment.
    """

    client: int
    name: str
    segment: int


class Visit(NamedTuple):
    """A party that computes at a depth in the network, and for which clients.

    Attributes:
        party: The party: clients that share a state share one.
        members: The clients.
        is_client: Whether it is a client, not a server.
    """

    party: Party
    members: list[Member]
    is_client: bool


class Labels(NamedTuple):
    """How a client's labels get to the loss.

    Attributes:
        sender: The party that has them.
        receiver: The party that computes the loss.
        depth: The depth in the network behind whose smashed data they follow.
    """

    sender: str
    receiver: str
    depth: int


class Route(NamedTuple):
    """The parties of a step, in the order of the network.

    Attributes:
        visits: For each depth in the network the parties that compute there.
        labels: For each client of the step the way of its labels.
    """

    visits: list[list[Visit]]
    labels: list[Labels]


class Batch(NamedTuple):
    """The batch of one client in a step.

    Attributes:
        inputs: Its samples, of shape `(B, ...)`; or what stands for them, for a party
            at another site.
        targets: Their labels, of shape `(B,)`; or what stands for them.
        share: The weight of its gradient in a mean over clients that share a state;
            `None`: there is no mean.
    """

    inputs: Any
    targets: Any
    share: Tensor | None = None


class StepLosses(NamedTuple):
    """The losses of a step, detached; on their way where one other site has all of it.

    Attributes:
        total: The mean loss over all samples.
        own: Each client's mean loss.
    """

    total: Any
    own: list[Any]

    @property
    def are_here(self) -> bool:
        """Whether none is on its way."""
        return isinstance(self.total, Tensor)

    def here(self) -> StepLosses:
        """Returns them, once they are here."""
        return StepLosses(here(self.total), [here(own) for own in self.own])


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
    clients that train together (joined along the batch) are all routes. No optimizer
    steps.

    Args:
        number: Names the step.
        batches: One batch for each client of the step.
        route: The parties, in order.
        channel: Delivers what parties send each other.
        scale: What the loss is multiplied by before the backward pass.
    """
    flow = _Flow(number, batches, route, channel)
    last = len(route.visits) - 1
    for depth in range(last + 1):
        flow.forward(depth)
    losses = flow.loss(last, scale)  # stage 1: down to the last cut
    for depth in reversed(range(last)):
        flow.backward(depth)  # stage 2: on from cut to cut
    return losses


class _Flow:
    """The values on their way between the parties of a step.

    `sent` has, for each depth and client, what comes there: pairs of a sender
    and its values. `returned` has for each client the gradients, by receiver.
    """

    def __init__(
        self, number: int, batches: Sequence[Batch], route: Route, channel: Channel
    ) -> None:
        self.number, self.batches = number, batches
        self.route, self.channel = route, channel
        self.targets = [batch.targets for batch in batches]
        self.sizes = [len(own) for own in self.targets]
        self.sent: list[list[list[tuple[str, Values]]]] = []
        self.sent.append([[("", (batch.inputs,))] for batch in batches])
        self.returned: list[dict[str, Values]] = []

    def forward(self, depth: int) -> None:
        """Runs the forward pass of the parties at a depth."""
        send, arriving = self.channel.send, self.sent[depth]
        leaving: list[list[tuple[str, Values]]] = [[] for _ in self.batches]
        for party, members, _ in self.route.visits[depth]:
            several, sizes = list[Values](), list[int]()
            for client, name, _ in members:
                values: Values = ()
                for sender, own in arriving[client]:
                    if sender and sender != name:
                        own = send("smashed", sender, name, own, self.number, depth - 1)
                    values += here(own)
                several.append(values)
                sizes.append(self.sizes[client])
                way = self.route.labels[client]
                if way.depth == depth and way.sender != way.receiver:
                    own = self.targets[client]
                    labels = (own,) if isinstance(own, Tensor) else own.labels
                    (self.targets[client],) = send(
                        "labels",
                        way.sender,
                        way.receiver,
                        labels,
                        self.number,
                        depth - 1,
                    )
            outputs = party.forward((self.number, depth), several, sizes)
            for member, values in zip(members, outputs, strict=True):
                leaving[member.client].append((member.name, values))
            if self.channel.computations:
                self._note(members, "forward")
        self.sent.append(leaving)

    def loss(self, depth: int, scale: float) -> StepLosses:
        """Runs stage 1 at the parties with the labels: down to the last cut."""
        losses = [torch.empty(0)] * len(self.batches)
        gradients: list[dict[str, Values]] = [{} for _ in self.batches]
        total: Tensor | None = None
        begun = list[tuple[list[Member], list[Tensor] | None, Any]]()
        for party, members, is_client in self.route.visits[depth]:
            targets = [self.targets[member.client] for member in members]
            weights, shares = self._weights(members, is_client)
            found = party.loss((self.number, depth), targets, weights, shares, scale)
            begun.append((members, weights, found))
        for members, weights, found in begun:
            if self.channel.computations:
                self._note(members, "backward")
            if depth == 0 and len(self.batches) == 1:  # no other party waits for it
                own = then(found, lambda reply: reply.own[0])
                return StepLosses(then(found, lambda reply: reply.total), [own])
            found = here(found)
            total = found.total if weights is None else None
            returned = zip(members, found.own, found.gradients, strict=True)
            for (client, name, _), own, values in returned:
                losses[client] = own
                gradients[client][name] = values
        self._return(depth, gradients)
        if total is None:  # each client has a loss of its own
            parts = torch.tensor(self.sizes) / sum(self.sizes)
            total = torch.stack(losses) @ parts.to(losses[0])
        return StepLosses(total, losses)

    def backward(self, depth: int) -> None:
        """Runs stage 2 at the parties at a depth."""
        gradients: list[dict[str, Values]] = [{} for _ in self.batches]
        for party, members, is_client in self.route.visits[depth]:
            several = [self.returned[client][name] for client, name, _ in members]
            _, shares = self._weights(members, is_client)
            found = party.backward((self.number, depth), several, shares)
            for (client, name, _), values in zip(members, found, strict=True):
                gradients[client][name] = values
            if self.channel.computations:
                self._note(members, "backward")
        self._return(depth, gradients)

    def _return(self, depth: int, gradients: list[dict[str, Values]]) -> None:
        """Sends gradients back to the parties before a depth."""
        if depth == 0:
            return
        if depth == 1 and self.channel.downlink is not None:
            gradients = self.channel.downlink(gradients)
        self.returned = [{} for _ in self.batches]
        for client, by_name in enumerate(gradients):
            for name, values in by_name.items():
                values, start = here(values), 0
                for sender, sent in self.sent[depth][client]:
                    own = here(sent)
                    part = values[start : start + len(own)]
                    start += len(own)
                    if sender != name:
                        part = self.channel.send(
                            "gradient", name, sender, part, self.number, depth - 1
                        )
                    self.returned[client][sender] = part

    def _weights(
        self, members: Sequence[Member], is_client: bool
    ) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Returns the weights of clients with their own loss, and of their gradients.

        Returns:
            For each client the weight of its mean loss in the step's; `None`: the loss
            is one mean over all samples. And its share in a mean of gradients; `None`:
            gradients are not averaged.
        """
        if not is_client or len(self.batches) == 1:
            return None, None
        parts = [torch.tensor(self.sizes[member.client]) for member in members]
        shares = [self.batches[member.client].share for member in members]
        known = [share for share in shares if share is not None]
        if len(known) < len(shares):
            return [part / sum(self.sizes) for part in parts], None
        pairs = zip(known, parts, strict=True)
        return [share * part / sum(self.sizes) for share, part in pairs], known

    def _note(self, members: Sequence[Member], direction: Direction) -> None:
        """Notifies those that watch computations."""
        for observer in self.channel.computations:
            for client, name, segment in members:
                observer(Computed(name, segment, direction, self.sizes[client]))
