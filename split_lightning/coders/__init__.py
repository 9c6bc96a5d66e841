"""Coders: change the payload of messages."""

from split_lightning.coders.average_gradients import AverageGradients

__all__ = ["AverageGradients"]
