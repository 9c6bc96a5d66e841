"""Runs side by side: tables, CSV files, a plot, TensorBoard."""

from split_lightning.comparison.group import RunGroup, grouped
from split_lightning.comparison.report import compare
from split_lightning.comparison.run_folder import RunFolder, find_runs, read_run
from split_lightning.comparison.settings import differing_settings

__all__ = [
    "RunFolder",
    "RunGroup",
    "compare",
    "differing_settings",
    "find_runs",
    "grouped",
    "read_run",
]
