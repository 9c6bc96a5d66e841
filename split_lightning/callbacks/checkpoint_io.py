"""Checkpoints: written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

FOLDER = "checkpoints"
LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; earlier ones are unchanged."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint file in one step: a crash leaves the old one or the new.

    The new file is written beside the old one, made safe on the disk, and renamed. What
    `last.ckpt` was before stays as `previous.ckpt`. Paths with a scheme, such as
    `s3://`, are left to Lightning.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Writes a checkpoint.

        Raises:
            CheckpointWriteError: If it cannot be written.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(unfinished, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST:  # not before: till then its own previous one is good
                _keep_previous(path)
            os.replace(unfinished, path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch wraps what `write` raises
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise CheckpointWriteError(
                f"The checkpoint {path} could not be written ({cause_of(error)}). What "
                "was there before is as it was."
            ) from error


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copies a checkpoint to another folder, in one step as it is written."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, unfinished)
    os.replace(unfinished, target)


def _keep_previous(path: Path) -> None:
    """Keeps a checkpoint that is about to be replaced as `previous.ckpt` beside it."""
    if not path.exists():
        return
    previous = path.with_name(PREVIOUS)
    beside = path.with_name(f".{PREVIOUS}.unfinished")
    beside.unlink(missing_ok=True)
    try:
        os.link(path, beside)
    except OSError:  # not every file system has links
        copy_checkpoint(path, previous)
    else:
        os.replace(beside, previous)


def cause_of(error: BaseException) -> str:
    """Returns the first line of the error's first cause."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        text = os.strerror(error.errno)
    return text.splitlines()[0] if text else type(error).__name__


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
