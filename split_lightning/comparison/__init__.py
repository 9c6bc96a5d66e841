"""Runs side by side: one table, one CSV, one plot."""

from split_lightning.comparison.report import compare
from split_lightning.comparison.run_folder import RunFolder, find_runs, read_run
from split_lightning.comparison.settings import differing_settings

__all__ = ["RunFolder", "compare", "differing_settings", "find_runs", "read_run"]
