"""Loaders: batches of tensors, normalised and augmented whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from split_lightning.data.missing_parts import Lacking
from split_lightning.data.sampler import BatchPlan, ClientBatchSampler
from split_lightning.data.service import Service
from split_lightning.data.sources import Images
from split_lightning.processes import ONE_PROCESS, Processes


class ClientBatch(NamedTuple):
    """A batch of one client, or this process's share of it.

    Attributes:
        client_id: The client that owns the samples.
        inputs: Normalised images, float32 of shape `(B, C, H, W)`.
        targets: Labels, int64 of shape `(B,)`.
        ends_turn: Whether this is the last batch of the client's turn: in turn, other
            clients act in the next step.
        share: The part of the client's batch that this process has: 1 for one process.
            0 where there are fewer samples than processes: then the samples are
            another's, to compute with and not to count.
        ends_round: Whether this is the last batch that the client makes in the round.
        size: Number of samples of the client's whole batch; `None`: those that are
            here.
        service: What happens around the step, where clients train at the same time.
    """

    client_id: int
    inputs: Tensor
    targets: Tensor
    ends_turn: bool
    share: float = 1.0
    ends_round: bool = True
    size: int | None = None
    service: Service = Service()

    @property
    def parts(self) -> tuple[ClientBatch, ...]:
        """The batches of the clients that take part in the step: this one alone."""
        return (self,)

    @property
    def num_samples(self) -> int:
        """Number of samples of the batch that are this process's own."""
        return len(self.targets) if self.share else 0

    @property
    def num_samples_of_all(self) -> int:
        """Number of samples of the whole batch, of all processes."""
        return len(self.targets) if self.size is None else self.size


class JointBatch(NamedTuple):
    """The batches of several clients that take part in a step together.

    Attributes:
        parts: One batch of each client.
    """

    parts: tuple[ClientBatch, ...]

    @property
    def targets(self) -> Tensor:
        """Labels of all parts, int64 of shape `(B,)`."""
        return torch.cat([part.targets for part in self.parts])

    @property
    def ends_turn(self) -> bool:
        """Whether other clients act in the next step."""
        return self.parts[0].ends_turn

    @property
    def share(self) -> float:
        """The part of the batch that this process has: all of it."""
        return 1.0

    @property
    def num_samples(self) -> int:
        """Number of samples of all parts."""
        return sum(part.num_samples for part in self.parts)

    @property
    def num_samples_of_all(self) -> int:
        """Number of samples of all parts."""
        return self.num_samples


# What a training step gets: both have `parts`, and the sums over them.
StepBatch: TypeAlias = ClientBatch | JointBatch


class ClientLoader:
    """Loads the batches of a round, step by step; each carries the client that owns it.

    Its whole state is a position (round, batches given out), so that a run that resumes
    in mid-round goes on with the next batch.

    NOTE a loader has a length only where every round has the same one. Lightning asks
    for the length once; without one it finds the end of each round by itself.

    Args:
        images: All training images; the sampler chooses among them.
        sampler: Plans the batches of a round.
        normalize: Turns uint8 pixels into the network's inputs.
        augmentation: Changes normalised images at random, each sample by itself.
        processes: Among which processes each batch is shared out.
        lacking: Which samples holders of parts lack; `None`: none.
    """

    def __init__(
        self,
        images: Images,
        sampler: ClientBatchSampler,
        normalize: Callable[[Tensor], Tensor],
        augmentation: nn.Module | None = None,
        processes: Processes = ONE_PROCESS,
        lacking: Lacking | None = None,
    ) -> None:
        self.images = images
        self.sampler = sampler
        self.normalize = normalize
        self.augmentation = augmentation
        self.processes = processes
        self.lacking = lacking
        self._epoch = 0  # the round of the position, and the batches given out in it
        self._batches = 0
        self._resumes = False
        self._done: int | None = None  # the round that was marked as done

    def __len__(self) -> int:
        """Returns the number of batches in a round.

        Raises:
            TypeError: If it differs from round to round.
        """
        if not self.sampler.rounds_are_equal:
            raise TypeError("The number of batches differs from round to round.")
        return len(self.sampler)

    def __iter__(self) -> Iterator[StepBatch]:
        """Yields what each step of the sampler's round gets."""
        if not self._resumes:
            self._batches = 0
        return self._generate()

    def _generate(self) -> Iterator[StepBatch]:
        # Runs at the first batch: Lightning chooses the round after it calls `iter`.
        if not (self._resumes and self._epoch == self.sampler.epoch):
            self._epoch, self._batches = self.sampler.epoch, 0
        self._resumes, self._done = False, None
        first = self._batches
        steps = islice(self.sampler.plans(), first, None)
        for number, step in enumerate(steps, first + 1):
            parts = tuple(self._load(step))
            self._batches = number
            yield parts[0] if len(parts) == 1 else JointBatch(parts)

    def _load(self, step: list[BatchPlan]) -> Iterator[ClientBatch]:
        """Yields the batches of a step; images are fetched and normalised at once."""
        indices = torch.cat([plan.indices for plan in step])
        sizes = [len(plan.indices) for plan in step]
        found = _inputs_of(self.images, indices, self.normalize, self.lacking)
        inputs = torch.split(found, sizes)
        targets = torch.split(self.images.targets[indices], sizes)
        yield from map(self._batch, step, inputs, targets)

    def _batch(self, plan: BatchPlan, inputs: Tensor, targets: Tensor) -> ClientBatch:
        if self.augmentation is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(plan.seed)
                inputs = self.augmentation(inputs)
        own, share = self.processes.share_of(len(targets))
        return ClientBatch(
            plan.client_id,
            inputs[own],
            targets[own],
            plan.ends_turn,
            share,
            plan.ends_round,
            len(targets),
            plan.service,
        )

    def state_dict(self) -> dict[str, int]:
        """Returns the position: the round and the batches given out in it."""
        epoch = self.sampler.epoch
        if self._done == epoch:
            return {"epoch": epoch + 1, "batches": 0}
        return {"epoch": epoch, "batches": self._batches if epoch == self._epoch else 0}

    def mark_trained(self, batches: int) -> None:
        """Says how many batches of the round were trained on.

        Lightning fetches a batch ahead where there is no length: without this, a run
        that resumes would lose it.
        """
        self._batches = batches

    def mark_round_done(self) -> None:
        """Says that the round is over, however many of its batches were trained on."""
        self._done = self.sampler.epoch

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a position; the next iteration starts there."""
        self.sampler.set_epoch(state["epoch"])
        self._epoch, self._batches = state["epoch"], state["batches"]
        self._resumes = True


class ValidationLoader:
    """Loads each client's own validation share, one client after the other.

    Args:
        images: All training images.
        parts: For each client the positions of the samples that it validates on.
        batch_size: Number of images in a batch; a client's last may be smaller.
        normalize: Turns uint8 pixels into the network's inputs.
        processes: Among which processes each batch is shared out; a share may be empty.
    """

    def __init__(
        self,
        images: Images,
        parts: list[Tensor],
        batch_size: int,
        normalize: Callable[[Tensor], Tensor],
        processes: Processes = ONE_PROCESS,
        lacking: Lacking | None = None,
    ) -> None:
        self.images = images
        self.parts = parts
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
                yield ClientBatch(client_id, inputs, targets, ends, share)


class EvaluationLoader:
    """Loads images that belong to no client in order, each once.

    Args:
        images: The images.
        batch_size: Number of images in a batch; the last may be smaller.
        normalize: Turns uint8 pixels into the network's inputs.
        processes: Among which processes each batch is shared out; a share may be empty.
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

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields normalised images `(B, C, H, W)` and labels `(B,)`."""
        every = torch.arange(len(self.images.targets))
        for chosen in torch.split(every, self.batch_size):
            own = chosen[self.processes.own]
            inputs = _inputs_of(self.images, own, self.normalize, self.lacking)
            yield inputs, self.images.targets[own]


def _inputs_of(
    images: Images,
    chosen: Tensor,
    normalize: Callable[[Tensor], Tensor],
    lacking: Lacking | None,
) -> Tensor:
    """Returns images as the network gets them, without what holders lack."""
    inputs = normalize(images.inputs[chosen])
    return inputs if lacking is None else lacking.blank(inputs, chosen)
