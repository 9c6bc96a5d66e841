"""Two processes that share each batch out train as one process does."""

import json
import os
import signal
import socket
import subprocess
import sys
from functools import cache, partial

import pytest
import torch
from conftest import RandomImages, begin_child, exit_code
from safetensors.torch import load_file
from test_killed import assert_equal, at_batch, events_of
from test_train import command

from split_lightning import SplitDataModule
from split_lightning.data import TrainLoader
from split_lightning.processes import Processes

# Of 479 samples 34 validate; 445 leave a last batch of one: turns of 4 batches.
RUN = [
    "rounds=2",
    "num_clients=3",
    "batch_size=148",
    "model.network._target_=conftest.plain_network",
    "data.val_share=0.07",
    "trainer.log_every_n_steps=1",
]
CUT = "model.cut_layer=2"
TWO = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"]

CASES = {
    "keep": [CUT],
    "travel": [CUT, "optimizer_state=travel", "model.accumulate_grad_batches=3"],
    "no passing": [CUT, "protocol.enabled=false"],
    "skewed": [
        CUT,
        "optimizer_state=reset",
        "data/augmentation=crop",
        "data/partitioner=dirichlet",
        "protocol.shuffle=true",
        "clients_per_round=2",
        "model.gradient_clip_val=0.1",
    ],
    "skips": [
        CUT,
        "model.non_finite=skip",
        "data.augmentation={_target_:conftest.SpoiledImage}",
    ],
    "splitfed_v1": ["protocol=splitfed_v1", CUT, "data/partitioner=linear"],
    "splitfed_v2": [
        "protocol=splitfed_v2",
        CUT,
        "local_steps=1",
        "optimizer_state=travel",
        "data/partitioner=linear",
    ],
    "vertical": [CUT, "topology=vertical", "topology/parts=quadrants"],
    "U": [
        CUT,
        "topology=u_shaped",
        "model.head_layer=5",
        "data/partitioner=linear",
        "model.gradient_clip_val=0.1",
    ],
    "unsplit": ["protocol=centralized", "num_clients=1"],
}


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def start_two(folder, *overrides, before=lambda rank, monkeypatch: None):
    """Starts two processes as torchrun does; returns their exit statuses."""
    port = str(free_port())

    def process(rank):
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "test",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        with pytest.MonkeyPatch.context() as monkeypatch:
            before(rank, monkeypatch)
            command(monkeypatch, folder, *overrides, *TWO)

    return [exit_code(p) for p in [begin_child(partial(process, k)) for k in (0, 1)]]


def the_run(folder):
    (found,) = folder.glob("runs/**/results.json")
    return found.parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns, of a case, the run of one process and that of two; each is made once."""

    @cache
    def of(case):
        one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
        assert start_two(two, *RUN, *CASES[case]) == [0, 0]
        with pytest.MonkeyPatch.context() as monkeypatch:
            command(monkeypatch, one, *RUN, *CASES[case])
        return the_run(one), the_run(two)

    return of


@pytest.mark.parametrize("case", CASES)
def test_weights_metrics_and_bytes_are_those_of_one_process(runs, case):
    one, two = runs(case)
    for file in one.glob("*.safetensors"):
        expected, found = load_file(file), load_file(two / file.name)
        for name in expected:
            torch.testing.assert_close(
                found[name], expected[name], rtol=1e-3, atol=1e-5
            )
    expected, found = (
        json.loads((run / "results.json").read_text()) for run in (one, two)
    )
    # A batch of which one process alone has the spoiled image is skipped by both.
    assert expected["skipped_batches"] == (2 if case == "skips" else 0)
    for name, value in expected.items():
        if name in ("images_per_second", "seconds"):
            continue
        exact = isinstance(value, int)
        assert found[name] == (value if exact else pytest.approx(value, abs=5e-3)), name
    rows = [(run / "history.csv").read_text().splitlines() for run in (one, two)]
    columns = rows[0][0].split(",")
    for before, after in zip(*rows, strict=True):
        for name, x, y in zip(
            columns, before.split(","), after.split(","), strict=True
        ):
            if name.endswith("bytes") or name in ("round", "images", "handoffs"):
                assert x == y
    log = (two / "train.log").read_text()
    assert log.count("round 2/2") == 1


def test_what_is_logged_is_of_the_whole_batch(runs):
    one, two = map(events_of, runs("keep"))
    tags = set(one.Tags()["scalars"])
    assert tags == set(two.Tags()["scalars"])
    assert tags >= {"train/batch_loss", "cut/smashed_norm", "drift/client"}
    for tag in tags:
        if tag.startswith(("memory", "train/images")):
            continue
        values = [[e.value for e in run.Scalars(tag)] for run in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=2e-3, abs=1e-4), tag


def test_two_processes_stop_together_and_go_on(runs, tmp_path):
    """In the second round, with a batch's gradient that waits for its step."""
    _, whole = runs("travel")
    overrides = [*RUN, *CASES["travel"], f"hydra.run.dir={tmp_path / 'run'}"]

    def interrupt_one(rank, monkeypatch):
        if rank == 1:  # the other learns of it
            monkeypatch.setattr(*at_batch(21, signal.SIGTERM))

    stopped = start_two(tmp_path, *overrides, before=interrupt_one)
    assert stopped == [128 + signal.SIGTERM] * 2
    assert start_two(tmp_path, *overrides, "ckpt_path=last") == [0, 0]
    assert_equal(tmp_path / "run", whole)


def test_clients_that_act_together_are_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, tmp_path, "protocol=parallel", *RUN, CUT, *TWO)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "2 processes share out the batches of clients that train one" in message
    assert "Trainer(devices=1, strategy='auto')" in message
    assert "Traceback" not in message


def test_a_sweep_of_several_processes_is_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, "-m", "seed=0,1", *RUN, CUT, *TWO)
    message = capsys.readouterr().err
    assert "one process for each run of a sweep" in message
    assert "Traceback" not in message


SCRIPT = "from split_lightning.cli.main import main; main()"  # split-lightning


def test_lightnings_own_launcher(tmp_path):
    """It starts the command a second time, from the console script or the module."""
    words = [*RUN, CUT, *TWO, "rounds=1", "trainer.enable_progress_bar=false"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "train", *words],
        cwd=tmp_path,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = the_run(tmp_path)
    assert json.loads((run / "results.json").read_text())["rounds"] == 1
    assert done.stdout.count("test accuracy") == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 7])
def test_shares_are_a_partition_of_the_batch(world_size, num_samples):
    taken, shares = [], []
    for rank in range(world_size):
        own, share = Processes(rank, world_size).share_of(num_samples)
        shares.append(share)
        samples = list(range(num_samples))[own]
        assert samples
        taken += samples if share else []
    assert sorted(taken) == list(range(num_samples))
    assert sum(shares) == pytest.approx(1.0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_process_knows_the_size_of_the_whole_batch(world_size):
    """Averaging weighs by it: by its own share each process would make another mean."""
    data = SplitDataModule(RandomImages(), 3, batch_size=5, val_share=0.2)
    data.setup("fit")
    whole = data.train_dataloader()
    expected = [len(batch.targets) for step in whole for batch in step.parts]
    assert 1 in expected  # fewer samples than processes
    own = []
    for rank in range(world_size):
        place = Processes(rank, world_size)
        loader = TrainLoader(
            whole.images,
            whole.partition,
            whole.protocol,
            whole.new_round,
            whole.normalize,
            processes=place,
        )
        batches = [batch for step in loader for batch in step.parts]
        assert [batch.num_samples_of_all for batch in batches] == expected
        own.append([batch.num_samples for batch in batches])
    assert [sum(shares) for shares in zip(*own, strict=True)] == expected
