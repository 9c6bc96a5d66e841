"""Split learning for PyTorch Lightning."""

from importlib.metadata import PackageNotFoundError, version

from split_lightning.asynchronous import AsynchronousSplitLightningModule
from split_lightning.callbacks import (
    ClientAveraging,
    RoundRobinWeightPassing,
    ServerAveraging,
)
from split_lightning.client_network import ClientNetwork
from split_lightning.cut_costs import CutCost, cut_costs
from split_lightning.cycle import CycleSplitLightningModule
from split_lightning.data import DigitsImages, SplitDataModule, TorchvisionImages
from split_lightning.models import cut_layers, load_weights, merge, split
from split_lightning.module import SplitLightningModule
from split_lightning.server_map import ServerMap
from split_lightning.unsplit import UnsplitLightningModule

try:
    __version__ = version("split-lightning")
except PackageNotFoundError:  # run from a checkout
    __version__ = "0.1.0"

__all__ = [
    "AsynchronousSplitLightningModule",
    "ClientAveraging",
    "ClientNetwork",
    "CutCost",
    "CycleSplitLightningModule",
    "DigitsImages",
    "RoundRobinWeightPassing",
    "ServerAveraging",
    "ServerMap",
    "SplitDataModule",
    "SplitLightningModule",
    "TorchvisionImages",
    "UnsplitLightningModule",
    "cut_costs",
    "cut_layers",
    "load_weights",
    "merge",
    "split",
]
