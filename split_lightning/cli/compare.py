"""Compares runs: `python -m split_lightning.compare FOLDER...`.

Prints a table of the runs in the folders, the settings in which they differ as columns,
and writes `comparison.csv` and `comparison.png`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares the runs in folders.

    Args:
        arguments: What was typed; `None`: the command line.

    Returns:
        The exit status: 0, or 2 where no runs were found.
    """
    options = _parser().parse_args(arguments)
    from split_lightning.runs.comparison import compare, find_runs  # after --help

    try:
        runs = find_runs(options.folders)
        compare(runs, options.output or _default_output(options.folders))
    except (OSError, ValueError) as error:
        print(f"split-lightning: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m split_lightning.compare",
        description="Prints runs side by side, and writes tables and plots of them.",
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="a run's folder, a sweep's, or any folder with runs in it, at any depth",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where the files go, such as comparison.csv and comparison.png (default: "
        "the folder with the runs if only one is named, else the working folder)",
    )
    return parser


def _default_output(folders: Sequence[Path]) -> Path:
    return folders[0] if len(folders) == 1 else Path()
