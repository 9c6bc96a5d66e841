"""Engines: carry out the plan of a protocol."""

from split_lightning.engines.engine import Engine
from split_lightning.engines.networks import Networks

__all__ = ["Engine", "Networks"]
