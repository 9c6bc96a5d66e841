"""Checkpoints, found again and looked through."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch

from split_lightning.callbacks.checkpoint_io import FOLDER, LAST, PREVIOUS, cause_of
from split_lightning.paths import path_of
from split_lightning.typed_words import key_value, shell_line


def find_checkpoint(ckpt_path: str, folder: Path, is_alone: bool = True) -> str | None:
    """Returns the checkpoint that a user means, once it is found complete.

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
    """Returns the first step (batch) that a run logs anew when it resumes from here."""
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
        return cause_of(error)
    if not isinstance(loaded, dict) or "state_dict" not in loaded:
        return "it holds no training state"
    return None
