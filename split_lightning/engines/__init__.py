"""Engines: carry out the plan of a protocol."""

from split_lightning.engines.local import LocalEngine

__all__ = ["LocalEngine"]
