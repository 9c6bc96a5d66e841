"""When `ResumeCheckpoint` writes, and what it refuses."""

import errno
import itertools
from functools import partial

import pytest
import torch
from conftest import RandomImages, tiny_network
from pytorch_lightning import Trainer

from split_lightning import (
    RoundRobinWeightPassing,
    SplitDataModule,
    SplitLightningModule,
)
from split_lightning.callbacks import (
    ResumeCheckpoint,
    checkpoint_io,
    resume_checkpoint,
)
from split_lightning.callbacks.checkpoint_io import (
    AtomicCheckpointIO,
    CheckpointWriteError,
)


class Noting(ResumeCheckpoint):
    """Notes the place of each write: (round from 1, batch from 1, None at its end)."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.written = []
        self.batch = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batch = batch_idx + 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.batch = None

    def _write(self, trainer):
        self.written.append((trainer.current_epoch + 1, self.batch))
        return super()._write(trainer)


def places(tmp_path, rounds=5, **options):
    """Trains in rounds of nine batches; returns where checkpoints were written."""
    sgd = partial(torch.optim.SGD, lr=0.01)
    module = SplitLightningModule(tiny_network(), 1, sgd, sgd, 3)
    callback = Noting(tmp_path, **options)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=rounds,
        logger=False,
        callbacks=[RoundRobinWeightPassing(), callback],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = SplitDataModule(RandomImages(), 3, batch_size=7, val_share=0.2)
    trainer.fit(module, datamodule=data)
    return callback.written


def test_at_the_end_of_each_round(tmp_path):
    assert places(tmp_path, rounds=2) == [(1, None), (2, None)]
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_at_the_end_of_every_other_round_and_of_the_last(tmp_path):
    assert places(tmp_path, every_n_rounds=2) == [(2, None), (4, None), (5, None)]


def test_after_every_fourth_batch_of_a_round(tmp_path):
    """Not after a round's last batch: the round's end follows at once."""
    assert places(tmp_path, rounds=2, every_n_batches=4) == [
        *[(1, 4), (1, 8), (1, None)],
        *[(2, 4), (2, 8), (2, None)],
    ]


def test_whenever_minutes_have_passed_since_the_last_write(tmp_path, monkeypatch):
    """A clock that goes on by one minute whenever it is looked at: once a batch."""
    clock = itertools.count(step=60)
    monkeypatch.setattr(resume_checkpoint.time, "monotonic", lambda: next(clock))
    options = {"every_n_minutes": 3, "every_n_rounds": 9}
    # Each write looks too, so that the next is due in the third batch after it.
    assert places(tmp_path, rounds=1, **options) == [(1, 3), (1, 6), (1, None)]


@pytest.mark.parametrize("name", ["every_n_rounds", "every_n_batches"])
def test_intervals_that_are_not_positive_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` to be positive, but got 0"):
        ResumeCheckpoint(**{name: 0})


@pytest.mark.parametrize("has_links", [True, False])
def test_a_write_that_fails_leaves_both_checkpoints(tmp_path, monkeypatch, has_links):
    def refuse(*args):
        raise PermissionError(errno.EPERM, "no links here")

    if not has_links:
        monkeypatch.setattr(checkpoint_io.os, "link", refuse)
    last, write = tmp_path / "last.ckpt", AtomicCheckpointIO().save_checkpoint
    write({"number": 1}, last)
    write({"number": 2}, last)
    monkeypatch.setattr(checkpoint_io.os, "fsync", refuse)
    with pytest.raises(CheckpointWriteError, match="is as it was"):
        write({"number": 3}, last)
    found = {path.name: torch.load(path)["number"] for path in tmp_path.iterdir()}
    assert found == {"last.ckpt": 2, "previous.ckpt": 1}
