"""The best round stays the best one where a run goes on in another folder."""

import warnings
from functools import partial

import pytest
import torch
from conftest import RandomImages, tiny_network
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from split_lightning import SplitDataModule, SplitLightningModule
from split_lightning.callbacks import BestCheckpoint, ResumeCheckpoint

SCORES = (0.2, 0.9, 0.4, 0.6)  # of the rounds


class Scored(SplitLightningModule):
    """Is told how good it is."""

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("score", SCORES[self.current_epoch])


def fit(folder, rounds, ckpt=None, kind=BestCheckpoint):
    """Trains up to a round; returns the round of `best.ckpt`, from 0, and its score."""
    sgd = partial(torch.optim.SGD, lr=0.01)
    module = Scored(tiny_network(), 1, sgd, sgd, 3)
    best = kind(
        folder,
        "best",
        "score",
        mode="max",
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=rounds,
        logger=False,
        callbacks=[best, ResumeCheckpoint(folder)],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = SplitDataModule(RandomImages(), 1, val_share=0.2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The dirpath has changed")
        trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    assert best.best_model_path == str(folder / "best.ckpt")
    kept = torch.load(folder / "best.ckpt", weights_only=True)
    return kept["epoch"], float(best.best_model_score)


@pytest.mark.parametrize(("before", "best"), [(1, 1), (2, 1), (3, 1), (4, 1)])
def test_in_another_folder(tmp_path, before, best):
    one, two = tmp_path / "one", tmp_path / "two"
    fit(one, before)
    kept = (one / "best.ckpt").read_bytes()
    assert fit(two, 4, one / "last.ckpt") == (best, pytest.approx(SCORES[best]))
    assert (one / "best.ckpt").read_bytes() == kept


def test_what_lightnings_own_kept(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    fit(one, 2, kind=ModelCheckpoint)
    assert fit(two, 4, one / "last.ckpt") == (1, pytest.approx(0.9))


def test_in_a_folder_that_was_moved(tmp_path):
    fit(tmp_path / "one", 3)
    moved = (tmp_path / "one").rename(tmp_path / "two")
    assert fit(moved, 4, moved / "last.ckpt") == (1, pytest.approx(0.9))


def test_where_the_best_one_is_missing_lightning_begins_anew(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    fit(one, 2)
    (one / "best.ckpt").unlink()
    with pytest.raises(UserWarning, match="The dirpath has changed"):
        fit(two, 4, one / "last.ckpt")
