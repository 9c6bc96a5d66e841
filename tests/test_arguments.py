"""Arguments of protocols that are out of range: each message names the argument."""

from functools import partial

import pytest
from protocols import fit, make_data, make_split
from split_lightning.server_map import ServerMap

from split_lightning import RoundRobinWeightPassing
from split_lightning.callbacks import ClientAveraging, ServerAveraging
from split_lightning.data import ParallelSchedule, RoundRobinSchedule

ROUNDS = "a positive number of rounds"
MISTAKES = {
    "no server": (partial(ServerMap, 0), "`num_servers` to be a positive.*got 0"),
    "servers": (
        lambda: ServerMap(3).server_of(0, num_clients=2),
        r"`num_servers` to be at most `num_clients` \(2\), but got 3",
    ),
    "draw": (
        partial(ParallelSchedule, draw="most"),
        r"`draw` to be one of \('equal', 'proportional'\), but got 'most'",
    ),
    "clients_per_round": (
        partial(ParallelSchedule, clients_per_round=0),
        "`clients_per_round` to be a positive number of clients.*got 0",
    ),
    "too many clients": (
        lambda: ParallelSchedule(4).turns(3, round_index=0, seed=0),
        r"`clients_per_round` to be at most `num_clients` \(3\), but got 4",
    ),
    "local_steps": (
        partial(RoundRobinSchedule, local_steps=0),
        "`local_steps` to be a positive number of batches.*got 0",
    ),
    "every": (partial(ClientAveraging, 0), f"`every` to be {ROUNDS}, the word step"),
    "every, a word": (partial(ClientAveraging, "round"), "`every`.*got 'round'"),
    "every, a truth value": (partial(ClientAveraging, True), "`every`.*got True"),
    "every, a fraction": (partial(ClientAveraging, 1.5), r"`every`.*got 1\.5"),
    "servers' every": (partial(ServerAveraging, -1), f"`every` to be {ROUNDS}.*got -1"),
    "servers' step": (partial(ServerAveraging, "step"), "`every`.*got 'step'"),
    "average_every": (
        partial(RoundRobinWeightPassing, average_every=0),
        f"`average_every` to be {ROUNDS}, or null for never, but got 0",
    ),
    "average_cut_gradients": (
        partial(make_split, average_cut_gradients=1),
        "`average_cut_gradients` to be at least 2 clients, or null.*got 1",
    ),
    "cut_gradient": (
        partial(make_split, cut_gradient="mean"),
        r"`cut_gradient` to be one of \('joint', 'own'\), but got 'mean'",
    ),
    "optimizer_state": (
        partial(make_split, optimizer_state="lose"),
        r"`optimizer_state` to be one of \('keep', 'travel', 'reset'\).*'lose'",
    ),
    "server_optimizer_state": (
        partial(make_split, server_optimizer_state="lose"),
        r"`server_optimizer_state` to be one of .*'lose'",
    ),
    "buffers": (
        partial(make_split, buffers="sum"),
        r"`buffers` to be one of \('average', 'keep'\), but got 'sum'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    make, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        make()


def test_servers_of_the_module_alone_are_refused(tmp_path):
    """Clients of two servers would meet in a step."""
    data = make_data(2, schedule=ParallelSchedule())
    module = make_split(server_map=ServerMap(2))
    with pytest.raises(ValueError, match=r"to share a server.*the same `servers`"):
        fit(tmp_path, module, data, [ClientAveraging(every=1)])


def test_more_servers_than_clients_are_refused(tmp_path):
    three = ServerMap(3)
    data, module = make_data(2, servers=three), make_split(server_map=three)
    with pytest.raises(ValueError, match=r"`num_servers` to be at most"):
        fit(tmp_path, module, data, [RoundRobinWeightPassing()])


def test_a_checkpoint_of_fewer_clients_together_is_refused(tmp_path):
    few = make_data(3, schedule=ParallelSchedule(clients_per_round=2))
    trainer = fit(tmp_path, make_split(), few, [ClientAveraging(every=1)], rounds=1)
    trainer.save_checkpoint(tmp_path / "few.ckpt")
    for schedule, message in (
        (ParallelSchedule(), r"act together \(3\), but there were 2"),
        (ParallelSchedule(2, "proportional"), r"go on exactly \(schedule=.*equal"),
    ):
        data = make_data(3, schedule=schedule)
        with pytest.raises(ValueError, match=message):
            fit(
                tmp_path,
                make_split(),
                data,
                [ClientAveraging(every=1)],
                ckpt_path=tmp_path / "few.ckpt",
            )
