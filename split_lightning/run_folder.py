"""The folder that Hydra makes for a run: gone again if the run never begins."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from split_lightning.user_errors import Refused


@contextmanager
def no_folder_if_refused() -> Iterator[None]:
    """Removes the run's folder where the block refuses the run.

    A folder that held anything before the run is left as it is.
    """
    if not HydraConfig.initialized():
        yield
        return
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    made_by_hydra = {hydra.output_subdir, f"{hydra.job.name}.log"}
    is_new = {path.name for path in folder.iterdir()} <= made_by_hydra
    try:
        yield
    except Refused:
        if is_new:
            _remove(folder, Path(hydra.runtime.cwd))
        raise


def _remove(folder: Path, start: Path) -> None:
    """Removes a folder's contents, and the folders above it that are empty then."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    for path in (folder, *folder.parents):
        if path != folder and start not in path.parents:
            return  # not below where the command was typed
        is_sweep = [child.name for child in path.iterdir()] == ["multirun.yaml"]
        if is_sweep:
            (path / "multirun.yaml").unlink()
        try:
            path.rmdir()
        except OSError:  # not empty
            return
