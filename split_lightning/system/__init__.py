"""Devices, links, absences, and the simulation of asynchronous rounds."""

from split_lightning.system.availability import Availability
from split_lightning.system.system import Device, System
from split_lightning.system.work import Work, crossing_of, work_of

__all__ = ["Availability", "Device", "System", "Work", "crossing_of", "work_of"]
