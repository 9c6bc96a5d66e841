"""Split learning for PyTorch Lightning.

Public names are imported when they are first used (PEP 562), so that `--help` does not
wait for torch and Lightning.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from split_lightning.quiet import silence_known_messages

if TYPE_CHECKING:
    from split_lightning.channel import Channel as Channel
    from split_lightning.data import DigitsImages as DigitsImages
    from split_lightning.data import SplitDataModule as SplitDataModule
    from split_lightning.data import TorchvisionImages as TorchvisionImages
    from split_lightning.engines import Engine as Engine
    from split_lightning.message import Message as Message
    from split_lightning.models import cut_layers as cut_layers
    from split_lightning.models import load_weights as load_weights
    from split_lightning.models import merge as merge
    from split_lightning.models import split as split
    from split_lightning.models.cut_cost import CutCost as CutCost
    from split_lightning.models.cut_cost import cut_costs as cut_costs
    from split_lightning.module import SplitLightningModule as SplitLightningModule
    from split_lightning.protocols import GPSL as GPSL
    from split_lightning.protocols import (
        AsynchronousWeightPassing as AsynchronousWeightPassing,
    )
    from split_lightning.protocols import Centralized as Centralized
    from split_lightning.protocols import CycleSL as CycleSL
    from split_lightning.protocols import FedAvg as FedAvg
    from split_lightning.protocols import Local as Local
    from split_lightning.protocols import MultiServer as MultiServer
    from split_lightning.protocols import ParallelSplitLearning as ParallelSplitLearning
    from split_lightning.protocols import Protocol as Protocol
    from split_lightning.protocols import (
        RoundRobinWeightPassing as RoundRobinWeightPassing,
    )
    from split_lightning.protocols import SplitFedV1 as SplitFedV1
    from split_lightning.protocols import SplitFedV2 as SplitFedV2
    from split_lightning.protocols import SplitFedV3 as SplitFedV3
    from split_lightning.topologies import ClientNetwork as ClientNetwork

_HOMES = {  # of each public name
    "AsynchronousWeightPassing": "protocols",
    "Centralized": "protocols",
    "Channel": "channel",
    "ClientNetwork": "topologies",
    "CutCost": "models.cut_cost",
    "CycleSL": "protocols",
    "DigitsImages": "data",
    "FedAvg": "protocols",
    "GPSL": "protocols",
    "Local": "protocols",
    "Engine": "engines",
    "Message": "message",
    "MultiServer": "protocols",
    "ParallelSplitLearning": "protocols",
    "Protocol": "protocols",
    "RoundRobinWeightPassing": "protocols",
    "SplitDataModule": "data",
    "SplitFedV1": "protocols",
    "SplitFedV2": "protocols",
    "SplitFedV3": "protocols",
    "SplitLightningModule": "module",
    "TorchvisionImages": "data",
    "cut_costs": "models.cut_cost",
    "cut_layers": "models",
    "load_weights": "models",
    "merge": "models",
    "split": "models",
}

__all__ = list(_HOMES)

try:
    __version__ = version("split-lightning")
except PackageNotFoundError:  # run from a checkout
    __version__ = "0.1.0"

silence_known_messages()


def __getattr__(name: str) -> Any:
    """Imports a public name from its module, once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
