"""Arguments of protocols that are out of range: each message names the argument."""

from functools import partial

import pytest
from protocols import fit, make_data, make_split

from split_lightning import (
    GPSL,
    AsynchronousWeightPassing,
    CycleSL,
    FedAvg,
    MultiServer,
    ParallelSplitLearning,
    RoundRobinWeightPassing,
    SplitFedV1,
    SplitFedV2,
    SplitFedV3,
)
from split_lightning.coders import AverageGradients
from split_lightning.protocols import Round

ROUNDS = "a positive number of rounds"
STATES = r"\('keep', 'travel', 'reset'\).*'lose'"
MISTAKES = {
    "no server": (partial(MultiServer, 0), "`num_servers` to be a positive.*got 0"),
    "clients_per_round": (
        partial(GPSL, clients_per_round=0),
        "`clients_per_round` to be a positive number of clients.*got 0",
    ),
    "too many clients": (
        lambda: Round(0, [6, 6, 6], batch_size=2).clients(4),
        r"`clients_per_round` to be at most `num_clients` \(3\), but got 4",
    ),
    "local_steps": (
        partial(SplitFedV2, local_steps=0),
        "`local_steps` to be a positive number of batches.*got 0",
    ),
    "every": (partial(ParallelSplitLearning, 0), f"`every` to be {ROUNDS}, the word"),
    "every, a word": (partial(ParallelSplitLearning, "round"), "`every`.*got 'round'"),
    "every, a truth value": (partial(FedAvg, True), "`every`.*got True"),
    "every, a fraction": (partial(SplitFedV1, every=1.5), r"`every`.*got 1\.5"),
    "every, negative": (partial(SplitFedV3, every=-1), f"`every` to be {ROUNDS}.*-1"),
    "servers_every": (
        partial(MultiServer, servers_every="step"),
        f"`servers_every` to be {ROUNDS}, or null for never, but got 'step'",
    ),
    "server_passes": (partial(CycleSL, 0), "`server_passes` to be a positive.*got 0"),
    "AverageGradients": (
        partial(AverageGradients, 1),
        "to be at least 2 clients.*got 1",
    ),
    "optimizer_state": (
        partial(RoundRobinWeightPassing, optimizer_state="lose"),
        f"`optimizer_state` to be one of {STATES}",
    ),
    "server_optimizer_state": (
        partial(SplitFedV3, server_optimizer_state="lose"),
        f"`server_optimizer_state` to be one of {STATES}",
    ),
    "buffers": (
        partial(CycleSL, buffers="sum"),
        r"`buffers` to be one of \('average', 'keep'\), but got 'sum'",
    ),
    "max_staleness": (
        partial(AsynchronousWeightPassing, max_staleness=-1),
        "`max_staleness` to be an age from 0.*got -1",
    ),
    "in_flight": (
        partial(AsynchronousWeightPassing, in_flight=0),
        "`in_flight` to be a positive number of batches, but got 0",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    make, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        make()


class TwoServers(ParallelSplitLearning):
    num_servers = 2


def test_clients_of_two_servers_do_not_meet_in_a_step(tmp_path):
    with pytest.raises(ValueError, match=r"clients of a step to share a server"):
        fit(tmp_path, make_split(), make_data(2, TwoServers(every=1)))


def test_more_servers_than_clients_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`num_servers` to be .* 1 to .*\(2\).*got 3"):
        fit(tmp_path, make_split(), make_data(2, MultiServer(3)))


def test_a_checkpoint_of_other_clients_together_is_refused(tmp_path):
    few = make_data(3, ParallelSplitLearning(1, clients_per_round=2))
    trainer = fit(tmp_path, make_split(), few, rounds=1)
    trainer.save_checkpoint(tmp_path / "few.ckpt")
    for protocol, message in (
        (ParallelSplitLearning(1), r"train together \(3\), but there were 2"),
        (
            GPSL(clients_per_round=2),
            "`ckpt_path`.* exactly.*ParallelSplitLearning.*GPSL",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            fit(
                tmp_path,
                make_split(),
                make_data(3, protocol),
                ckpt_path=tmp_path / "few.ckpt",
            )
