"""Runs side by side: tables, CSV files, a plot, TensorBoard."""

from split_lightning.runs.comparison.report import compare
from split_lightning.runs.comparison.run_folder import RunFolder, find_runs, read_run
from split_lightning.runs.comparison.settings import differing_settings
from split_lightning.runs.comparison.table import Comparison, compared

__all__ = [
    "Comparison",
    "RunFolder",
    "compare",
    "compared",
    "differing_settings",
    "find_runs",
    "read_run",
]
