"""Protocols: which client trains when, and how weights flow. One file each."""

from split_lightning.protocols.actions import (
    Action,
    Average,
    Begin,
    Contribute,
    Mix,
    PassWeights,
    Send,
    Synchronize,
    Train,
)
from split_lightning.protocols.asynchronous import AsynchronousWeightPassing
from split_lightning.protocols.baselines import Centralized, FedAvg, Local
from split_lightning.protocols.cyclesl import CycleSL
from split_lightning.protocols.multi_server import MultiServer
from split_lightning.protocols.parallel import GPSL, ParallelSplitLearning
from split_lightning.protocols.plan import Step, steps_of
from split_lightning.protocols.protocol import Protocol
from split_lightning.protocols.round import Planned, Round
from split_lightning.protocols.round_robin import RoundRobinWeightPassing
from split_lightning.protocols.splitfed import SplitFedV1, SplitFedV2, SplitFedV3

__all__ = [
    "GPSL",
    "Action",
    "AsynchronousWeightPassing",
    "Average",
    "Begin",
    "Centralized",
    "Contribute",
    "CycleSL",
    "FedAvg",
    "Local",
    "Mix",
    "MultiServer",
    "ParallelSplitLearning",
    "PassWeights",
    "Planned",
    "Protocol",
    "Round",
    "RoundRobinWeightPassing",
    "Send",
    "SplitFedV1",
    "SplitFedV2",
    "SplitFedV3",
    "Step",
    "Synchronize",
    "Train",
    "steps_of",
]
