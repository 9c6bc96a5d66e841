"""Runs the notebooks from a clean kernel and keeps their outputs.

    python notebooks/execute.py [NOTEBOOK ...]

Run it after a change: the tests compare what the notebooks print with what they keep.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
TIMEOUT = 300  # seconds, for a cell


def execute(path: Path) -> nbformat.NotebookNode:
    """Returns a notebook with new outputs; the file stays as it is.

    It runs in an empty folder, in a new kernel of this Python that finds the package of
    this checkout and no user's settings, on one thread.

    Args:
        path: The notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
        settings = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "IPYTHONDIR": folder,
            "OMP_NUM_THREADS": "1",
        }
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=os.environ | settings)
    notebook.metadata["language_info"] = {"name": "python"}  # no version of this Python
    return notebook


def main(names: list[str]) -> None:
    """Executes notebooks, all of this folder by default, and writes them back."""
    for path in map(Path, names) if names else sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(execute(path), path)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
