"""Loaders: batches of tensors, normalised and augmented whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from split_lightning.data.missing_parts import Lacking
from split_lightning.data.sources import Images
from split_lightning.engines.remote import SampleRef
from split_lightning.processes import ONE_PROCESS, Processes
from split_lightning.protocols.plan import Step
from split_lightning.protocols.protocol import Protocol
from split_lightning.protocols.round import Planned, Round
from split_lightning.seeding import derive_seed, generator

EVERY_CLIENT = -1  # has the samples of a test, where all have the same


class ClientBatch(NamedTuple):
    """A batch of one client, or this process's share of it.

    Attributes:
        client_id: The client that has the samples; or `EVERY_CLIENT`.
        inputs: Normalised samples, float32 of shape `(B, C, H, W)`.
        targets: Labels, int64 of shape `(B,)`.
        ends_turn: Whether this is the last batch of the client's turn.
        share: The part of the client's batch that this process has: 1 for one process.
            0 where there are fewer samples than processes: the samples are those of
            another process, and do not count.
        size: Number of samples of the client's whole batch; `None`: those that are
            here.
        ref: Names the samples, where they are at the client's site.
    """

    client_id: int
    inputs: Tensor
    targets: Tensor
    ends_turn: bool
    share: float = 1.0
    size: int | None = None
    ref: SampleRef | None = None

    @property
    def num_samples(self) -> int:
        """Number of samples of the batch that are this process's own."""
        return len(self.targets) if self.share else 0

    @property
    def num_samples_of_all(self) -> int:
        """Number of samples of the whole batch, of all processes."""
        return len(self.targets) if self.size is None else self.size

    def to(self, device: Any) -> ClientBatch:
        """Returns the batch on a device."""
        inputs = self.inputs.to(device, non_blocking=True)
        return self._replace(
            inputs=inputs, targets=self.targets.to(device, non_blocking=True)
        )


class TrainLoader:
    """Loads the training steps of a protocol's plan, round by round.

    Its whole state is a position (the round, and the steps of it that are done), so
    that a run that resumes in mid-round continues with the next step.

    NOTE a loader has a length only where every round has the same one. Lightning asks
    for the length once; without one it finds the end of each round by itself.

    Args:
        images: All training samples.
        partition: For each client the positions of its samples.
        protocol: Plans each round.
        new_round: Returns what a round's plan is made from.
        normalize: Turns stored samples into the network's inputs.
        seed: The run's seed.
        augmentation: Changes normalised samples at random, each sample by itself.
        processes: Among which processes each batch is shared out.
        lacking: Which samples holders of parts lack; `None`: none.
    """

    def __init__(
        self,
        images: Images,
        partition: Sequence[Tensor],
        protocol: Protocol,
        new_round: Callable[[int], Round],
        normalize: Callable[[Tensor], Tensor],
        seed: int = 0,
        augmentation: nn.Module | None = None,
        processes: Processes = ONE_PROCESS,
        lacking: Lacking | None = None,
    ) -> None:
        self.images = images
        self.partition = partition
        self.protocol = protocol
        self.new_round = new_round
        self.normalize = normalize
        self.seed = seed
        self.augmentation = augmentation
        self.processes = processes
        self.lacking = lacking
        self.epoch = 0  # the round
        self._done = 0  # steps of it that were given out
        self._resumes = False
        self._is_over = False  # whether the round ended, however many steps it had
        self._orders: dict[tuple[int, int], Tensor] = {}

    def set_epoch(self, epoch: int) -> None:
        """Chooses the round; Lightning and plain loops call this before each."""
        if epoch != self.epoch:
            self.epoch, self._done, self._resumes = epoch, 0, False
            self._is_over = False
            self._orders.clear()

    @property
    def sampler(self) -> TrainLoader:
        """The loader itself: Lightning calls `set_epoch` of a loader's sampler."""
        return self

    def round(self) -> Round:
        """Returns what the plan of the current round is made from."""
        return self.new_round(self.epoch)

    def planned(self) -> Iterator[Step]:
        """Yields the training steps of the current round, without samples."""
        return self.protocol.steps(self.round())

    def __len__(self) -> int:
        """Returns the number of training steps in a round.

        Raises:
            TypeError: If it differs from round to round.
        """
        if not self._rounds_are_equal():
            raise TypeError("The number of steps differs from round to round.")
        return sum(1 for _ in self.planned())

    def _rounds_are_equal(self) -> bool:
        round = self.round()
        if round.repeats:
            return True
        needed = max(round.least.own, round.least.total)
        draws = self.protocol.draws_samples
        may_merge = needed > 1 and (draws or round.batch_size < 2 * needed - 1)
        if not round.availability.is_trivial or may_merge:
            return False
        if self.protocol.clients_per_round in (None, len(round.sizes)):
            return True
        if self.protocol.num_servers != 1:
            return False
        loads = {n if draws else -(-n // round.batch_size) for n in round.sizes}
        return len(loads) == 1

    def __iter__(self) -> Iterator[Step]:
        """Yields the training steps of the round."""
        if not self._resumes:
            self._done = 0
        return self._generate()

    def _generate(self) -> Iterator[Step]:
        # Runs at the first step: Lightning chooses the round after it calls `iter`.
        self._resumes = self._is_over = False
        self._orders.clear()
        first = self._done
        steps = islice(self.planned(), first, None)
        loaded: Iterator[Step] = (
            step._replace(parts=tuple(self._load(step.parts))) for step in steps
        )
        if self.images.inputs.is_meta:
            loaded = _with_upcoming(loaded)
        for number, step in enumerate(loaded, first + 1):
            self._done = number
            yield step

    def _load(self, planned: Sequence[Planned]) -> list[ClientBatch]:
        """Returns the batches of a step; samples are fetched and normalised at once."""
        found = list(map(self._positions, planned))
        positions = found[0] if len(found) == 1 else torch.cat(found)
        inputs = _inputs_of(self.images, positions, self.normalize, self.lacking)
        targets = self.images.targets[positions]
        sizes, batches = list(map(len, found)), list[ClientBatch]()
        parts = zip(
            planned,
            torch.split(inputs, sizes),
            torch.split(targets, sizes),
            strict=True,
        )
        for batch, own, labels in parts:
            if self.augmentation is not None:
                own = self._augmented(batch, own)
            share, size = 1.0, len(labels)
            if self.processes.world_size > 1:
                mine, share = self.processes.share_of(size)
                own, labels = own[mine], labels[mine]
            ref = self._ref(batch)
            batches.append(
                ClientBatch(
                    batch.client_id, own, labels, batch.ends_turn, share, size, ref
                )
            )
        return batches

    def _ref(self, batch: Planned) -> SampleRef | None:
        """Names the samples of a batch, where they are not here."""
        is_here = not self.images.inputs.is_meta
        return None if is_here else SampleRef("train", self.epoch, *batch[:5])

    def load(self, ref: SampleRef) -> tuple[Tensor, Tensor]:
        """Returns the inputs and the labels that another process names."""
        self.set_epoch(ref.round)
        named = ref.client_id, ref.number, ref.pass_number, ref.start, ref.num_samples
        (batch,) = self._load([Planned(*named, False, False)])
        return batch.inputs, batch.targets

    def _positions(self, batch: Planned) -> Tensor:
        """Returns where the samples of a batch are in the data set."""
        client, passed = batch.client_id, batch.pass_number
        key = client, passed
        if key not in self._orders:
            self._orders.pop((client, passed - 1), None)
            place = (self.seed, "order", self.round().drawn_as, client, passed)
            samples = self.partition[client]
            order = torch.randperm(len(samples), generator=generator(*place))
            self._orders[key] = samples[order]
        return self._orders[key][batch.start : batch.start + batch.num_samples]

    def _augmented(self, batch: Planned, inputs: Tensor) -> Tensor:
        assert self.augmentation is not None
        place = (self.round().drawn_as, batch.client_id, batch.number)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, "batch", *place))
            changed: Tensor = self.augmentation(inputs)
        return changed.contiguous()

    def mark_trained(self, steps: int) -> None:
        """Notes how many steps of the round were trained.

        Lightning fetches a step ahead where there is no length: without this, a run
        that resumes would lose it.
        """
        self._done = steps

    def mark_round_done(self) -> None:
        """Notes that the round is over, however many of its steps were trained."""
        self._is_over = True

    def state_dict(self) -> dict[str, int]:
        """Returns the position: the round, and the steps of it that are done."""
        if self._is_over:
            return {"epoch": self.epoch + 1, "steps": 0}
        return {"epoch": self.epoch, "steps": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a position; the next iteration starts there."""
        self.epoch, self._done = state["epoch"], state["steps"]
        self._resumes, self._is_over = True, False


class ValidationLoader:
    """Loads samples that each client evaluates on, one client after the other.

    Args:
        images: All samples.
        parts: For each client the positions of the samples that it evaluates on.
        batch_size: Number of samples in a batch; a client's last may be smaller.
        normalize: Turns stored samples into the network's inputs.
        processes: Among which processes each batch is shared out; a share may be empty.
        lacking: Which samples holders of parts lack; `None`: none.
        part: What the samples are: `val` or `test`.
    """

    def __init__(
        self,
        images: Images,
        parts: Sequence[Tensor],
        batch_size: int,
        normalize: Callable[[Tensor], Tensor],
        processes: Processes = ONE_PROCESS,
        lacking: Lacking | None = None,
        part: str = "val",
    ) -> None:
        self.images = images
        self.parts = parts
        self.part = part
        self.batch_size = batch_size
        self.normalize = normalize
        self.processes = processes
        self.lacking = lacking

    def __len__(self) -> int:
        """Returns the number of batches."""
        return sum(-(-len(part) // self.batch_size) for part in self.parts)

    def __iter__(self) -> Iterator[ClientBatch]:
        """Yields the batches of each client that has samples to validate on."""
        for client_id, part in enumerate(self.parts):
            batches = torch.split(part, self.batch_size) if len(part) else ()
            for number, chosen in enumerate(batches, start=1):
                own = chosen[self.processes.own]
                inputs = _inputs_of(self.images, own, self.normalize, self.lacking)
                targets, ends = self.images.targets[own], number == len(batches)
                share = len(own) / len(chosen)
                ref = None
                if inputs.is_meta:
                    start = (number - 1) * self.batch_size
                    ref = SampleRef(self.part, 0, client_id, number, 0, start, len(own))
                yield ClientBatch(client_id, inputs, targets, ends, share, ref=ref)

    def load(self, ref: SampleRef) -> tuple[Tensor, Tensor]:
        """Returns the inputs and the labels that another process names.

        Raises:
            ValueError: If they are not those of a batch.
        """
        part = self.parts[ref.client_id]
        _require_batch(ref, len(part), self.batch_size)
        own = part[ref.start :][: ref.num_samples]
        inputs = _inputs_of(self.images, own, self.normalize, self.lacking)
        return inputs, self.images.targets[own]


class EvaluationLoader:
    """Loads samples that belong to no client in order, each once.

    Args:
        images: The samples.
        batch_size: Number of samples in a batch; the last may be smaller.
        normalize: Turns stored samples into the network's inputs.
        processes: Among which processes each batch is shared out; a share may be empty.
        lacking: Which samples holders of parts lack; `None`: none.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        normalize: Callable[[Tensor], Tensor],
        processes: Processes = ONE_PROCESS,
        lacking: Lacking | None = None,
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.normalize = normalize
        self.processes = processes
        self.lacking = lacking

    def __len__(self) -> int:
        """Returns the number of batches."""
        return -(-len(self.images.targets) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        """Yields normalised samples `(B, C, H, W)` and labels `(B,)`."""
        every = torch.arange(len(self.images.targets))
        for number, chosen in enumerate(torch.split(every, self.batch_size)):
            own = chosen[self.processes.own]
            inputs = _inputs_of(self.images, own, self.normalize, self.lacking)
            targets = self.images.targets[own]
            if inputs.is_meta:  # each client's site has them
                start = number * self.batch_size
                ref = SampleRef("test", 0, 0, number, 0, start, len(own))
                yield ClientBatch(EVERY_CLIENT, inputs, targets, False, ref=ref)
            else:
                yield inputs, targets

    def load(self, ref: SampleRef) -> tuple[Tensor, Tensor]:
        """Returns the inputs and the labels that another process names.

        Raises:
            ValueError: If they are not those of a batch.
        """
        _require_batch(ref, len(self.images.targets), self.batch_size)
        own = torch.arange(ref.start, ref.start + ref.num_samples)
        inputs = _inputs_of(self.images, own, self.normalize, self.lacking)
        return inputs, self.images.targets[own]


def _require_batch(ref: SampleRef, num_samples: int, batch_size: int) -> None:
    """Stops where another process names samples that are no batch of an evaluation.

    Raises:
        ValueError: If it names others, such as one alone.
    """
    starts = range(0, num_samples, batch_size)
    size = min(batch_size, num_samples - ref.start)
    if ref.start not in starts or ref.num_samples != size:
        raise ValueError(
            f"Expected a batch of the {num_samples} samples of {ref.part}, in order, "
            f"but got {ref.num_samples} from {ref.start}."
        )


def _with_upcoming(steps: Iterator[Step]) -> Iterator[Step]:
    """Yields steps, each with the batches of the next that may begin meanwhile."""
    step = next(steps, None)
    while step is not None:
        following = next(steps, None)
        if following is not None and following.may_overlap(step):
            step = step._replace(upcoming=following.parts)
        yield step
        step = following


def _inputs_of(
    images: Images,
    chosen: Tensor,
    normalize: Callable[[Tensor], Tensor],
    lacking: Lacking | None,
) -> Tensor:
    """Returns samples as the network gets them, without what holders lack."""
    inputs = normalize(images.inputs[chosen])
    return inputs if lacking is None else lacking.blank(inputs, chosen)
