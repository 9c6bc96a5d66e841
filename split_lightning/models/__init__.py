"""Networks: cutting and joining them, and those that torchvision lacks."""

from split_lightning.models.networks import DigitsCNN, cifar_resnet18
from split_lightning.models.segment import Segment
from split_lightning.models.split import cut_layers, merge, split
from split_lightning.models.weights import load_weights

__all__ = [
    "DigitsCNN",
    "Segment",
    "cifar_resnet18",
    "cut_layers",
    "load_weights",
    "merge",
    "split",
]
