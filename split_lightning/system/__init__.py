"""Devices, links and virtual time."""

from split_lightning.system.system import Device, System
from split_lightning.system.timeline import Holder, Timeline
from split_lightning.system.work import Work, work_of

__all__ = ["Device", "Holder", "System", "Timeline", "Work", "work_of"]
