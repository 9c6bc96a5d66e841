"""Data: data sets as tensors, partitions, loaders."""

from split_lightning.data.datamodule import SplitDataModule
from split_lightning.data.loader import (
    ClientBatch,
    EvaluationLoader,
    TrainLoader,
    ValidationLoader,
)
from split_lightning.data.missing_parts import MissingParts
from split_lightning.data.partition import label_counts, partition
from split_lightning.data.sources import (
    DigitsImages,
    Images,
    ImageSource,
    TorchvisionImages,
)
from split_lightning.data.tables import SklearnTable

__all__ = [
    "ClientBatch",
    "DigitsImages",
    "EvaluationLoader",
    "ImageSource",
    "Images",
    "MissingParts",
    "SklearnTable",
    "SplitDataModule",
    "TorchvisionImages",
    "TrainLoader",
    "ValidationLoader",
    "label_counts",
    "partition",
]
