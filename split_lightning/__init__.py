"""Split learning for PyTorch Lightning.

Public names are imported when they are first used (PEP 562), so that `--help` does not
wait for torch and Lightning.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from split_lightning.quiet import silence_known_messages

if TYPE_CHECKING:
    from split_lightning.asynchronous import (
        AsynchronousSplitLightningModule as AsynchronousSplitLightningModule,
    )
    from split_lightning.callbacks import ClientAveraging as ClientAveraging
    from split_lightning.callbacks import (
        RoundRobinWeightPassing as RoundRobinWeightPassing,
    )
    from split_lightning.callbacks import ServerAveraging as ServerAveraging
    from split_lightning.client_network import ClientNetwork as ClientNetwork
    from split_lightning.cycle import (
        CycleSplitLightningModule as CycleSplitLightningModule,
    )
    from split_lightning.data import DigitsImages as DigitsImages
    from split_lightning.data import SplitDataModule as SplitDataModule
    from split_lightning.data import TorchvisionImages as TorchvisionImages
    from split_lightning.models import cut_layers as cut_layers
    from split_lightning.models import load_weights as load_weights
    from split_lightning.models import merge as merge
    from split_lightning.models import split as split
    from split_lightning.models.cut_cost import CutCost as CutCost
    from split_lightning.models.cut_cost import cut_costs as cut_costs
    from split_lightning.module import SplitLightningModule as SplitLightningModule
    from split_lightning.server_map import ServerMap as ServerMap
    from split_lightning.unsplit import (
        UnsplitLightningModule as UnsplitLightningModule,
    )

_HOMES = {  # of each public name
    "AsynchronousSplitLightningModule": "asynchronous",
    "ClientAveraging": "callbacks",
    "ClientNetwork": "client_network",
    "CutCost": "models.cut_cost",
    "CycleSplitLightningModule": "cycle",
    "DigitsImages": "data",
    "RoundRobinWeightPassing": "callbacks",
    "ServerAveraging": "callbacks",
    "ServerMap": "server_map",
    "SplitDataModule": "data",
    "SplitLightningModule": "module",
    "TorchvisionImages": "data",
    "UnsplitLightningModule": "unsplit",
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
