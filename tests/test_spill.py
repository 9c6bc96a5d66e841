"""What waits in files of a folder: the same run as in memory, and nothing left."""

import gc
import os
import signal
from functools import partial

import pytest
from conftest import begin_child, exit_code
from protocols import ADAM, assert_equal, fit, make_data, make_split, make_unsplit
from pytorch_lightning import Callback
from split_lightning.classifier import Classifier
from split_lightning.server_map import ServerMap
from test_resume import Kill, Killed, assert_same

from split_lightning import RoundRobinWeightPassing, merge
from split_lightning.callbacks import (
    ClientAveraging,
    ResumeCheckpoint,
    ServerAveraging,
)
from split_lightning.data import ParallelSchedule, RoundRobinSchedule
from split_lightning.spill import SpillFolder
from split_lightning.train import main

EACH = ServerMap(None)
TURNS = {"schedule": RoundRobinSchedule(local_steps=1)}
PAIRS = {"schedule": ParallelSchedule(clients_per_round=2)}
# Where clients must remember: the module, the data, the callbacks.
CASES = {
    "own optimizer states": (make_split, {}, lambda: [RoundRobinWeightPassing()]),
    "own weights": (
        make_split,
        {},
        lambda: [RoundRobinWeightPassing(enabled=False)],
    ),
    "several turns, own servers": (
        partial(make_split, server_map=EACH),
        TURNS | {"servers": EACH},
        lambda: [ClientAveraging(), ServerAveraging(remote=False)],
    ),
    "averaged, but for buffers": (
        partial(make_split, optimizer_state="travel", buffers="keep"),
        TURNS,
        lambda: [ClientAveraging()],
    ),
    "two at a time": (make_split, PAIRS, lambda: [ClientAveraging(every=2)]),
    "alone": (make_unsplit, {}, lambda: [ClientAveraging(every=None)]),
}


class Files(Callback):
    """Counts the files in a folder after each step, and what the module remembers."""

    def __init__(self, folder):
        self.folder = folder
        self.counts = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = pl_module.parties.state_dict()
        names = ("weights", "own_buffers", "optimizer_states")
        waiting = sum(len(own[name]) for own in state.values() for name in names)
        self.counts.append((len(list(self.folder.rglob("*.pt"))), waiting))


def trained(folder, case, spill_to=None, optimizer=ADAM, more=(), **options):
    make, data, callbacks = CASES[case]
    module = make(optimizer=optimizer, spill_to=spill_to)
    trainer = fit(folder, module, make_data(**data), [*callbacks(), *more], **options)
    return module, trainer


def segments_of(module, client_id):
    module.parties.show(client_id)
    states = [segment.state_dict() for segment in module.segments().values()]
    copies = [{k: v.clone() for k, v in state.items()} for state in states]
    module.parties.show_live()
    return copies


@pytest.mark.parametrize("case", CASES)
def test_a_run_with_files_equals_one_in_memory(tmp_path, case):
    """A stale file, or one that is not removed when it is taken, fails here."""
    expected, _ = trained(tmp_path, case)
    files = Files(tmp_path / "waiting")
    module, trainer = trained(tmp_path, case, tmp_path / "waiting", more=[files])
    assert all(count == waiting for count, waiting in files.counts)
    assert max(count for count, _ in files.counts) >= 2
    assert_same(expected.parties.state_dict(), module.parties.state_dict())
    for client_id in range(3):
        pairs = zip(
            segments_of(module, client_id),
            segments_of(expected, client_id),
            strict=True,
        )
        for own, other in pairs:
            assert_equal(own, other)
    assert trainer.test(module, datamodule=make_data(), verbose=False)


@pytest.mark.parametrize("before", [True, False], ids=["from files", "from memory"])
def test_a_checkpoint_holds_what_is_in_files(tmp_path, before):
    """A run goes on from it in files or in memory, whichever it began with."""
    case, spill = "several turns, own servers", tmp_path / "waiting"
    whole, _ = trained(tmp_path, case)
    checkpoint = ResumeCheckpoint(tmp_path / "checkpoints", every_n_batches=1)
    with pytest.raises(Killed):
        trained(tmp_path, case, spill if before else None, more=[checkpoint, Kill(10)])
    make, data, callbacks = CASES[case]
    module = make(optimizer=ADAM, spill_to=None if before else spill)
    last = tmp_path / "checkpoints" / "last.ckpt"
    fit(tmp_path, module, make_data(**data), callbacks(), ckpt_path=last)
    assert_same(whole.parties.state_dict(), module.parties.state_dict())
    assert_equal(
        merge(module.client, module.server),
        merge(whole.client, whole.server),
    )


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    message = "Expected argument `spill_to` to be a folder that can be written.*file"
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, "alone", tmp_path / "file" / "waiting")


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("ends_well", [True, False])
def test_nothing_is_left_behind(tmp_path, ends_well, is_there):
    """A folder that was there before stays, with what else is in it."""
    spill = tmp_path / "waiting"
    if is_there:
        spill.mkdir()
        (spill / "own.txt").write_text("")
    if ends_well:
        module, _ = trained(tmp_path, "alone", spill)
        assert any(spill.rglob("*.pt"))
        del module, _
    else:
        with pytest.raises(Killed):
            trained(tmp_path, "alone", spill, more=[Kill(4)])
    gc.collect()
    assert [p.name for p in tmp_path.rglob("*") if "waiting" in str(p)] == (
        ["waiting", "own.txt"] if is_there else []
    )


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    """But not what belongs to a process that lives."""

    def use_and_be_killed():
        store = SpillFolder(tmp_path).store()
        store[3] = {}
        os.kill(os.getpid(), signal.SIGKILL)

    living = SpillFolder(tmp_path)
    store = living.store()
    store[1] = {}
    assert exit_code(begin_child(use_and_be_killed)) == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.pt"))) == 2
    other = SpillFolder(tmp_path)
    expected = sorted([living.open(), other.open()])
    assert sorted(tmp_path.iterdir()) == expected
    assert len(list(tmp_path.rglob("*.pt"))) == 1


QUICK = ["protocol=local", "data=digits", "num_clients=3", "rounds=1"]
QUICK += ["trainer.limit_train_batches=80", "batch_size=16", "logger=none"]
QUICK += ["trainer.enable_progress_bar=false", "spill_to=${output_dir}/waiting"]


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_run_from_the_command_line(monkeypatch, tmp_path, ends_well):
    """Its files are in its folder; they are gone when it has been tested, or failed."""
    spill, seen = tmp_path / "run" / "waiting", []

    def note(self):
        seen.append(len(list(spill.rglob("*.pt"))))
        if not ends_well:
            raise Killed

    monkeypatch.setattr(Classifier, "on_test_start", note)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train", *QUICK, "hydra.run.dir=run"])
    if ends_well:
        main()
        assert (tmp_path / "run" / "results.json").is_file()
    else:
        with pytest.raises(Killed):
            main()
    assert seen == [2 * 2]  # weights and optimizer states of the two that wait
    assert not spill.exists()


@pytest.mark.parametrize("protocol", ["centralized", "gpsl"])
def test_refused_where_nobody_waits(monkeypatch, tmp_path, capsys, protocol):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["train", f"protocol={protocol}", "spill_to=waiting"]
    )
    with pytest.raises(SystemExit):
        main()
    assert "spill_to" in capsys.readouterr().err
    assert not (tmp_path / "waiting").exists()
