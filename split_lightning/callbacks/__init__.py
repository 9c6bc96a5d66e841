"""Callbacks: weight passing, monitors, pictures."""

from split_lightning.callbacks.communication_monitor import CommunicationMonitor
from split_lightning.callbacks.confusion_matrix import ConfusionMatrix
from split_lightning.callbacks.partition_picture import (
    PartitionPicture,
    draw_label_counts,
)
from split_lightning.callbacks.resume_checkpoint import ResumeCheckpoint
from split_lightning.callbacks.round_progress_bar import RoundProgressBar
from split_lightning.callbacks.speed_monitor import SpeedMonitor
from split_lightning.callbacks.weight_passing import (
    RoundRobinWeightPassing,
    WeightPassing,
)

__all__ = [
    "CommunicationMonitor",
    "ConfusionMatrix",
    "PartitionPicture",
    "ResumeCheckpoint",
    "RoundProgressBar",
    "RoundRobinWeightPassing",
    "SpeedMonitor",
    "WeightPassing",
    "draw_label_counts",
]
