"""The folder that Hydra makes for a run: removed if the run never begins."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import psutil
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from split_lightning.cli.user_errors import Refused

_PATHS = ("ckpt_path", "data.root", "engine.certificates", "model.weights", "spill_to")


@contextmanager
def no_folder_if_refused() -> Iterator[None]:
    """Removes the run's folder where the block refuses the run.

    A folder that had files before the run stays unchanged.
    """
    if not HydraConfig.initialized():
        yield
        return
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    is_new = all(
        path.name == hydra.output_subdir or path.suffix == ".log"
        for path in folder.iterdir()
    )
    try:
        yield
    except Refused:
        if is_new:
            _remove(folder, Path(hydra.runtime.cwd))
        raise


def anchor_paths(cfg: DictConfig) -> None:
    """Lets relative paths begin where the command was typed.

    With `hydra.job.chdir=true` it runs in the run's folder.
    """
    if not HydraConfig.initialized() or not HydraConfig.get().job.chdir:
        return
    for key in _PATHS:
        name = OmegaConf.select(cfg, key, throw_on_missing=False)
        is_path = isinstance(name, str) and name != "last" and "://" not in name
        if is_path and not name.startswith("~"):
            start = HydraConfig.get().runtime.cwd
            OmegaConf.update(cfg, key, str(Path(start, name)))


def one_folder_for_all_processes() -> None:
    """Gives all processes that torchrun started one run's folder, by the command line.

    Each composes the configuration by itself, at a time of its own; the time at which
    their parent began is the same for all of a machine.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if not any(word.startswith("hydra.run.dir=") for word in sys.argv):
        began = datetime.fromtimestamp(psutil.Process(os.getppid()).create_time())
        stamp = began.strftime("%Y-%m-%d_%H-%M-%S-%f")
        sys.argv.append(f"hydra.run.dir=runs/${{name}}/{stamp}")
    rank = os.environ["RANK"]
    if rank != "0":
        sys.argv += [f"hydra.job.name=train_rank_{rank}", "hydra.output_subdir=null"]


def _remove(folder: Path, start: Path) -> None:
    """Removes a folder's contents, and the folders above it that are empty then."""
    files = [h for h in logging.root.handlers if isinstance(h, logging.FileHandler)]
    for handler in files:
        if Path(handler.baseFilename).is_relative_to(folder.resolve()):
            logging.root.removeHandler(handler)  # it would open its file anew
            handler.close()
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
