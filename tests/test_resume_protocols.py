"""Each protocol, and each topology, continues after a stop at any step, bit for bit.

In the middle of a turn and at its end, between rounds, with gradients that wait for a
step, with means half made, and with batches on their way.
"""

from functools import partial

import pytest
import torch
from flwr_datasets.partitioner import LinearPartitioner
from protocols import network
from test_resume import ADAM, check_at_each_step, make_data, make_module
from torch import nn

from split_lightning import (
    GPSL,
    AsynchronousWeightPassing,
    Centralized,
    ClientNetwork,
    CycleSL,
    FedAvg,
    Local,
    MultiServer,
    ParallelSplitLearning,
    RoundRobinWeightPassing,
    SplitFedV1,
    SplitFedV2,
    SplitFedV3,
    SplitLightningModule,
)
from split_lightning.callbacks import VirtualClock
from split_lightning.models import vertical_network
from split_lightning.models.parts import Tiles
from split_lightning.system import Availability, System

SYSTEM = System([1e5, 1e6], 1e6, [1e4, 1e5], [1e5, 1e6], latency=0.01, seed=5)
BATCH = 10  # clients of 8, 16 and 24 images: 1, 2 and 3 batches


def both(policy, buffers="average"):
    return {
        "optimizer_state": policy,
        "server_optimizer_state": policy,
        "buffers": buffers,
    }


TURNS = {"local_steps": 1}
SOME = {"clients_per_round": 2}
SHUFFLED = {"shuffle": True} | SOME
TWO = {"every": 2, "servers_every": 2} | TURNS
PROTOCOLS = {
    "round_robin": partial(RoundRobinWeightPassing, **TURNS),
    "round_robin, travel": partial(
        RoundRobinWeightPassing, optimizer_state="travel", **SHUFFLED
    ),
    "round_robin, reset": partial(
        RoundRobinWeightPassing, optimizer_state="reset", **TURNS
    ),
    "round_robin, alone": partial(RoundRobinWeightPassing, enabled=False),
    "parallel": ParallelSplitLearning,
    "parallel, some clients": partial(ParallelSplitLearning, **SOME),
    "parallel, averaged": partial(
        ParallelSplitLearning, 1, optimizer_state="travel", buffers="keep"
    ),
    "parallel, every two": partial(
        ParallelSplitLearning, 2, optimizer_state="reset", **SOME
    ),
    "parallel, each step": partial(ParallelSplitLearning, "step"),
    "gpsl": GPSL,
    "gpsl, own statistics": partial(GPSL, joint_norm=False, **SOME),
    "splitfed_v1, keep": partial(SplitFedV1, **both("keep", "keep")),
    "splitfed_v1, travel": partial(SplitFedV1, every=2, **both("travel"), **SOME),
    "splitfed_v1, reset": partial(SplitFedV1, **both("reset", "keep")),
    "splitfed_v2, keep": partial(SplitFedV2, **TURNS),
    "splitfed_v2, travel": partial(
        SplitFedV2, every=2, optimizer_state="travel", buffers="keep", **TURNS
    ),
    "splitfed_v2, reset": partial(SplitFedV2, optimizer_state="reset", **SHUFFLED),
    "splitfed_v3": partial(SplitFedV3, server_optimizer_state="travel"),
    "several servers, keep": partial(MultiServer, **both("keep", "keep"), **TWO),
    "several servers, travel": partial(MultiServer, **both("travel"), **SHUFFLED),
    "several servers, reset": partial(MultiServer, **both("reset"), **TWO),
    "cyclesl": partial(CycleSL, 1, 8),  # whose batches are drawn
    "cyclesl, some clients": partial(CycleSL, 2, 8, every=2, **SOME),
    "async": partial(AsynchronousWeightPassing, in_flight=2),
    "async, travel": partial(
        AsynchronousWeightPassing,
        in_flight=3,
        local_steps=2,
        max_staleness=2,
        optimizer_state="travel",
    ),
    "async, reset": partial(
        AsynchronousWeightPassing,
        in_flight=2,
        optimizer_state="reset",
        buffers="keep",
        **SHUFFLED,
    ),
}
UNSPLIT = {
    "fedavg, keep": partial(FedAvg, buffers="keep"),
    "fedavg, travel": partial(FedAvg, optimizer_state="travel", **SOME),
    "fedavg, reset": partial(FedAvg, 2, optimizer_state="reset"),
    "local": partial(Local, **SOME),
    "centralized": Centralized,
}


def data_of(batch_size=BATCH, **options):
    return make_data(partitioner=LinearPartitioner, batch_size=batch_size, **options)


@pytest.mark.parametrize("name", PROTOCOLS | UNSPLIT)
def test_each_protocol(tmp_path, name):
    cut_layer = None if name in UNSPLIT else 1

    def make():
        return make_module(ADAM, cut_layer=cut_layer), data_of()

    protocol = (PROTOCOLS | UNSPLIT)[name]
    check_at_each_step(tmp_path, make, [protocol, partial(VirtualClock, SYSTEM)])


ACCUMULATED = {
    "round_robin": RoundRobinWeightPassing,
    "parallel": partial(ParallelSplitLearning, 1),
    "gpsl": GPSL,
    "splitfed_v1": SplitFedV1,
    "centralized": Centralized,
}


@pytest.mark.parametrize("name", ACCUMULATED)
def test_gradients_that_wait_for_a_step(tmp_path, name):
    """And clients that are absent, or drop out."""
    away = {} if name == "centralized" else {"availability": Availability(0.2, 0.4)}
    cut_layer = None if name == "centralized" else 1

    def make():
        module = make_module(ADAM, cut_layer=cut_layer, accumulate_grad_batches=3)
        return module, data_of(**away, local_epochs=2)

    check_at_each_step(tmp_path, make, [ACCUMULATED[name]])


def vertical():
    return vertical_network(network, 2, Tiles(1, 2), (1, 6, 6))


def client_networks():
    small = nn.Sequential(nn.Conv2d(1, 4, 5, padding=2), nn.BatchNorm2d(4), nn.ReLU())
    return {"client_networks": [None, ClientNetwork(small)], "image_shape": (1, 6, 6)}


TOPOLOGIES = {  # the network, where it is cut, and further options
    "u_shaped": (network, [2, 5], {"labels": "client"}),
    "multi_hop": (network, [2, 5], {}),
    "vertical": (vertical, ["bottoms"], {}),
    "vertical_u": (
        vertical,
        ["bottoms", "top.5"],
        {"labels": "client", "label_holder": 1},
    ),
    "cut per client": (network, [[0, 3]], {}),
    "client networks": (network, 2, client_networks),
}
ON_TOPOLOGIES = {
    "round_robin": partial(RoundRobinWeightPassing, optimizer_state="travel"),
    "several servers": partial(MultiServer, every=2, **both("reset", "keep")),
    "parallel": partial(ParallelSplitLearning, 1),
    "async": partial(AsynchronousWeightPassing, in_flight=2),
}
ALIKE = [name for name in TOPOLOGIES if "client" not in name]  # asynchronous mixes all


@pytest.mark.parametrize(
    ("topology", "protocol"),
    [
        (topology, protocol)
        for topology in TOPOLOGIES
        for protocol in ON_TOPOLOGIES
        if protocol != "async" or topology in ALIKE
    ],
)
def test_each_topology(tmp_path, topology, protocol):
    make_network, cuts, options = TOPOLOGIES[topology]

    def make():
        torch.manual_seed(5)
        more = options() if callable(options) else options
        return SplitLightningModule(make_network(), cuts, ADAM, ADAM, 3, **more), (
            data_of(batch_size=14)  # 1, 2 and 2 batches
        )

    check_at_each_step(tmp_path, make, [ON_TOPOLOGIES[protocol]])
