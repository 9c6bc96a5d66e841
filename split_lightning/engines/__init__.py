"""Engines: carry out the plan of a protocol."""

from split_lightning.engines.local import LocalEngine
from split_lightning.engines.networks import Networks

__all__ = ["LocalEngine", "Networks"]
