"""`History`: its rows, its file, and both after a resumption."""

import csv
import logging
import os

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from watching import ListLogger, SaveAt, fit, make_centralized, make_data

from split_lightning.callbacks import CommunicationMonitor, History
from split_lightning.callbacks.history import COLUMNS

IMAGES = 48  # 60 less a fifth: what a round trains on
NAMES = (
    "round,train_loss,val_loss,val_accuracy,uplink_bytes,downlink_bytes,"
    "handoff_bytes,handoffs,averaging_bytes,server_averaging_bytes,"
    "hop_bytes,layer_bytes,images,virtual_seconds,seconds"
)


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def as_read(rows):
    return [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]


def test_a_row_a_round(tmp_path):
    """Against the logged values and the closed formulas of the bytes."""
    history, logger = History(tmp_path / "run"), ListLogger()
    fit(tmp_path, [history, CommunicationMonitor()], logger=logger, max_epochs=3)
    text = (tmp_path / "run" / "history.csv").read_text()
    assert text.splitlines()[0] == ",".join(COLUMNS) == NAMES
    rows = read(tmp_path / "run" / "history.csv")
    assert rows == as_read(history.rows)
    up = 4 * 4 * 36 + 8  # smashed data of 4 x 6 x 6, and a label
    segment = 4 * (4 * 9 + 4 + 4 * 4) + 8  # conv, BatchNorm and its counter
    for number, row in enumerate(history.rows, start=1):
        assert row["round"] == number
        assert row["images"] == number * IMAGES
        assert row["uplink_bytes"] == number * IMAGES * up
        assert row["downlink_bytes"] == number * IMAGES * (up - 8)
        assert row["handoffs"] == 3 * number - 1
        assert row["handoff_bytes"] == (3 * number - 1) * segment
    for column in ("train_loss", "val_loss", "val_accuracy"):
        logged = logger.values(column.replace("_", "/", 1))
        assert [row[column] for row in history.rows] == pytest.approx(logged)
    seconds = [row["seconds"] for row in history.rows]
    assert 0 < seconds[0] < seconds[1] < seconds[2]


def test_what_was_not_measured_is_empty(tmp_path):
    history = History(tmp_path)
    fit(tmp_path, [history], data=make_data(val_share=0.0))
    for row in read(tmp_path / "history.csv"):
        assert (row["val_loss"], row["val_accuracy"]) == ("", "")
        assert float(row["train_loss"]) > 0
    assert history.best() is None


def test_a_round_without_validation_has_no_old_values(tmp_path):
    history = History()
    fit(tmp_path, [history], max_epochs=4, check_val_every_n_epoch=2)
    measured = [row["val_accuracy"] is not None for row in history.rows]
    assert measured == [False, True, False, True]
    assert [row["val_loss"] is not None for row in history.rows] == measured


def test_the_unsplit_network_sends_nothing(tmp_path):
    history = History(tmp_path)
    fit(tmp_path, [history], make_centralized(), make_data(1), passing=None)
    assert [row["uplink_bytes"] for row in history.rows] == [0, 0]
    assert [row["images"] for row in history.rows] == [IMAGES, 2 * IMAGES]
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("when", ["mid-round", "end of a round"])
def test_a_run_that_goes_on_has_the_whole_history(tmp_path, when):
    whole, resumed = History(), History(tmp_path / "resumed")
    if when == "mid-round":
        path, images, known = tmp_path / "middle.ckpt", IMAGES + 7 + 7 + 2 + 7, 1
        save = SaveAt(path, 1, 3)
    else:
        path, images, known = tmp_path / "epoch=1.ckpt", 2 * IMAGES, 2
        save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, monitor=None)
    fit(tmp_path, [whole, save], max_epochs=3, enable_checkpointing=True)
    state = torch.load(path, weights_only=True)["callbacks"]["History"]
    assert (len(state["rows"]), state["images"]) == (known, images)
    fit(tmp_path, [resumed], max_epochs=3, ckpt_path=path)
    for before, after in zip(whole.rows, resumed.rows, strict=True):
        # The losses of a round's first part are not the callback's to keep.
        for column in set(COLUMNS) - {"seconds", "train_loss"}:
            assert before[column] == after[column], column
    assert resumed.rows[:known] == whole.rows[:known]
    seconds = [row["seconds"] for row in resumed.rows]
    assert seconds == sorted(seconds)
    assert read(tmp_path / "resumed" / "history.csv") == as_read(resumed.rows)


def test_another_fit_is_another_history(tmp_path):
    history = History()
    for _ in range(2):
        fit(tmp_path, [history], max_epochs=1)
        assert [row["round"] for row in history.rows] == [1]
        assert history.rows[0]["images"] == IMAGES


def test_a_reader_sees_a_whole_file(tmp_path, monkeypatch):
    """Whatever goes wrong in writing, the last file stays, and nothing beside it."""
    calls = []

    def refuse(source, target, true_replace=os.replace):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        true_replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        fit(tmp_path, [History(tmp_path / "run")])
    assert [row["round"] for row in read(tmp_path / "run" / "history.csv")] == ["1"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["history.csv"]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    history = History(tmp_path / "run")
    fit(tmp_path, [history], max_epochs=1)
    assert len(history.rows) == 1
    assert not (tmp_path / "run").exists()


def test_without_a_bar_each_round_is_a_line_of_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO, "split_lightning")
    fit(tmp_path, [History()])
    lines = [r.getMessage() for r in caplog.records if "round" in r.getMessage()]
    assert len(lines) == 2
    assert lines[1].startswith("round 2/2: train loss ")
    for words in ("val loss", "val accuracy", "96 images in", "kB"):
        assert words in lines[1]


def test_the_best_round_is_the_first_of_the_highest_accuracy():
    history = History()
    history.rows = [{"val_accuracy": value} for value in (0.5, None, 0.9, 0.9, 0.8)]
    assert history.best() is history.rows[2]
