"""`SplitDataModule`: one data set, partitioned among simulated clients."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from typing_extensions import override

from split_lightning.data.loader import (
    ClientBatch,
    EvaluationLoader,
    TrainLoader,
    ValidationLoader,
)
from split_lightning.data.missing_parts import Lacking, MissingParts
from split_lightning.data.partition import label_counts, partition
from split_lightning.data.partitioners import new_partitioner
from split_lightning.data.samples import check_alike, classes_of, load, read_samples
from split_lightning.data.scaling import check_statistics, is_measured, normalized
from split_lightning.data.sources import Images, ImageSource
from split_lightning.engines.hello import ClientData, require_alike
from split_lightning.engines.remote import SampleRef
from split_lightning.processes import processes_of
from split_lightning.protocols.least_batch import LeastBatch
from split_lightning.protocols.plan import Step
from split_lightning.protocols.protocol import Protocol
from split_lightning.protocols.round import Round
from split_lightning.protocols.round_robin import RoundRobinWeightPassing
from split_lightning.seeding import generator
from split_lightning.system.availability import Availability
from split_lightning.system.seconds import EqualSeconds, Seconds

if TYPE_CHECKING:
    from split_lightning.data.partitioners import PartitionerLike


_SHARE_OF_MEMORY = 0.2  # of the free memory of a GPU that samples may take


class SplitDataModule(pl.LightningDataModule):
    """Partitions a data set among clients and loads the steps of a protocol.

    The training set is partitioned; each client keeps a share of its own part for
    validation. All of it is a function of the seed. Samples are held once, and
    normalised and augmented in whole batches (`split_lightning.data.scaling` has the
    rule). One Lightning epoch is one round.

    Args:
        source: The data set: `TorchvisionImages`, `DigitsImages` or your own.
        num_clients: Number of clients; the same as that of a partitioner with its own.
        partitioner: One of `flwr_datasets.partitioner`: a class or its name, an
            instance, or a partial such as
            `partial(DirichletPartitioner, partition_by="label", alpha=0.5)`. It divides
            by `label` or a column of the source; `None`: IID.
        batch_size: Number of samples in a batch.
        local_epochs: Number of a client's passes over its partition in a round.
        val_share: Share of its samples that each client keeps for validation, in
            [0, 1); all but one sample at most.
        mean: Mean of each channel (axis 1), of numbers that are scaled already (pixels
            in [0, 1]); or one for all. Ids stay unchanged.
        std: Standard deviation of each channel, in the same way.
        augmentation: Changes normalised training images at random, each sample by
            itself, such as one of `kornia.augmentation`; drawn anew for each batch.
        seed: The run's seed.
        availability: Which clients are absent from a round, or drop out; `None`: none.
            Absent clients still validate.
        missing_parts: Which holders of parts lack which samples; `None`: none.

    Attributes:
        protocol: Plans the rounds: that of the Trainer's callbacks, once it fits;
            before, a round robin.
        seconds: How long things take, for protocols that plan by time; a
            `VirtualClock` knows.
        parts: For each client the positions in the training set of the samples that
            it trains on; from `setup` on.
        val_parts: For each client the positions of those that it validates on.
        ask: Where the samples are at the clients' sites, returns what clients say
            about them; the loaders then yield their shapes, and what names them.
            `None`: the samples are here.
        sole_client: The client that has all samples of the source; `None`: they are
            partitioned.
        least: How small a training batch may be; a `SplitLightningModule` sets it for
            its network before training.

    Raises:
        ValueError: If an argument is out of range; in `setup`, if what the source
            returns cannot be used, or cannot be partitioned.

    Example::

        data = SplitDataModule(DigitsImages(), num_clients=10, batch_size=32)
        data.setup("fit")
        for step in data.train_dataloader():
            for batch in step.parts:
                print(batch.client_id, batch.inputs.shape, batch.targets)
    """

    def __init__(
        self,
        source: ImageSource,
        num_clients: int,
        partitioner: PartitionerLike | None = None,
        batch_size: int = 128,
        local_epochs: int = 1,
        val_share: float = 0.1,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        augmentation: nn.Module | None = None,
        seed: int = 0,
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
        self.protocol: Protocol = RoundRobinWeightPassing()
        self.seconds: Seconds = EqualSeconds()
        self.batch_size = batch_size
        self.local_epochs = local_epochs
        self.val_share = val_share
        self.normalize = partial(normalized, mean=list(mean), std=list(std))
        self.augmentation = augmentation
        self.seed = seed
        self.availability = availability or Availability()
        self.availability.check(num_clients)
        self.missing_parts = missing_parts or MissingParts()
        self.parts: list[Tensor] = []
        self.val_parts: list[Tensor] = []
        self.least = LeastBatch()
        self.ask: Callable[[], Sequence[ClientData]] | None = None
        self.sole_client: int | None = None
        self._told: list[ClientData] = []
        self._asked: object = None
        self._counted: tuple[bool, list[int]] | None = None
        self._loaders: dict[str, Any] = {}  # of what is loaded by name
        self._train: Images | None = None
        self._test: Images | None = None

    @override
    def prepare_data(self) -> None:
        if self.ask is None:
            load(self.source, train=False)

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.ask is not None:
            if self._asked is not self.ask:
                self._take(self.ask())
                self._asked = self.ask
            return
        if self._test is None:  # checked with the training set, before any training
            self._test = self._read(train=False)
        if stage in ("fit", "validate", None) and self._train is None:
            train = self._read(train=True)
            check_alike(train, self._test)
            self._deal_out(train)
            self._train = train

    def _take(self, told: Sequence[ClientData]) -> None:
        """Takes over what clients say about their samples."""
        self._told = sorted(told)
        require_alike(self._told)
        sizes = [own.train + own.val for own in self._told]
        parts = torch.split(torch.arange(sum(sizes)), sizes)
        cut = [own.train for own in self._told]
        self.parts = [part[:n] for part, n in zip(parts, cut, strict=True)]
        self.val_parts = [part[n:] for part, n in zip(parts, cut, strict=True)]
        self._train = self._named(sum(sizes))
        self._test = self._named(sum(own.test for own in self._tested()))
        self._counted = None

    def _named(self, num_samples: int) -> Images:
        """Returns what stands for samples at sites: their shape."""
        first = self._told[0]
        dtype = torch.float32 if first.is_floating else torch.int64
        inputs = torch.empty(num_samples, *first.shape, dtype=dtype, device="meta")
        targets = torch.empty(num_samples, dtype=torch.int64, device="meta")
        return Images(inputs, targets)

    def _tested(self) -> list[ClientData]:
        """Returns the clients whose test samples are tested on, each by itself."""
        return self._told if self._told[0].is_own else self._told[:1]

    def client_data(self, clients: Iterable[int]) -> list[ClientData]:
        """Returns what clients of a site say about their samples."""
        example, test = self.example(), self._need(self._test)
        is_own = self.sole_client is not None
        return [
            ClientData(
                client_id,
                len(self.parts[client_id]),
                len(self.val_parts[client_id]),
                len(test.targets),
                is_own,
                tuple(example.shape[1:]),
                example.is_floating_point(),
                self.classes,
                0 if is_own else self._checksum(),
            )
            for client_id in clients
        ]

    def _read(self, train: bool) -> Images:
        images = read_samples(self.source, train)
        for name, values in self.normalize.keywords.items():
            check_statistics(name, values, images.inputs)
        return images

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self._told[0].classes if self._told else classes_of(self.source)

    @property
    def label_counts(self) -> Tensor:
        """Number of training samples by client and class, `(clients, classes)`."""
        train, num_classes = self._need(self._train), len(self.classes)
        return label_counts(train.targets, self.parts, num_classes)

    def example(self) -> Tensor:
        """Returns one sample as the network gets it, `(1, C, ...)`.

        Where the samples are at sites, it is of zeros.
        """
        inputs = self._need(self._train or self._test).inputs[:1]
        return (
            torch.zeros_like(inputs, device="cpu")
            if self._told
            else (self.normalize(inputs))
        )

    def extremes(self) -> Tensor:
        """Returns two samples as the network gets them, the largest id among them."""
        if self._told:
            return self.example().repeat_interleave(2, dim=0)
        sets = [self._need(self._train).inputs, self._need(self._test).inputs]
        first = sets[0][:1]
        if is_measured(first):
            return self.normalize(first.expand(2, *first.shape[1:]))
        largest = max((ids[ids.amax(dim=1).argmax()] for ids in sets), key=torch.max)
        return self.normalize(torch.cat([first, largest[None]]))

    def _on_device(self, images: Images) -> Images:
        """Returns samples on the Trainer's GPU, if there is one and they fit well."""
        if self._told or self.trainer is None or self.augmentation is not None:
            return images
        device = self.trainer.strategy.root_device
        if device.type != "cuda" or images.inputs.device == device:
            return images
        free, _ = torch.cuda.mem_get_info(device)
        if images.inputs.nbytes > _SHARE_OF_MEMORY * free:
            return images
        inputs, targets = images.inputs.to(device), images.targets.to(device)
        return images._replace(inputs=inputs, targets=targets)

    def partition(self) -> list[Tensor]:
        """Returns the positions of each client's samples, or of one party with all."""
        return [torch.cat(self.parts)] if self.protocol.pools_samples else self.parts

    def new_round(self, number: int) -> Round:
        """Returns what the plan of a round is made from."""
        repeats = getattr(self.trainer, "overfit_batches", 0) > 0
        return Round(
            number,
            self._sizes(),
            self.batch_size,
            self.local_epochs,
            self.seed,
            self.availability,
            self.least,
            self.seconds,
            drawn_as=0 if repeats else None,
        )

    def _sizes(self) -> list[int]:
        key = self.protocol.pools_samples
        if self._counted is None or self._counted[0] != key:
            self._counted = key, [len(part) for part in self.partition()]
        return self._counted[1]

    @override
    def train_dataloader(self) -> TrainLoader:
        loader = TrainLoader(
            self._on_device(self._need(self._train)),
            self.partition(),
            self.protocol,
            self.new_round,
            self.normalize,
            self.seed,
            None if self._told else self.augmentation,
            processes_of(self.trainer),
            self._lacking(train=True),
        )
        if self.trainer is not None:  # Lightning may fetch before it sets the round
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            loader.set_epoch(progress.processed)
        return loader

    @override
    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        if isinstance(batch, Step | ClientBatch):
            return batch if device.type == "cpu" else batch.to(device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

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
    def test_dataloader(self) -> EvaluationLoader | ValidationLoader:
        test = self._need(self._test)
        processes = processes_of(self.trainer)
        if self._told and self._told[0].is_own:
            sizes = [own.test for own in self._told]
            parts = torch.split(torch.arange(sum(sizes)), sizes)
            return ValidationLoader(
                test, parts, self.batch_size, self.normalize, part="test"
            )
        return EvaluationLoader(
            test, self.batch_size, self.normalize, processes, self._lacking(train=False)
        )

    @override
    def predict_dataloader(self) -> EvaluationLoader | ValidationLoader:
        return self.test_dataloader()

    def load(self, ref: SampleRef) -> tuple[Tensor, Tensor]:
        """Returns the inputs and the labels that the process with the Trainer names."""
        if not self._loaders:
            self._loaders = {
                "train": self.train_dataloader(),
                "val": self.val_dataloader(),
                "test": self.test_dataloader(),
            }
        found: tuple[Tensor, Tensor] = self._loaders[ref.part].load(ref)
        return found

    def _lacking(self, train: bool) -> Lacking | None:
        """Returns which holders lack which samples of a set."""
        images = self._need(self._train if train else self._test)
        if self._told:
            return None  # their holders know
        return self.missing_parts.lacking(len(images.targets), train)

    def _deal_out(self, train: Images) -> None:
        """Partitions the training set, and cuts each client's validation share off."""
        num_samples = len(train.targets)
        if self.sole_client is None and self.num_clients > num_samples:
            raise ValueError(
                f"Expected argument `num_clients` to be at most the number of training "
                f"samples ({num_samples}), but got {self.num_clients}."
            )
        drawn = torch.randperm(num_samples, generator=generator(self.seed, "deal out"))
        if self.sole_client is None:
            dealt = self._partitioned(train, drawn)
        else:
            dealt = [drawn[:0]] * self.num_clients
            dealt[self.sole_client] = drawn
        num_val = [
            min(round(len(o) * self.val_share), max(len(o) - 1, 0)) for o in dealt
        ]
        if self.val_share > 0 and not any(num_val):
            raise ValueError(
                "Expected argument `val_share` to keep a sample of a client's "
                f"{max(map(len, dealt))}, or to be 0, but got {self.val_share}."
            )
        self.parts, self.val_parts, self._counted = [], [], None
        for client_id, (samples, num) in enumerate(zip(dealt, num_val, strict=True)):
            if num == 0:
                self.val_parts.append(samples[:0])
                self.parts.append(samples)
                continue
            # Drawn: a partitioner may sort the samples of a client.
            order = torch.randperm(
                len(samples), generator=generator(self.seed, "validation", client_id)
            )
            is_val = torch.zeros(len(samples), dtype=torch.bool)
            is_val[order[:num]] = True
            self.val_parts.append(samples[is_val].sort()[0])
            self.parts.append(samples[~is_val])

    def _partitioned(self, train: Images, drawn: Tensor) -> list[Tensor]:
        """Returns the positions of the samples of each client."""
        places = drawn.tolist()
        columns = {
            name: [values[place] for place in places]
            for name, values in (train.columns or {}).items()
        }
        partitioner = new_partitioner(self.partitioner, self.num_clients)
        parts = partition(train.targets[drawn], partitioner, columns)
        if len(parts) != self.num_clients:
            raise ValueError(
                f"Expected argument `num_clients` to be {len(parts)}, the number of "
                f"partitions that {type(partitioner).__name__} makes of these samples, "
                f"but got {self.num_clients}."
            )
        return [drawn[part] for part in parts]

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns the options that the order of the data depends on."""
        return {**self.plan_options(), "partition": self._checksum()}

    def _checksum(self) -> int:
        """Returns a checksum of which client has which samples."""
        if self._told and not self._told[0].is_own:
            return self._told[0].partition
        dealt_out = torch.cat([*self.parts, *self.val_parts]).numpy().tobytes()
        return zlib.crc32(dealt_out)

    def plan_options(self) -> dict[str, Any]:
        """Returns the options that plans depend on, beside the sizes of parts."""
        return {
            "seed": self.seed,
            "num_clients": self.num_clients,
            "batch_size": self.batch_size,
            "local_epochs": self.local_epochs,
            "protocol": _described(self.protocol),
            "availability": repr(self.availability),
            "missing_parts": repr(self.missing_parts),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stops where training would continue with other data.

        Raises:
            ValueError: Names what differs from the data of the checkpoint.
        """
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        own = self.state_dict()
        differs = [name for name in own if own[name] != state_dict.get(name)]
        if differs:
            before = ", ".join(f"{name}={state_dict.get(name)}" for name in differs)
            now = ", ".join(f"{name}={own[name]}" for name in differs)
            raise ValueError(
                "Expected the data that the run of `ckpt_path` began with, to resume "
                f"exactly ({before}), but got {now}. (`partition`, a checksum, is "
                "that of `num_clients`, `data/partitioner` and `data.val_share`.)"
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
    options = {
        k: v for k, v in vars(part).items() if isinstance(v, plain) and k[0] != "_"
    }
    listed = ", ".join(f"{name}={value!r}" for name, value in sorted(options.items()))
    return f"{type(part).__name__}({listed})"
