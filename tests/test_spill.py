"""What waits in files of a folder: the same run as in memory, and nothing left."""

import gc
import os
import signal
from functools import partial

import pytest
from conftest import begin_child, exit_code
from killing import Kill, Killed
from protocols import (
    ADAM,
    assert_equal,
    fit,
    make_data,
    make_split,
    make_unsplit,
    state_of,
)
from pytorch_lightning import Callback
from test_resume import assert_same

from split_lightning import (
    AsynchronousWeightPassing,
    Engine,
    Local,
    ParallelSplitLearning,
    RoundRobinWeightPassing,
    SplitFedV1,
    SplitFedV2,
    SplitLightningModule,
)
from split_lightning.callbacks import ResumeCheckpoint
from split_lightning.spill import SpillFolder
from split_lightning.train import main

# Where clients must remember: the module, and the protocol.
CASES = {
    "own optimizer states": (make_split, RoundRobinWeightPassing),
    "own weights": (make_split, partial(RoundRobinWeightPassing, enabled=False)),
    "own servers": (make_split, partial(SplitFedV1, 2)),
    "several turns, averaged but for buffers": (
        make_split,
        partial(SplitFedV2, local_steps=1, optimizer_state="travel", buffers="keep"),
    ),
    "two at a time": (
        make_split,
        partial(ParallelSplitLearning, 2, clients_per_round=2),
    ),
    "at the same time": (make_split, AsynchronousWeightPassing),
    "alone": (make_unsplit, Local),
}


def at_rest(module):
    """What is at rest: of each segment, part by part, the parties' states."""
    return [store.state_dict()["own"] for store in module.engine.stores]


class Files(Callback):
    """Counts the files in a folder after each step, and what the engine remembers."""

    def __init__(self, folder):
        self.folder = folder
        self.counts = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        waiting = sum(
            len(own) for parts in at_rest(pl_module) for own in parts.values()
        )
        self.counts.append((len(list(self.folder.rglob("*.pt"))), waiting))


def trained(folder, case, spill_to=None, optimizer=ADAM, more=(), **options):
    make, protocol = CASES[case]
    module = make(optimizer=optimizer, engine=Engine(spill_to=spill_to))
    trainer = fit(folder, module, make_data(3, protocol()), more, **options)
    return module, trainer


@pytest.mark.parametrize("case", CASES)
def test_a_run_with_files_equals_one_in_memory(tmp_path, case):
    """A stale file, or one that is not removed when it is taken, fails here."""
    expected, _ = trained(tmp_path, case)
    files = Files(tmp_path / "waiting")
    module, trainer = trained(tmp_path, case, tmp_path / "waiting", more=[files])
    assert all(count == waiting for count, waiting in files.counts)
    assert max(count for count, _ in files.counts) >= 2
    assert_same(expected.engine.state_dict(), module.engine.state_dict())
    for client_id in range(3):
        assert_equal(state_of(module, client_id), state_of(expected, client_id))
    assert trainer.test(module, datamodule=make_data(), verbose=False)


@pytest.mark.parametrize("before", [True, False], ids=["from files", "from memory"])
def test_a_checkpoint_holds_what_is_in_files(tmp_path, before):
    """A run continues from it in files or in memory, whichever it began with."""
    case, spill = "own servers", tmp_path / "waiting"
    whole, _ = trained(tmp_path, case)
    checkpoint = ResumeCheckpoint(tmp_path / "checkpoints", every_n_batches=1)
    with pytest.raises(Killed):
        trained(tmp_path, case, spill if before else None, more=[checkpoint, Kill(10)])
    last = tmp_path / "checkpoints" / "last.ckpt"
    now = None if before else spill
    module, _ = trained(tmp_path, case, now, ckpt_path=last)
    assert_same(whole.engine.state_dict(), module.engine.state_dict())
    assert_equal(state_of(module), state_of(whole))


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
        store["client/3"] = {}
        os.kill(os.getpid(), signal.SIGKILL)

    living = SpillFolder(tmp_path)
    store = living.store()
    store["client/1"] = {}
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

    monkeypatch.setattr(SplitLightningModule, "on_test_start", note)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train", *QUICK, "hydra.run.dir=run"])
    if ends_well:
        main()
        assert (tmp_path / "run" / "results.json").is_file()
    else:
        with pytest.raises(Killed):
            main()
    assert seen == [2 * 3]  # three parts of the states of the two that wait
    assert not spill.exists()


@pytest.mark.parametrize("protocol", ["centralized", "gpsl"])
def test_refused_where_nobody_waits(monkeypatch, tmp_path, capsys, protocol):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["train", f"protocol={protocol}", "spill_to=waiting"]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "`spill_to` to be null where all clients train one state" in message
    assert "Traceback" not in message
    assert not (tmp_path / "waiting").exists()
