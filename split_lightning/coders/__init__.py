"""Coders: change what travels."""

from split_lightning.coders.average_gradients import AverageGradients

__all__ = ["AverageGradients"]
