"""Real processes, killed and stopped at several moments; the command line goes on."""

import json
import os
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import in_child
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import command

from split_lightning import SplitLightningModule
from split_lightning.callbacks import checkpoint_io
from split_lightning.cli import building, training
from split_lightning.runs.checkpoints import find_checkpoint

RUN = [
    "rounds=3",
    "num_clients=3",
    "batch_size=128",
    "callbacks.last.every_n_batches=2",
    "logger.tensorboard.default_hp_metric=false",
    "trainer.log_every_n_steps=1",
]
PER_ROUND = 12  # batches: 431 samples of each client, 128 at a time


def at_batch(number, signum):
    """Has the process get a signal in the middle of its n-th training step."""
    step, left = SplitLightningModule.training_step, [number]

    def training_step(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signum)
        return loss

    return (SplitLightningModule, "training_step", training_step)


def at_call(name, number):
    """Has the process killed in its n-th call of a function that writes checkpoints."""
    function, left = getattr(os, name), [number]

    def killing(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    class Os:
        def __getattr__(self, other):
            return killing if other == name else getattr(os, other)

    return (checkpoint_io, "os", Os())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        (run,) = command(monkeypatch, folder, *RUN)
    return run


def outcome(run):
    """What a run ends with, but for the clock."""
    results = json.loads((run / "results.json").read_text())
    for name in ("seconds", "images_per_second"):
        del results[name]
    history = (run / "history.csv").read_text().splitlines()
    rows = [line.rsplit(",", 1)[0] for line in history]
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return results, rows, last["state_dict"], last["optimizer_states"]


def assert_equal(run, other):
    for one, two in zip(outcome(run)[:2], outcome(other)[:2], strict=True):
        assert one == two
    for part in (2, 3):
        torch.testing.assert_close(
            outcome(run)[part], outcome(other)[part], rtol=0, atol=0
        )
    for name in ("client.safetensors", "server.safetensors"):
        one, two = load_file(run / name), load_file(other / name)
        assert all(torch.equal(one[key], two[key]) for key in one)


MOMENTS = {
    "in the first round": at_batch(6, signal.SIGKILL),
    "in a later one": at_batch(PER_ROUND + 5, signal.SIGKILL),
    "as a checkpoint is written": at_call("fsync", 8),
    "before it is in its place": at_call("replace", 10),
    "as the one before is kept": at_call("link", 4),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment(monkeypatch, tmp_path, whole, moment):
    run = tmp_path / "run"

    def start():
        monkeypatch.setattr(*MOMENTS[moment])
        command(monkeypatch, tmp_path, *RUN, f"hydra.run.dir={run}")

    assert in_child(start) == -signal.SIGKILL
    assert not (run / "results.json").exists()
    assert find_checkpoint(str(run), run) == str(run / "checkpoints" / "last.ckpt")
    await_next_second()
    command(monkeypatch, tmp_path, *RUN, f"hydra.run.dir={run}", "ckpt_path=last")
    assert_equal(run, whole)
    steps = [
        [event.step for event in events_of(folder).Scalars("train/batch_loss")]
        for folder in (run, whole)
    ]
    # In one folder TensorBoard shows each batch once; but for that of the checkpoint,
    # whose loss Lightning logs after it has written the checkpoint.
    assert len(set(steps[0])) == len(steps[0])
    assert len(set(steps[1]) - set(steps[0])) <= 1


def await_next_second():
    """TensorBoard reads the files of a run in the order of the seconds they began."""
    time.sleep(1 - time.time() % 1)


def events_of(run):
    accumulator = EventAccumulator(str(run / "tensorboard"), {"scalars": 0})
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(
    monkeypatch, tmp_path, capfd, whole, signum
):
    run = tmp_path / "run"

    def start():
        monkeypatch.setattr(*at_batch(PER_ROUND + 3, signum))
        command(monkeypatch, tmp_path, *RUN, f"hydra.run.dir={run}")

    assert in_child(start) == 128 + signum
    message = capfd.readouterr().err
    assert "Traceback" not in message
    assert f"{signum.name} after batch 3 of round 2" in message
    (line,) = (line for line in message.splitlines() if line.startswith("Resume with"))
    assert "split_lightning.train rounds=3" in line
    assert f" hydra.run.dir={run} ckpt_path=last" in line
    command(monkeypatch, tmp_path, *shlex.split(line)[5:], pictures=True)
    assert_equal(run, whole)


def signalled(owner, name, signum):
    """Has the process get a signal when a function is called."""
    function = getattr(owner, name)

    def signalling(*args, **options):
        os.kill(os.getpid(), signum)
        return function(*args, **options)

    return (owner, name, signalling)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("owner", "name"), [(SplitLightningModule, "test_step"), (training, "write")]
)
def test_a_signal_after_training_says_how_to_go_on(
    monkeypatch, tmp_path, capfd, whole, signum, owner, name
):
    run = tmp_path / "run"

    def start():
        monkeypatch.setattr(*signalled(owner, name, signum))
        command(monkeypatch, tmp_path, *RUN, f"hydra.run.dir={run}")

    assert in_child(start) == 128 + signum
    assert not (run / "results.json").exists()
    message = capfd.readouterr().err
    assert "Traceback" not in message
    last = run / "checkpoints" / "last.ckpt"
    assert f"{signum.name}; the last checkpoint is {last}" in message
    (line,) = (line for line in message.splitlines() if line.startswith("Resume with"))
    command(monkeypatch, tmp_path, *shlex.split(line)[5:], pictures=True)
    results = [json.loads((r / "results.json").read_text()) for r in (run, whole)]
    for key in ("test_accuracy", "test_loss", "val_loss", "handoff_bytes"):
        assert results[0][key] == results[1][key]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_run_begins_leaves_nothing(
    monkeypatch, tmp_path, capfd, signum
):
    def start():
        monkeypatch.setattr(*signalled(building, "build_module", signum))
        command(monkeypatch, tmp_path, *RUN)

    assert in_child(start) == 128 + signum
    message = capfd.readouterr().err
    assert "Traceback" not in message
    assert f"{signum.name}; there is no checkpoint to resume from." in message
    assert not Path(tmp_path, "runs").exists()


def test_last_is_the_newest_run_beside(monkeypatch, tmp_path, whole):
    def start():
        monkeypatch.setattr(*at_batch(PER_ROUND + 3, signal.SIGKILL))
        command(monkeypatch, tmp_path, *RUN)

    assert in_child(start) == -signal.SIGKILL
    (run,) = command(monkeypatch, tmp_path, *RUN, "ckpt_path=last")
    assert_equal(run, whole)


def test_a_finished_run_has_only_its_test_left(monkeypatch, tmp_path, whole):
    (run,) = command(monkeypatch, tmp_path, *RUN, f"ckpt_path={whole}")
    results = [json.loads((r / "results.json").read_text()) for r in (run, whole)]
    for name in ("test_accuracy", "val_accuracy", "train_loss", "uplink_bytes"):
        assert results[0][name] == results[1][name]


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "other"])
def test_a_damaged_checkpoint_names_the_one_before(
    monkeypatch, tmp_path, capsys, whole, damage
):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    good = (whole / "checkpoints" / "last.ckpt").read_bytes()
    (folder / "previous.ckpt").write_bytes(good)
    if damage == "other":
        torch.save({"weights": torch.zeros(3)}, folder / "last.ckpt")
    else:
        middle = len(good) // 2
        flipped = good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :]
        damaged = {"torn": good[:middle], "flipped": flipped, "empty": b""}[damage]
        (folder / "last.ckpt").write_bytes(damaged)
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, tmp_path, *RUN, f"ckpt_path={tmp_path}")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert str(folder / "last.ckpt") in message
    assert f"ckpt_path={folder / 'previous.ckpt'}" in message
    assert not Path(tmp_path, "runs").exists()


def test_last_without_a_checkpoint_is_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, *RUN, "ckpt_path=last")
    assert "there is none" in capsys.readouterr().err
