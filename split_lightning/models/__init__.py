"""Networks: cutting and joining them, and those that torchvision lacks."""

from split_lightning.models.networks import MLP, DigitsCNN, cifar_resnet18
from split_lightning.models.segment import Segment
from split_lightning.models.split import cut_layers, merge, split
from split_lightning.models.vertical import VerticalNetwork, vertical_network
from split_lightning.models.weights import load_weights

__all__ = [
    "MLP",
    "DigitsCNN",
    "Segment",
    "VerticalNetwork",
    "cifar_resnet18",
    "cut_layers",
    "load_weights",
    "merge",
    "split",
    "vertical_network",
]
