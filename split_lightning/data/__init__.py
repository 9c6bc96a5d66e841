"""Data: data sets as tensors, partitions, schedules, loaders."""

from split_lightning.data.asynchronous_schedule import AsynchronousSchedule
from split_lightning.data.availability import Availability
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.data.loader import (
    ClientBatch,
    ClientLoader,
    EvaluationLoader,
    JointBatch,
    StepBatch,
    ValidationLoader,
)
from split_lightning.data.missing_parts import MissingParts
from split_lightning.data.partition import label_counts, partition
from split_lightning.data.sampler import BatchPlan, ClientBatchSampler
from split_lightning.data.schedule import (
    Draw,
    ParallelSchedule,
    PooledSchedule,
    RoundRobinSchedule,
    Schedule,
)
from split_lightning.data.sources import (
    DigitsImages,
    Images,
    ImageSource,
    TorchvisionImages,
)
from split_lightning.data.tables import SklearnTable

__all__ = [
    "AsynchronousSchedule",
    "Availability",
    "BatchPlan",
    "ClientBatch",
    "ClientBatchSampler",
    "ClientLoader",
    "DigitsImages",
    "Draw",
    "EvaluationLoader",
    "ImageSource",
    "Images",
    "JointBatch",
    "MissingParts",
    "ParallelSchedule",
    "PooledSchedule",
    "RoundRobinSchedule",
    "Schedule",
    "SklearnTable",
    "SplitDataModule",
    "StepBatch",
    "TorchvisionImages",
    "ValidationLoader",
    "label_counts",
    "partition",
]
