"""Two processes that share each batch out train as one process does."""

import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import begin_child, exit_code
from safetensors.torch import load_file
from test_killed import assert_equal, at_batch, events_of
from test_train import command

from split_lightning.processes import Processes

# Of 479 samples 34 validate; 445 leave a last batch of one.
RUN = [
    "rounds=2",
    "num_clients=3",
    "batch_size=37",
    "model.network._target_=conftest.plain_network",
    "data.val_share=0.07",
    "trainer.log_every_n_steps=1",
]
CUT = "model.cut_layer=2"
TWO = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"]


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def start_two(monkeypatch, folder, *overrides, before=lambda rank: None):
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
        before(rank)
        command(monkeypatch, folder, *overrides, *TWO)

    return [exit_code(p) for p in [begin_child(partial(process, k)) for k in (0, 1)]]


def the_run(folder):
    (found,) = folder.glob("runs/**/results.json")
    return found.parent


CASES = {
    "keep": [CUT],
    "travel": [CUT, "optimizer_state=travel", "model.accumulate_grad_batches=2"],
    "no passing": [CUT, "protocol.callbacks.weight_passing.enabled=false"],
    "skewed": [
        CUT,
        "optimizer_state=reset",
        "data/augmentation=crop",
        "data/partitioner=dirichlet",
        "protocol.schedule.shuffle=true",
        "clients_per_round=2",
        "model.gradient_clip_val=0.1",
    ],
    "unsplit": ["protocol=centralized", "num_clients=1"],
}


@pytest.mark.parametrize("case", CASES)
def test_weights_metrics_and_bytes_are_those_of_one_process(
    monkeypatch, tmp_path, case
):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    overrides = [*RUN, *CASES[case]]
    assert start_two(monkeypatch, two, *overrides) == [0, 0]
    command(monkeypatch, one, *overrides)
    one, two = the_run(one), the_run(two)
    for file in one.glob("*.safetensors"):
        expected, found = load_file(file), load_file(two / file.name)
        for name in expected:
            torch.testing.assert_close(
                found[name], expected[name], rtol=1e-3, atol=1e-5
            )
    expected, found = (
        json.loads((run / "results.json").read_text()) for run in (one, two)
    )
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


def test_what_is_logged_is_of_the_whole_batch(monkeypatch, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    overrides = [*RUN, CUT, "rounds=1"]
    assert start_two(monkeypatch, tmp_path / "two", *overrides) == [0, 0]
    command(monkeypatch, tmp_path / "one", *overrides)
    one, two = (events_of(the_run(tmp_path / name)) for name in ("one", "two"))
    tags = set(one.Tags()["scalars"])
    assert tags == set(two.Tags()["scalars"])
    assert tags >= {"train/batch_loss", "cut/smashed_norm", "drift/client"}
    for tag in tags:
        if tag.startswith(("memory", "train/images")):
            continue
        values = [[e.value for e in run.Scalars(tag)] for run in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=2e-3, abs=1e-4), tag


def test_two_processes_stop_together_and_go_on(monkeypatch, tmp_path):
    overrides = [*RUN, CUT, "optimizer_state=travel"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    code = start_two(monkeypatch, tmp_path, *overrides, f"hydra.run.dir={whole}")
    assert code == [0, 0]

    def interrupt_one(rank):
        if rank == 1:  # the other learns of it
            monkeypatch.setattr(*at_batch(20, signal.SIGTERM))

    stopped = start_two(
        monkeypatch,
        tmp_path,
        *overrides,
        f"hydra.run.dir={run}",
        before=interrupt_one,
    )
    assert stopped == [128 + signal.SIGTERM] * 2
    code = start_two(
        monkeypatch, tmp_path, *overrides, f"hydra.run.dir={run}", "ckpt_path=last"
    )
    assert code == [0, 0]
    assert_equal(run, whole)


def test_a_sweep_of_several_processes_is_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, "-m", "seed=0,1", *RUN, CUT, *TWO)
    message = capsys.readouterr().err
    assert "one process for each run of a sweep" in message
    assert "Traceback" not in message


def test_lightnings_own_launcher(tmp_path):
    """It starts the command a second time, from the console script or the module."""
    words = [*RUN, CUT, *TWO, "rounds=1", "trainer.enable_progress_bar=false"]
    done = subprocess.run(
        [sys.executable, "-m", "split_lightning.train", *words],
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
