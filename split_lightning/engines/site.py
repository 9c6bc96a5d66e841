"""`Site`: parties of a process without a Trainer; it carries out calls, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from split_lightning.engines.engine import Engine
from split_lightning.engines.networks import evaluated, score_of
from split_lightning.engines.remote import Kept, SampleRef
from split_lightning.engines.shapes import Shapes
from split_lightning.finite import NotFinite, are_finite
from split_lightning.message import Values, as_values
from split_lightning.party import Key, Party, step
from split_lightning.placement import client_of
from split_lightning.store import Part, State, StateStore, clone

# Returns the inputs and labels of samples.
Samples = Callable[[SampleRef], tuple[Tensor, Tensor]]
CPU = torch.device("cpu")


class Site:
    """Computes for some clients, with their segments, optimizers and samples.

    What it does is a function of the calls, in order.

    Args:
        engine: Has the segments, with seats for all parties that train at once.
        samples: Returns inputs and labels.
        shapes: What passes between the site and the server looks like.
        device: Computes. Arguments of calls are on it.
    """

    def __init__(
        self,
        engine: Engine,
        samples: Samples,
        shapes: Shapes,
        device: torch.device = CPU,
    ) -> None:
        self.engine = engine
        self.shapes = shapes
        self.device = device
        self.samples = samples
        self.parties: dict[str, Party] = {}  # that compute until the next step
        self._batch: tuple[SampleRef, tuple[Tensor, Tensor]] | None = None
        self._kept: dict[int, Any] = {}
        self._before: dict[str, dict[int, State]] = {}  # buffers, of those ahead
        for store in engine.stores:
            for seat in store.seats:
                seat.module.to(device)
            store.remember_start()

    @property
    def is_waiting(self) -> bool:
        """Whether the next calls need what is not saved."""
        return bool(self.parties or self._kept)

    def has_kept(self, number: int) -> bool:
        """Returns whether a value of a number stays here."""
        return number in self._kept

    def has_begun(self, name: object) -> bool:
        """Returns whether a party has begun a step ahead."""
        return name in self._before

    # Training

    def forward(
        self,
        name: str,
        key: Key,
        values: Values,
        stays: bool,
        random: Tensor | None = None,
    ) -> tuple[Values, Tensor | None]:
        """Runs a segment of a party.

        Args:
            name: The party.
            key: Names the call.
            values: The inputs: tensors, or what stands for them.
            stays: Whether the party itself needs the outputs next.
            random: The state of the random numbers; `None`: the segment draws none.

        Returns:
            The smashed data, and the new state of the random numbers. What the last
            segment returns is not sent: the loss is computed here.
        """
        own = tuple(self._here(value) for value in values)
        party = self._party(name)
        if self.engine.may_discard and key[1] == min(party.segments):
            self._remember_buffers(name)
        if random is not None:
            torch.set_rng_state(random.cpu())
        (outputs,) = party.forward(key, [own], [len(own[0])])
        new = None if random is None else torch.get_rng_state()
        if key[1] == self.engine.num_depths - 1:
            return (), new
        return self._keep(outputs) if stays else outputs, new

    def begin(self, name: str, key: Key, values: Values) -> Values:
        """Runs a party's first segment ahead of its step; `take_back` undoes it.

        Returns:
            The smashed data.
        """
        self._remember_buffers(name)
        return self.forward(name, key, values, stays=False)[0]

    def _remember_buffers(self, name: str) -> None:
        segments = enumerate(self.engine.placement.of(client_of(name)))
        self._before[name] = {
            number: clone(self.engine.stores[number].peek(name, "buffers"))
            for number, own in segments
            if own == name
        }

    def take_back(self, name: str) -> None:
        """Returns a party to the state before its passes."""
        del self.parties[name]
        for number, buffers in self._before.pop(name).items():
            self.write(name, number, "buffers", buffers)

    def labels(self, samples: SampleRef) -> Values:
        """Returns the labels of samples.

        Raises:
            ValueError: If they stay with the client.
        """
        way = self.engine.way_of_labels(samples.client_id)
        if way.sender == way.receiver:
            raise ValueError(f"Expected the labels of {way.sender} to stay there.")
        return (self._load(samples)[1],)

    def loss(
        self, name: str, key: Key, targets: Any, weight: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Values]:
        """Runs stage 1 of a party's backward pass.

        Returns:
            What it began from, the client's mean loss, and the gradients of what came.
        """
        if isinstance(targets, SampleRef):
            targets = self._load(targets)[1]
        weights = None if weight is None else [weight]
        party = self.parties[name]
        found = party.loss(key, [targets], weights, scale=scale)
        if not are_finite([found.total]):
            raise NotFinite("the loss")
        (values,) = found.gradients
        stays = key[1] - 1 in party.segments
        return found.total, found.own[0], self._keep(values) if stays else values

    def backward(self, name: str, key: Key, gradients: Values) -> Values:
        """Runs stage 2 of a party's backward pass.

        Returns:
            The gradients of what came; nothing at depth 0.
        """
        own = tuple(map(self._here, gradients))
        (values,) = self.parties[name].backward(key, [own])
        if key[1] == 0:
            return ()
        stays = key[1] - 1 in self.parties[name].segments
        return self._keep(values) if stays else values

    def step(self, names: Sequence[str], options: Mapping[str, Any]) -> None:
        """Steps parties.

        Args:
            names: The parties.
            options: By role those options of its optimizer's groups that are new.

        Raises:
            NotFinite: If a gradient is not finite; nothing is stepped then.
        """
        for role, groups in options.items():
            own = self.engine.raw[role].param_groups
            for group, new in zip(own, groups, strict=True):
                group.update(new)
        parties = [self.parties[name] for name in names]
        gradients = [p.grad for party in parties for p in party.parameters()]
        if not are_finite(gradients):
            raise NotFinite(f"a gradient of {', '.join(names)}")
        step(parties, self.engine.optimizers, self.engine.clip)
        for name in names:
            del self.parties[name]
            self._before.pop(name, None)

    def is_sound(self, names: Sequence[str]) -> bool:
        """Returns whether the gradients of parties are finite."""
        return are_finite(
            [p.grad for name in names for p in self.parties[name].parameters()]
        )

    def discard(self, names: Sequence[str]) -> None:
        """Undoes the last step's passes of parties, which do not step."""
        for name in names:
            for parameter in self.parties[name].parameters():
                parameter.grad = None
            self.take_back(name)

    # States

    def weights_of(self, segments: Iterable[tuple[int, str]]) -> State:
        """Returns weights of segments, by the names of the network.

        Args:
            segments: The segments, each with the party that has its weights.
        """
        return {
            key: value
            for number, party in segments
            for key, value in self.engine.stores[number].weights_of(party).items()
        }

    def read(self, party: str, segment: int, part: Part) -> State:
        """Returns a part of a party's state."""
        state: State = clone(self.engine.stores[segment].peek(party, part))
        return state

    def write(self, party: str, segment: int, part: Part, state: State) -> None:
        """Gives a party a part of a state."""
        store = self.engine.stores[segment]
        store.drop(party, [part])
        store.own[part][party] = state

    def share(self, segment: int, role: str, part: Part, state: State | None) -> None:
        """Sets the common state of a role; `None`: that of the start."""
        store = self.engine.stores[segment]
        store.common[role][part] = store.start[part] if state is None else state

    def adopt(self, party: str, segment: int, part: Part) -> None:
        """Lets a party continue from the common state."""
        self.engine.stores[segment].adopt(party, [part])

    # What is saved

    def state_dict(self) -> dict[str, Any]:
        """Returns what the site remembers between steps, in plain containers."""
        optimizers = self.engine.raw.items()
        return {
            "stores": [self._saved(store) for store in self._stores()],
            "optimizers": {role: own.state_dict() for role, own in optimizers},
            "gradients": [p.grad for p in self.engine.parameters("client")],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned."""
        self.parties, self._kept, self._batch = {}, {}, None
        self._before = {}
        for store, saved in zip(self._stores(), state["stores"], strict=True):
            for seat, own in zip(store.seats, saved["live"], strict=True):
                seat.module.load_state_dict(own)
            for common in saved["states"]["common"].values():
                for part in [part for part in common if common[part] is None]:
                    common[part] = store.start[part]
            store.load_state_dict(saved["states"])
        for role, optimizer in self.engine.raw.items():
            optimizer.load_state_dict(state["optimizers"][role])
        pairs = zip(self.engine.parameters("client"), state["gradients"], strict=True)
        for parameter, gradient in pairs:
            parameter.grad = gradient

    def _stores(self) -> list[StateStore]:
        """Returns the states of the segments that clients may have."""
        return [store for store in self.engine.stores if "client" in store.roles]

    def _saved(self, store: StateStore) -> dict[str, Any]:
        states = store.state_dict()
        for common in states["common"].values():
            for part in [p for p in common if common[p] is store.start.get(p)]:
                common[part] = None  # that of the start
        return {
            "states": states,
            "live": [seat.module.state_dict() for seat in store.seats],
        }

    # Evaluation

    def evaluate(self, segment: int, party: str, values: Values, stays: bool) -> Values:
        """Returns what a segment returns in evaluation, with a party's weights.

        Raises:
            ValueError: If it is the last, whose outputs stay with the labels.
        """
        if self.is_last(segment):
            raise ValueError("Expected the outputs of the last segment to stay here.")
        outputs = self._evaluated(segment, party, values)
        return self._keep(outputs) if stays else outputs

    def score(
        self, segment: int, party: str, values: Values, samples: SampleRef
    ) -> tuple[Tensor, int, int]:
        """Returns the mean loss, the number of samples that are right, and of all."""
        outputs = self._evaluated(segment, party, values)
        score = score_of(self.engine.task, outputs, self._load(samples)[1])
        return score.loss, score.right, score.num_samples

    def _evaluated(self, segment: int, party: str, values: Values) -> Values:
        """Returns what a segment returns with a party's weights."""
        own = tuple(map(self._here, values))
        modules = [seat.module for seat in self.engine.stores[segment].seats]
        for module in modules:
            module.eval()
        with torch.no_grad():
            outputs = as_values(evaluated(self.engine.stores[segment], party, own))
        for module in modules:
            module.train()
        return outputs

    def is_last(self, segment: int) -> bool:
        """Returns whether a segment's outputs are those of the network."""
        return self.engine.stores[segment].depth == self.engine.num_depths - 1

    def _has(self, name: str, store: StateStore) -> bool:
        """Returns whether a party has a segment."""
        return (store, name) in self.engine.segments_of(client_of(name))

    def _party(self, name: str) -> Party:
        """Returns a party with its live segments, which it has until it steps."""
        if name not in self.parties:
            names = [*self.parties, name]
            segments = {}
            for store, own in self.engine.segments_of(client_of(name)):
                if own == name:
                    held = [n for n in names if self._has(n, store)]
                    segments[store.depth] = store.check_out(held)[name]
            self.parties[name] = Party(name, segments, self.engine.task)
        return self.parties[name]

    # Values that stand for others

    def _here(self, value: Any) -> Any:
        """Returns the tensor that something stands for."""
        if isinstance(value, SampleRef):
            return self._load(value)[0]
        if isinstance(value, Kept):
            return self._kept.pop(value.number)
        return value

    def _keep(self, values: Values) -> Values:
        """Keeps values that stay at this site; returns what stands for them."""
        found = []
        for value in values:
            number = 1 + max(self._kept, default=-1)
            self._kept[number] = value
            found.append(Kept(number, getattr(value, "requires_grad", False)))
        return tuple(found)

    def _load(self, samples: SampleRef) -> tuple[Tensor, Tensor]:
        """Returns inputs and labels; the last ones are at hand."""
        if self._batch is None or self._batch[0] != samples:
            inputs, labels = self.samples(samples)
            batch = inputs.to(self.device), labels.to(self.device)
            self._batch = replace(samples, labels=None), batch
        return self._batch[1]
