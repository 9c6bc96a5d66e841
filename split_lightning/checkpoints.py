"""Checkpoints: written whole or not at all, and found again."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from split_lightning.paths import path_of
from split_lightning.typed_words import key_value, shell_line

FOLDER = "checkpoints"
LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


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
                f"The checkpoint {path} could not be written ({_cause(error)}). What "
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


def find_checkpoint(ckpt_path: str, folder: Path, is_alone: bool = True) -> str | None:
    """Returns the checkpoint that a user means, after a look that it is whole.

    Args:
        ckpt_path: A checkpoint file, a run's folder, or `last`: the newest checkpoint
            of the run in `folder`, or else of the runs beside it.
        folder: The folder of the run that is about to start.
        is_alone: Whether the folders beside are other runs of the same experiment; in
            a sweep they are not, and a run that has no checkpoint starts anew.

    Returns:
        The file; `None` for `last` in a sweep's run that has none. What has a scheme,
        such as `s3://`, is left to Lightning as it is.

    Raises:
        ValueError: If there is none, or it is torn; names the newest one that is whole.
    """
    if "://" in ckpt_path:
        return ckpt_path
    if ckpt_path == "last":
        path = _newest(folder, is_alone)
        if path is None:
            if not is_alone:
                return None
            raise ValueError(
                "Expected `ckpt_path=last` to find a checkpoint, but there is none in "
                f"{folder} or the folders beside it ({folder.parent})."
            )
    else:
        path = _within(path_of(ckpt_path))
    _require_whole(path)
    return str(path)


def next_step(path: str) -> int:
    """Returns the first step (batch) that a run logs anew when it goes on from here."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    loop = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]
    return int(loop["_batches_that_stepped"]) + 1


def _newest(folder: Path, is_alone: bool) -> Path | None:
    is_there = is_alone and folder.parent.is_dir()
    beside = list(folder.parent.iterdir()) if is_there else []
    for folders in ([folder], beside):
        places = [own / FOLDER / name for own in folders for name in (LAST, PREVIOUS)]
        last = [path for path in places if path.is_file()]
        if last:  # of one run `last`, unless only `previous` is left
            return max(last, key=lambda p: (p.stat().st_mtime, p.name == LAST))
    return None


def _within(path: Path) -> Path:
    """Returns the last checkpoint of a run's folder, or the file itself."""
    if path.is_file():
        return path
    for candidate in (path / FOLDER / LAST, path / LAST):
        if candidate.is_file():
            return candidate
    others = (_newest_whole(place) for place in (path / FOLDER, path))
    other = next(filter(None, others), None)
    remedy = f" There is: {shell_line(key_value('ckpt_path', other))}" if other else ""
    raise ValueError(
        "Expected `ckpt_path` to be a checkpoint, a run's folder that holds "
        f"{FOLDER}/{LAST}, or the word last, but got {str(path)!r}.{remedy}"
    )


def _require_whole(path: Path) -> None:
    reason = _why_torn(path)
    if reason is not None:
        good = _newest_whole(path.parent, other_than=path)
        remedy = (
            f"The newest one that is whole: {shell_line(key_value('ckpt_path', good))}"
            if good
            else "There is no other one beside it."
        )
        raise ValueError(
            f"Expected `ckpt_path` to be a whole checkpoint, but {path} is none "
            f"({reason}). {remedy}"
        )


def _newest_whole(folder: Path, other_than: Path | None = None) -> Path | None:
    found = [p for p in folder.glob("*.ckpt") if p != other_than]
    found.sort(key=lambda p: p.stat().st_mtime, reverse=True)
    return next((p for p in found if _why_torn(p) is None), None)


def _why_torn(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint file; `None`: nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            return f"{damaged} in it is damaged"
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        EOFError,
        OSError,
        RuntimeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        return _cause(error)
    if not isinstance(loaded, dict) or "state_dict" not in loaded:
        return "it holds no training state"
    return None


def _cause(error: BaseException) -> str:
    """Returns the first line of what went wrong at the bottom."""
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
