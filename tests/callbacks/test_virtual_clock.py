"""The virtual seconds of whole runs, against times added up by hand."""

import json

import pytest
import torch
from protocols import (
    ROUNDS,
    assert_equal,
    batches_of,
    fit,
    make_data,
    make_split,
    make_unsplit,
    state_of,
)
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from test_train import command

from split_lightning import (
    Centralized,
    Local,
    ParallelSplitLearning,
    RoundRobinWeightPassing,
    SplitFedV1,
)
from split_lightning.callbacks import History, ResumeCheckpoint, VirtualClock
from split_lightning.observers import Clock
from split_lightning.system import System, work_of

UP, DOWN = 4 * 4 * 36 + 8, 4 * 4 * 36  # bytes of a sample, cut after layer 2


def a_system():
    return System([1e5, 1e6], 1e6, [1e4, 1e5], [1e5, 1e6], latency=0.01, seed=5)


def clocked(tmp_path, module, protocol, **options):
    clock, data = VirtualClock(a_system()), make_data(3, protocol, **options)
    fit(tmp_path, module, data, [clock])
    return clock, data


def parts_of_a_step(module, client_id, count):
    """Up to the server, at the server, and from there on, in seconds."""
    system = a_system()
    device = system.client(client_id)
    mine, theirs = work_of(module.segments(), torch.rand(1, 1, 6, 6))
    return (
        count * mine.forward / device.flops + device.sends(UP * count),
        count * sum(theirs) / system.server_flops,
        device.receives(DOWN * count) + count * mine.backward / device.flops,
    )


def size_of(segment):
    return sum(tensor.nbytes for tensor in segment.state_dict().values())


def test_a_round_robin_is_one_chain(tmp_path):
    """Each step, then each hand-off, waits for the one before."""
    module = make_split()
    clock, _ = clocked(tmp_path, module, RoundRobinWeightPassing())
    total, before, size = 0.0, None, size_of(module.client)
    for round_index in range(ROUNDS):
        for ((client, _, targets),) in batches_of(make_data(), round_index):
            if before not in (None, client):
                one, other = (a_system().client(k) for k in (before, client))
                total += one.sends(size) + other.receives(size)
            before = client
            total += sum(parts_of_a_step(module, client, len(targets)))
    assert clock.seconds == pytest.approx(total)


def test_clients_with_a_server_each_work_at_the_same_time(tmp_path):
    """SplitFed v1: the slowest decides, each round; replicas are at one place."""
    module = make_split()
    clock, _ = clocked(tmp_path, module, SplitFedV1())
    size, ready, servers = size_of(module.client), dict.fromkeys(range(3), 0.0), 0.0
    for round_index in range(ROUNDS):
        own = dict.fromkeys(range(3), servers)
        for ((k, _, targets),) in batches_of(make_data(), round_index):
            up, at, back = parts_of_a_step(module, k, len(targets))
            own[k] = max(ready[k] + up, own[k]) + at
            ready[k] = own[k] + back
        devices = {k: a_system().client(k) for k in ready}
        made = max(ready[k] + devices[k].sends(size) for k in ready)
        ready = {k: made + devices[k].receives(size) for k in ready}
        servers = max(own.values())
    assert clock.seconds == pytest.approx(max(ready.values()))


@pytest.mark.parametrize("every", [None, "step"])
def test_clients_together_wait_for_each_other(tmp_path, every):
    module, protocol = make_split(), ParallelSplitLearning(every)
    clock, _ = clocked(tmp_path, module, protocol, batch_size=8)
    size, ready = size_of(module.client), dict.fromkeys(range(3), 0.0)
    for round_index in range(ROUNDS):
        for parts in batches_of(make_data(3, protocol, batch_size=8), round_index):
            times = {k: parts_of_a_step(module, k, len(t)) for k, _, t in parts}
            at = max(ready[k] + times[k][0] for k in times)
            at += sum(own[1] for own in times.values())
            ready |= {k: at + own[2] for k, own in times.items()}
            if every == "step":
                devices = {k: a_system().client(k) for k in times}
                made = max(ready[k] + devices[k].sends(size) for k in times)
                ready |= {k: made + devices[k].receives(size) for k in times}
    assert clock.seconds == pytest.approx(max(ready.values()))


def test_unsplit_networks_compute_where_the_samples_are(tmp_path):
    central = make_unsplit()
    clock, data = clocked(tmp_path, central, Centralized())
    (work,) = work_of(central.segments(), torch.rand(1, 1, 6, 6))
    samples = ROUNDS * sum(map(len, data.parts))
    assert clock.seconds == pytest.approx(samples * sum(work) / 1e6)
    alone = make_unsplit()
    clock, data = clocked(tmp_path, alone, Local())
    own = [ROUNDS * len(part) * sum(work) for part in data.parts]
    speeds = [a_system().client(k).flops for k in range(3)]
    expected = max(flops / speed for flops, speed in zip(own, speeds, strict=True))
    assert clock.seconds == pytest.approx(expected)


def test_the_clock_changes_nothing(tmp_path):
    states = []
    for more in ([], [VirtualClock(a_system())]):
        module = make_split()
        fit(tmp_path, module, make_data(), [RoundRobinWeightPassing(), *more])
        states.append(state_of(module))
        observers = module.channel.observers
        assert not [own for own in observers if isinstance(own, Clock)]  # taken away
    assert_equal(*states)


class Spoiled(torch.nn.CrossEntropyLoss):
    """The losses of some training batches are not finite."""

    def __init__(self, batches):
        super().__init__()
        self.batches, self.number = batches, 0

    def forward(self, logits, targets):
        loss = super().forward(logits, targets)
        self.number += loss.requires_grad
        spoiled = loss.requires_grad and self.number in self.batches
        return loss * float("nan") if spoiled else loss


@pytest.mark.parametrize(
    ("make", "protocol"), [(make_split, RoundRobinWeightPassing), (make_unsplit, Local)]
)
def test_batches_that_are_skipped_take_their_time(tmp_path, make, protocol):
    """They were sent and computed, like those that count."""
    seconds = []
    for batches in ([], [2, 5, 6]):
        module = make(criterion=Spoiled(batches), non_finite="skip")
        clock, _ = clocked(tmp_path, module, protocol())
        assert module.skipped_batches == len(batches)
        seconds.append(clock.seconds)
    assert seconds[1] == pytest.approx(seconds[0])


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ([], "but it has none"),
        ([VirtualClock(System(1e5, 1e6, 1e4, 1e5, seed=5))], "but got System"),
    ],
)
def test_it_goes_on_with_the_time_of_the_same_system_alone(tmp_path, before, words):
    """Else its seconds would be of neither."""
    flow = [RoundRobinWeightPassing(), ResumeCheckpoint(tmp_path)]
    fit(tmp_path, make_split(), make_data(), [*flow, *before], rounds=1)
    flow = [RoundRobinWeightPassing(), VirtualClock(a_system())]
    with pytest.raises(ValueError, match=words):
        fit(tmp_path, make_split(), make_data(), flow, ckpt_path=tmp_path / "last.ckpt")


def test_each_fit_has_a_time_of_its_own(tmp_path):
    """The module counts from 0 again, too."""
    module, clock, seconds = make_split(), VirtualClock(a_system()), []
    for _ in range(2):
        fit(tmp_path, module, make_data(), [RoundRobinWeightPassing(), clock])
        seconds.append(clock.seconds)
    assert seconds[0] == pytest.approx(seconds[1])


def test_it_needs_the_data_of_the_clients(tmp_path):
    data = make_data()
    data.setup("fit")
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=[RoundRobinWeightPassing(), VirtualClock(a_system())],
    )
    with pytest.raises(MisconfigurationException, match="to be a SplitDataModule"):
        trainer.fit(make_split(), data.train_dataloader())


def test_it_is_for_one_process():
    trainer = Trainer(accelerator="cpu", strategy="ddp", devices=2, logger=False)
    with pytest.raises(MisconfigurationException, match="virtual clock is for one"):
        VirtualClock(a_system()).setup(trainer, make_split(), "fit")


def test_the_time_to_an_accuracy_is_of_the_first_round_that_had_it():
    history = History()
    accuracies = [0.05, 0.31, None, 0.29, 0.4]
    history.rows = [
        {"val_accuracy": accuracy, "virtual_seconds": 10.0 * number}
        for number, accuracy in enumerate(accuracies, 1)
    ]
    expected = {"0.1": 20.0, "0.2": 20.0, "0.3": 20.0, "0.4": 50.0}
    assert history.time_to_accuracy() == expected


@pytest.mark.parametrize("system", ["lan", "wan", "mobile", "heterogeneous"])
def test_the_command_line(monkeypatch, tmp_path, system):
    words = [f"system={system}", "rounds=1", "trainer.limit_train_batches=20"]
    (folder,) = command(monkeypatch, tmp_path, *words)
    results = json.loads((folder / "results.json").read_text())
    assert results["virtual_seconds"] > 0
    assert set(results["time_to_accuracy"].values()) <= {results["virtual_seconds"]}


def test_a_run_without_a_system_has_no_virtual_seconds(monkeypatch, tmp_path):
    (folder,) = command(
        monkeypatch, tmp_path, "rounds=1", "trainer.limit_train_batches=2"
    )
    results = json.loads((folder / "results.json").read_text())
    assert "virtual_seconds" not in results
    assert "time_to_accuracy" not in results
