"""Run folders: written, read, evaluated, exported and compared.

`load_run` builds what a run's configuration names, as the command line does; it is
imported when it is first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from split_lightning.cli.rebuilding import load_run as load_run

_HOMES = {"load_run": "split_lightning.cli.rebuilding"}  # of each public name

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports a public name from its module, once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
