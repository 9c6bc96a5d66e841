"""`SplitStep`: what the parties of a step compute, and send to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from split_lightning import joint_step
from split_lightning.batch_norm import Normalisation, statistics_bytes
from split_lightning.channel import Activations, CutLayerChannel
from split_lightning.data.loader import JointBatch, StepBatch
from split_lightning.flow import Bundle, Crossed, bundled, gathered, members_of
from split_lightning.holders import parameters_by_holder
from split_lightning.joint_step import Several
from split_lightning.kinds import Stop, named, stages_of
from split_lightning.manual_optimization import ManualOptimization
from split_lightning.models.segment import Segment


class SplitStep(ManualOptimization):
    """The parts of a step, from stretch to stretch of the network and back.

    In which order they take place, and where the backward passes stand, is what
    `SplitLightningModule.training_step` says, of which this is the base.

    Attributes:
        channel: What carries all that crosses a cut.
        cut_gradient: See `SplitLightningModule`, as for the next two.
        batch_norm: Whose samples BatchNorm of the client segment sees.
        average_cut_gradients: How many clients get the mean of their gradients.
        stretches_of_holders: For each holder of a client its stretches of the segment.
    """

    channel: CutLayerChannel
    cut_gradient: Literal["joint", "own"]
    batch_norm: Normalisation
    average_cut_gradients: int | None
    stretches_of_holders: list[list[int]]

    @property
    def num_places(self) -> int:
        """The number of stretches of the network, from one client's cut to the next."""
        return len(self.parties.kinds.routes[0])

    def _inputs_of(self, batch: StepBatch) -> list[Bundle]:
        """Returns what the clients of a step begin with."""
        parts = enumerate(batch.parts)
        return [Bundle((i,), self.laid_out(part.inputs)) for i, part in parts]

    def _stops(self, batch: StepBatch, place: int) -> list[Stop]:
        """Returns who computes a stretch of the network, for each client of a step."""
        routes = (self.parties.route_of(part.client_id) for part in batch.parts)
        return [route[place] for route in routes]

    def _compute(
        self, place: int, batch: StepBatch, flow: Sequence[Bundle]
    ) -> list[Bundle]:
        """Returns what the holders of a stretch compute; see `_compute_at`."""
        stops, done = self._stops(batch, place), list[Bundle]()
        for stop in dict.fromkeys(stops):
            own = [bundle for bundle in flow if stops[bundle.members[0]] == stop]
            members = sorted(members_of(own))
            inputs = gathered(own, joint_step.sizes_of(batch))
            parts = JointBatch(tuple(batch.parts[i] for i in members))
            outputs = self._compute_at(stop, parts, inputs)
            done += bundled(members, outputs)
        return sorted(done, key=lambda bundle: bundle.members)

    def _compute_at(
        self, stop: Stop, batch: StepBatch, inputs: Several
    ) -> list[Activations]:
        """Returns what a party computes; of clients each, or all at once."""
        piece = self.parties.pieces[stop.piece]
        if stop.party == "server":
            (segment,) = piece.live["server"]
            return [segment(*joint_step.joined(inputs), stretch=stop.stretch)]
        clients = piece.of("client")
        if self.batch_norm == "joint" and stop.stretch == 0:
            own = statistics_bytes(clients.acting()[0])
            for _ in range(2):  # in the forward and in the backward
                self.parties.exchanged({part.client_id: own for part in batch.parts})
                self.traffic.averaging_bytes += 2 * len(batch.parts) * own
        return joint_step.at_clients(
            clients, batch, inputs, stop.stretches, self.batch_norm
        )

    def _send(
        self, place: int, batch: StepBatch, flow: Sequence[Bundle]
    ) -> tuple[list[Bundle], list[Crossed]]:
        """Sends what crosses a cut behind a stretch; the rest stays where it is."""
        stops = self._stops(batch, place)
        crosses = [stops[bundle.members[0]].is_cut for bundle in flow]
        sent = [bundle for bundle, does in zip(flow, crosses, strict=True) if does]
        if not sent:
            return list(flow), []
        first = sent[0].members[0]
        ends = (stops[first].party, self._stops(batch, place + 1)[first].party)
        smashed = [self.channel.send(bundle.values, place, ends) for bundle in sent]
        arrived = [
            Bundle(bundle.members, values)
            for bundle, values in zip(sent, smashed, strict=True)
        ]
        after = [
            arrived.pop(0) if does else bundle
            for bundle, does in zip(flow, crosses, strict=True)
        ]
        activations = [bundle.values for bundle in sent]
        return after, [Crossed(place, ends, members_of(sent), activations, smashed)]

    def _sent_targets(self, batch: StepBatch) -> Tensor:
        """Returns the labels of a batch where the loss is."""
        return self.channel.send_targets(batch.targets)

    def _gather(self, batch: StepBatch) -> None:
        """Leaves the gradients of a step where the optimizers look for them.

        They are there, where the forward was on the live weights.
        """

    def _factors(self, batch: StepBatch) -> Tensor:
        """Returns by what clients multiply the gradient of the step's mean loss."""
        return joint_step.factors_of(
            joint_step.sizes_of(batch),
            own=self.cut_gradient == "own",
            shared=len(self._client_segments(batch)) == 1,
        )

    def _loss_of(
        self, batch: StepBatch, logits: Several, targets: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Returns each client's mean loss, and the loss that the backward begins with.

        A server has the logits of all as one batch; a client that keeps its labels has
        its own.
        """
        sizes = joint_step.sizes_of(batch)
        if len(sizes) == 1:
            loss: Tensor = self.criterion(logits[0], targets)
            return [loss], loss
        at_server = self.parties.kinds.routes[0][-1].party == "server"
        pairs = zip(joint_step.apart(logits, sizes), batch.parts, strict=True)
        own = [
            self.criterion(values[0].detach() if at_server else values[0], part.targets)
            for values, part in pairs
        ]
        if at_server:
            return own, self.criterion(logits[0], targets)
        weights = self._factors(batch) * torch.tensor(sizes) / sum(sizes)
        return own, torch.stack(own) @ weights.to(own[0])

    def _returned(self, batch: StepBatch, crossed: Crossed) -> list[Tensor | None]:
        """Returns the gradients that go back across a cut, as the arguments scale them.

        Clients multiply what comes to them; what they send on is as it was.
        """
        all_sizes, members = joint_step.sizes_of(batch), list(crossed.members)
        sizes, factors = [all_sizes[i] for i in members], self._factors(batch)[members]
        smashed, (sender, receiver) = crossed.smashed, crossed.ends
        if receiver == "client":
            joint_step.scale_gradients(smashed, sizes, 1 / factors)
        if sender == "client":
            joint_step.scale_gradients(smashed, sizes, factors)
            if self.average_cut_gradients is not None:
                joint_step.average_cut_gradients(
                    smashed, sizes, self.average_cut_gradients
                )
        back = (
            self.channel.send_back(own, crossed.cut, crossed.ends) for own in smashed
        )
        return [gradient for own in back for gradient in own]

    def _client_segments(self, batch: StepBatch) -> list[list[nn.Module]]:
        """Returns what each client of a step holds; once, where they share it."""
        held = {}
        for part in batch.parts:
            stops = self.parties.route_of(part.client_id)
            names = dict.fromkeys(s.piece for s in stops if s.party == "client")
            pieces = [self.parties.pieces[name].of("client") for name in names]
            own = [piece.seat_of(part.client_id) for piece in pieces]
            held[tuple(map(id, own))] = own
        return list(held.values())

    def _of_clients(self, batch: StepBatch) -> list[list[nn.Parameter]]:
        """Returns the parameters of each client that acts, of each of its holders."""
        return [
            parameters
            for segments in self._client_segments(batch)
            for parameters in parameters_by_holder(segments, self.stretches_of_holders)
        ]

    def _of_servers(self, batch: StepBatch) -> list[list[nn.Parameter]]:
        """Returns the parameters of each server on the routes of a step."""
        found: dict[str, dict[nn.Parameter, None]] = {}
        kinds = {self.parties.route_of(part.client_id): None for part in batch.parts}
        for route in kinds:
            for stage, stops in zip(named(route), stages_of(route), strict=True):
                for stop in stops if stage.party == "server" else ():
                    (segment,) = self.parties.pieces[stop.piece].live["server"]
                    assert isinstance(segment, Segment)
                    own = segment.parameters_of(stop.stretch)
                    found.setdefault(stage.name, {}).update(dict.fromkeys(own))
        return [list(parameters) for parameters in found.values()]
