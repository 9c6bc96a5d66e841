"""Observers: look at the messages between parties, and change nothing."""

from split_lightning.observers.clock import Clock
from split_lightning.observers.norms import Norms
from split_lightning.observers.traffic import Traffic

__all__ = ["Clock", "Norms", "Traffic"]
