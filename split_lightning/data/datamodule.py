"""`SplitDataModule`: one data set, dealt out to simulated clients."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torchvision.transforms.functional import normalize
from typing_extensions import override

from split_lightning.data.availability import Availability
from split_lightning.data.loader import ClientLoader, EvaluationLoader, ValidationLoader
from split_lightning.data.missing_parts import Lacking, MissingParts
from split_lightning.data.partition import label_counts, partition
from split_lightning.data.sampler import ClientBatchSampler
from split_lightning.data.schedule import RoundRobinSchedule, Schedule
from split_lightning.data.seeding import generator
from split_lightning.data.sources import Images, ImageSource
from split_lightning.processes import processes_of
from split_lightning.server_map import ServerMap

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


class SplitDataModule(pl.LightningDataModule):
    """Deals a data set out to clients and lets them take turns.

    The training set is partitioned; each client keeps a share of its own part for
    validation. All of it is a function of the seed. Images are held once, as uint8,
    and normalised and augmented in whole batches. One Lightning epoch is one round.

    Args:
        source: The data set: `TorchvisionImages`, `DigitsImages` or one's own.
        num_clients: Number of clients.
        partitioner: Makes one of `flwr_datasets.partitioner`, given `num_partitions`,
            such as `partial(DirichletPartitioner, partition_by="label", alpha=0.5)`;
            `None`: IID.
        schedule: Who takes part in a round, in which order, in which steps; `None`:
            a round robin.
        batch_size: Number of samples in a batch.
        local_epochs: Number of passes over its partition in a client's turn.
        val_share: Share of its samples that each client keeps for validation, in
            [0, 1); all but one sample at most.
        mean: Mean of each channel, for pixels in [0, 1] (of a table: of its numbers).
        std: Standard deviation of each channel, in the same way.
        augmentation: Changes normalised training images at random, each sample by
            itself, such as one of `kornia.augmentation`; drawn anew for each batch.
        seed: The run's seed.
        servers: Which server serves which client; `None`: one for all.
        availability: Which clients are there in a round, and how far they come;
            `None`: all, to the end. Who is absent still validates.
        missing_parts: Which holders of parts lack which samples; `None`: none.

    Attributes:
        parts: For each client the positions in the training set of the samples that
            it trains on; from `setup` on.
        val_parts: For each client the positions of those that it validates on.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        data = SplitDataModule(DigitsImages(), num_clients=10, batch_size=32)
        data.setup("fit")
        for batch in data.train_dataloader():
            print(batch.client_id, batch.inputs.shape, batch.targets)
    """

    def __init__(
        self,
        source: ImageSource,
        num_clients: int,
        partitioner: Callable[..., Partitioner] | None = None,
        schedule: Schedule | None = None,
        batch_size: int = 128,
        local_epochs: int = 1,
        val_share: float = 0.1,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        augmentation: nn.Module | None = None,
        seed: int = 0,
        servers: ServerMap | None = None,
        availability: Availability | None = None,
        missing_parts: MissingParts | None = None,
    ) -> None:
        super().__init__()
        counts = {
            "num_clients": num_clients,
            "batch_size": batch_size,
            "local_epochs": local_epochs,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(
                    f"Expected argument `{name}` to be a positive integer, but got "
                    f"{count}."
                )
        if not 0 <= val_share < 1:
            raise ValueError(
                f"Expected argument `val_share` to be in [0, 1), but got {val_share}."
            )
        if min(std) <= 0:
            raise ValueError(
                f"Expected argument `std` to be positive numbers, but got {list(std)}."
            )
        self.source = source
        self.num_clients = num_clients
        self.partitioner = partitioner
        self.schedule = schedule or RoundRobinSchedule()
        self.batch_size = batch_size
        self.local_epochs = local_epochs
        self.val_share = val_share
        self.normalize = partial(_normalize, mean=list(mean), std=list(std))
        self.augmentation = augmentation
        self.seed = seed
        self.servers = servers or ServerMap()
        self.availability = availability or Availability()
        self.availability.check(num_clients, self.schedule)
        self.missing_parts = missing_parts or MissingParts()
        self.parts: list[Tensor] = []
        self.val_parts: list[Tensor] = []
        self._train: Images | None = None
        self._test: Images | None = None

    @override
    def prepare_data(self) -> None:
        self.source.load(train=False)

    @override
    def setup(self, stage: str | None = None) -> None:
        if stage in ("fit", "validate", None) and self._train is None:
            self._train = self.source.load(train=True)
            self._deal_out(self._train)
        if stage in ("test", "predict", None) and self._test is None:
            self._test = self.source.load(train=False)

    @property
    def label_counts(self) -> Tensor:
        """Number of training samples by client and class, `(clients, classes)`."""
        train, num_classes = self._need(self._train), len(self.source.classes)
        return label_counts(train.targets, self.parts, num_classes)

    def example(self) -> Tensor:
        """Returns one training image as the network gets it, `(1, C, H, W)`."""
        return self.normalize(self._need(self._train).inputs[:1])

    @override
    def train_dataloader(self) -> ClientLoader:
        sampler = ClientBatchSampler(
            self.schedule.regroup(self.parts),
            self.schedule,
            self.batch_size,
            self.local_epochs,
            self.seed,
            repeat_round=getattr(self.trainer, "overfit_batches", 0) > 0,
            servers=self.servers,
            availability=self.availability,
        )
        if self.trainer is not None:  # Lightning may fetch before it sets the round
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            sampler.set_epoch(progress.processed)
        train = self._need(self._train)
        return ClientLoader(
            train,
            sampler,
            self.normalize,
            self.augmentation,
            processes_of(self.trainer),
            self._lacking(train=True),
        )

    @override
    def val_dataloader(self) -> ValidationLoader | list[ValidationLoader]:
        train = self._need(self._train)
        if not any(map(len, self.val_parts)):
            return []
        return ValidationLoader(
            train,
            self.val_parts,
            self.batch_size,
            self.normalize,
            processes_of(self.trainer),
            self._lacking(train=True),
        )

    @override
    def test_dataloader(self) -> EvaluationLoader:
        test = self._need(self._test)
        processes = processes_of(self.trainer)
        return EvaluationLoader(
            test, self.batch_size, self.normalize, processes, self._lacking(train=False)
        )

    @override
    def predict_dataloader(self) -> EvaluationLoader:
        return self.test_dataloader()

    def _lacking(self, train: bool) -> Lacking | None:
        """Returns who lacks what of the training set, or the test set."""
        images = self._need(self._train if train else self._test)
        return self.missing_parts.lacking(len(images.targets), train)

    def _deal_out(self, train: Images) -> None:
        """Partitions the training set, and cuts each client's validation share off."""
        num_samples = len(train.targets)
        if self.num_clients > num_samples:
            raise ValueError(
                f"Expected argument `num_clients` to be at most the number of training "
                f"samples ({num_samples}), but got {self.num_clients}."
            )
        drawn = torch.randperm(num_samples, generator=generator(self.seed, "deal out"))
        parts = partition(train.targets[drawn], self._make_partitioner())
        owned = [drawn[part] for part in parts]
        num_val = [min(round(len(o) * self.val_share), len(o) - 1) for o in owned]
        if self.val_share > 0 and not any(num_val):
            raise ValueError(
                "Expected argument `val_share` to keep a sample of a client's "
                f"{max(map(len, owned))}, or to be 0, but got {self.val_share}."
            )
        self.parts, self.val_parts = [], []
        for client_id, (samples, num) in enumerate(zip(owned, num_val, strict=True)):
            # Drawn: partitioners leave each class of a client in an order of theirs.
            order = torch.randperm(
                len(samples), generator=generator(self.seed, "validation", client_id)
            )
            is_val = torch.zeros(len(samples), dtype=torch.bool)
            is_val[order[:num]] = True
            self.val_parts.append(samples[is_val].sort()[0])
            self.parts.append(samples[~is_val])

    def _make_partitioner(self) -> Partitioner:
        if self.partitioner is None:
            from flwr_datasets.partitioner import IidPartitioner

            return IidPartitioner(num_partitions=self.num_clients)
        options = getattr(self.partitioner, "keywords", {})
        for name, count in options.items():  # not every partitioner checks its own
            if name.startswith("num_") and isinstance(count, int) and count < 1:
                raise ValueError(
                    f"Expected argument `{name}` to be a positive integer, but got "
                    f"{count}."
                )
        try:
            return self.partitioner(num_partitions=self.num_clients)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Expected argument `partitioner` to have valid options, but got "
                f"{options}: {error}"
            ) from error

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns what a position in the data depends on."""
        dealt_out = torch.cat([*self.parts, *self.val_parts]).numpy().tobytes()
        return {
            "seed": self.seed,
            "num_clients": self.num_clients,
            "batch_size": self.batch_size,
            "local_epochs": self.local_epochs,
            "partition": zlib.crc32(dealt_out),
            "schedule": _described(self.schedule),
            "servers": _described(self.servers),
            "availability": repr(self.availability),
            "missing_parts": repr(self.missing_parts),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stops where training would go on with other data.

        Raises:
            ValueError: Names what differs from the data of the checkpoint.
        """
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        own = self.state_dict()
        earlier = {
            "availability": repr(Availability()),
            "missing_parts": repr(MissingParts()),
        }
        state_dict = earlier | state_dict
        differs = [name for name in own if own[name] != state_dict.get(name)]
        if differs:
            before = ", ".join(f"{name}={state_dict.get(name)}" for name in differs)
            now = ", ".join(f"{name}={own[name]}" for name in differs)
            raise ValueError(
                "Expected the data that the run of `ckpt_path` began with, to go on "
                f"exactly ({before}), but got {now}. (partition: a checksum of who "
                "owns what: `num_clients`, `data/partitioner`, `data.val_share`.)"
            )

    @staticmethod
    def _need(images: Images | None) -> Images:
        if images is None:
            raise RuntimeError(
                'Call `setup("fit")` (or "test") on the data module before this; a '
                "Trainer does so by itself."
            )
        return images


def _described(part: object) -> str:
    """Returns the class of a part and its plain options, in words."""
    plain = (bool, int, float, str, type(None))
    options = {k: v for k, v in vars(part).items() if isinstance(v, plain)}
    listed = ", ".join(f"{name}={value!r}" for name, value in sorted(options.items()))
    return f"{type(part).__name__}({listed})"


def _normalize(pixels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Returns uint8 pixels `(B, C, H, W)`, or other numbers, as normalised float32."""
    values = pixels.to(torch.float32, copy=True)
    if pixels.dtype == torch.uint8:
        values.div_(255)
    normalized: Tensor = normalize(values, mean, std, inplace=True)
    return normalized
