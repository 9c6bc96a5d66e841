"""Devices, links and virtual time."""

from split_lightning.system.system import Device, System
from split_lightning.system.system_seconds import SystemSeconds
from split_lightning.system.timeline import Holder, Timeline
from split_lightning.system.work import Work, crossing_of, work_of

__all__ = [
    "Device",
    "Holder",
    "System",
    "SystemSeconds",
    "Timeline",
    "Work",
    "crossing_of",
    "work_of",
]
