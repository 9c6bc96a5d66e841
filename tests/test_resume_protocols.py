"""Each protocol goes on after a stop as one that was never stopped, bit for bit."""

from functools import partial

import pytest
import torch
from conftest import tiny_network
from flwr_datasets.partitioner import LinearPartitioner
from split_lightning.server_map import ServerMap
from test_resume import ADAM, check, make_data, make_module

from split_lightning import CycleSplitLightningModule, RoundRobinWeightPassing
from split_lightning.callbacks import ClientAveraging, ServerAveraging
from split_lightning.data import ParallelSchedule, PooledSchedule, RoundRobinSchedule

EACH, TWO = ServerMap(None), ServerMap(2)
V1 = [ClientAveraging, partial(ServerAveraging, remote=False)]
V3 = [partial(ClientAveraging, None), partial(ServerAveraging, remote=False)]
TURNS = partial(RoundRobinSchedule, local_steps=1)
SOME = partial(RoundRobinSchedule, shuffle=True, clients_per_round=2)


def policies(policy, buffers="average"):
    return {
        "optimizer_state": policy,
        "server_optimizer_state": policy,
        "buffers": buffers,
    }


def together(every, draw="equal", clients=None, **options):
    schedule = partial(ParallelSchedule, clients_per_round=clients, draw=draw)
    return [partial(ClientAveraging, every)], schedule, {}, options


def in_turn(callbacks, schedule=RoundRobinSchedule, servers=None, **options):
    data = {} if servers is None else {"servers": servers}
    module = options if servers is None else options | {"server_map": servers}
    return callbacks, schedule, data, module


groups = [
    partial(RoundRobinWeightPassing, average_every=2),
    partial(ServerAveraging, 2),
]
every_round = [
    partial(RoundRobinWeightPassing, average_every=1),
    partial(ServerAveraging, 1),
]
PROTOCOLS = {
    "parallel": together(None),
    "parallel, some clients": together(None, clients=2),
    "parallel, drawn from all": together(None, "proportional"),
    "parallel, averaged": together(1, **policies("travel", "keep")),
    "parallel, averaged, drawn": together(1, "proportional", **policies("reset")),
    "parallel, every two rounds": together(2, clients=2, **policies("keep", "keep")),
    "parallel, each step": together("step"),
    "parallel, each step, drawn": together("step", "proportional", buffers="keep"),
    "parallel, accumulated": together(1, accumulate_grad_batches=2),
    "gpsl": together("step", "proportional", cut_gradient="own", batch_norm="joint"),
    "splitfed_v1, keep": in_turn(V1, TURNS, EACH, **policies("keep", "keep")),
    "splitfed_v1, travel": in_turn(V1, SOME, EACH, **policies("travel")),
    "splitfed_v1, reset": in_turn(V1, TURNS, EACH, **policies("reset", "keep")),
    "splitfed_v2, keep": in_turn([ClientAveraging], TURNS, **policies("keep")),
    "splitfed_v2, travel": in_turn(
        [partial(ClientAveraging, 2)], TURNS, **policies("travel", "keep")
    ),
    "splitfed_v2, reset": in_turn([ClientAveraging], SOME, **policies("reset")),
    "splitfed_v3": in_turn(V3, SOME, EACH, server_optimizer_state="travel"),
    "several servers, keep": in_turn(groups, TURNS, TWO, **policies("keep", "keep")),
    "several servers, travel": in_turn(every_round, SOME, TWO, **policies("travel")),
    "several servers, reset": in_turn(groups, TURNS, TWO, **policies("reset")),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_split(tmp_path, protocol):
    callbacks, schedule, data_options, options = PROTOCOLS[protocol]

    def make():
        data = make_data(
            schedule=schedule(),
            partitioner=LinearPartitioner,
            batch_size=10,
            **data_options,
        )
        return make_module(ADAM, **options), data

    check(tmp_path, make, (2, 5, 7), callbacks)


@pytest.mark.parametrize("clients", [None, 2])
def test_cyclesl(tmp_path, clients):
    """The server's batches are drawn on from where they were."""
    flow, schedule, _, options = together(1, clients=clients, server_batch_size=8)

    def make():
        torch.manual_seed(5)
        module = CycleSplitLightningModule(tiny_network(), 1, ADAM, ADAM, 3, **options)
        data = make_data(schedule=schedule(), partitioner=LinearPartitioner)
        return module, data

    check(tmp_path, make, (2, 7), flow)


UNSPLIT = {
    "fedavg, keep": ([ClientAveraging], TURNS, {"buffers": "keep"}),
    "fedavg, travel": ([ClientAveraging], SOME, {"optimizer_state": "travel"}),
    "fedavg, reset": (
        [partial(ClientAveraging, 2)],
        TURNS,
        {"optimizer_state": "reset"},
    ),
    "local": ([partial(ClientAveraging, None)], SOME, {}),
    "centralized": ([], PooledSchedule, {}),
}


@pytest.mark.parametrize("protocol", UNSPLIT)
def test_unsplit(tmp_path, protocol):
    callbacks, schedule, options = UNSPLIT[protocol]

    def make():
        data = make_data(
            schedule=schedule(), partitioner=LinearPartitioner, batch_size=10
        )
        return make_module(ADAM, centralized=True, **options), data

    check(tmp_path, make, (2, 5, 7), callbacks)
