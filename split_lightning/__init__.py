"""Split learning for PyTorch Lightning."""

from importlib.metadata import PackageNotFoundError, version

from split_lightning.callbacks import RoundRobinWeightPassing
from split_lightning.centralized import CentralizedLightningModule
from split_lightning.data import DigitsImages, SplitDataModule, TorchvisionImages
from split_lightning.models import cut_layers, load_weights, merge, split
from split_lightning.module import SplitLightningModule

try:
    __version__ = version("split-lightning")
except PackageNotFoundError:  # run from a checkout
    __version__ = "0.1.0"

__all__ = [
    "CentralizedLightningModule",
    "DigitsImages",
    "RoundRobinWeightPassing",
    "SplitDataModule",
    "SplitLightningModule",
    "TorchvisionImages",
    "cut_layers",
    "load_weights",
    "merge",
    "split",
]
