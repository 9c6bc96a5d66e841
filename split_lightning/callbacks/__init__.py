"""Callbacks: monitors, pictures, progress and checkpoints."""

from split_lightning.callbacks.availability_monitor import AvailabilityMonitor
from split_lightning.callbacks.best_checkpoint import BestCheckpoint
from split_lightning.callbacks.client_picture import ClientPicture
from split_lightning.callbacks.communication_monitor import CommunicationMonitor
from split_lightning.callbacks.confusion_matrix import ConfusionMatrix
from split_lightning.callbacks.confusion_picture import (
    ConfusionPicture,
    draw_confusion,
)
from split_lightning.callbacks.curves import draw_curves
from split_lightning.callbacks.cut_monitor import CutMonitor
from split_lightning.callbacks.drift_monitor import DriftMonitor
from split_lightning.callbacks.histograms import Histograms
from split_lightning.callbacks.history import History
from split_lightning.callbacks.memory_monitor import MemoryMonitor
from split_lightning.callbacks.partition_picture import (
    PartitionPicture,
    draw_label_counts,
)
from split_lightning.callbacks.resume_checkpoint import ResumeCheckpoint
from split_lightning.callbacks.round_progress_bar import RoundProgressBar
from split_lightning.callbacks.segment_summary import SegmentSummary
from split_lightning.callbacks.speed_monitor import SpeedMonitor
from split_lightning.callbacks.tensorboard_layout import TensorBoardLayout
from split_lightning.callbacks.virtual_clock import VirtualClock

__all__ = [
    "AvailabilityMonitor",
    "BestCheckpoint",
    "ClientPicture",
    "CommunicationMonitor",
    "ConfusionMatrix",
    "ConfusionPicture",
    "CutMonitor",
    "DriftMonitor",
    "Histograms",
    "History",
    "MemoryMonitor",
    "PartitionPicture",
    "ResumeCheckpoint",
    "RoundProgressBar",
    "SegmentSummary",
    "SpeedMonitor",
    "TensorBoardLayout",
    "VirtualClock",
    "draw_confusion",
    "draw_curves",
    "draw_label_counts",
]
