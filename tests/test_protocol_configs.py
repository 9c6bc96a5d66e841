"""What `protocol=NAME` builds is the protocol that a plain loop was held against."""

from pathlib import Path

import pytest
import torch
from flwr_datasets.partitioner import LinearPartitioner
from hydra import compose, initialize_config_dir
from protocols import (
    SGD,
    assert_equal,
    fit,
    make_data,
    make_split,
    make_unsplit,
    network,
)

from split_lightning import (
    CycleSplitLightningModule,
    RoundRobinWeightPassing,
    ServerMap,
)
from split_lightning.building import build
from split_lightning.callbacks import ClientAveraging, ServerAveraging
from split_lightning.config import check
from split_lightning.data import ParallelSchedule, PooledSchedule, RoundRobinSchedule

EACH = ServerMap(None)


def make_cycle(**options):
    return CycleSplitLightningModule(network(), 2, SGD, SGD, 3, **options)


CONF = Path(__file__).parent.parent / "conf"
PROTOCOLS = {path.stem for path in (CONF / "protocol").glob("*.yaml")}
TINY = [
    "data.source._target_=conftest.RandomImages",
    "model.network._target_=protocols.network",
    *(
        f"~model.network.{name}"
        for name in ("num_classes", "in_channels", "image_size")
    ),
    "data.num_classes=3",
    "data/partitioner=linear",
    "data.val_share=0.2",
    "model.cut_layer=2",
    "num_clients=4",
    "batch_size=5",
    "rounds=2",
    "seed=3",
    "logger=none",
    "optimizer.client.lr=0.05",
    "optimizer.server.lr=0.05",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "trainer.enable_checkpointing=false",
]
# Schedule, server map, callbacks; options of the split module, or `None`: unsplit.
V1_SERVERS = ServerAveraging(remote=False)
EXPECTED = {
    "round_robin": (RoundRobinSchedule(), None, [RoundRobinWeightPassing()], {}),
    "parallel": (ParallelSchedule(), None, [ClientAveraging(None)], {}),
    "gpsl": (
        ParallelSchedule(draw="proportional"),
        None,
        [ClientAveraging("step")],
        {"cut_gradient": "own", "batch_norm": "joint"},
    ),
    "cyclesl": (
        ParallelSchedule(),
        None,
        [ClientAveraging()],
        {"make": make_cycle, "server_batch_size": 5},
    ),
    "splitfed_v1": (RoundRobinSchedule(), EACH, [ClientAveraging(), V1_SERVERS], {}),
    "splitfed_v2": (RoundRobinSchedule(shuffle=True), None, [ClientAveraging()], {}),
    "splitfed_v3": (
        RoundRobinSchedule(),
        EACH,
        [ClientAveraging(None), V1_SERVERS],
        {},
    ),
    "multi_server": (
        RoundRobinSchedule(),
        ServerMap(2),
        [RoundRobinWeightPassing(average_every=1), ServerAveraging()],
        {},
    ),
    "centralized": (PooledSchedule(), None, [], None),
    "fedavg": (RoundRobinSchedule(), None, [ClientAveraging()], None),
    "local": (RoundRobinSchedule(), None, [ClientAveraging(None)], None),
}


def test_each_protocol_is_here():
    assert EXPECTED.keys() == PROTOCOLS


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_the_configured_protocol_is_the_one_in_python(tmp_path, name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*TINY, f"protocol={name}", f"output_dir={tmp_path}"])
    check(cfg)
    cfg.callbacks = {}
    run = build(cfg)
    torch.manual_seed(11)
    run.trainer.fit(run.module, datamodule=run.data)
    (found,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)

    schedule, servers, callbacks, options = EXPECTED[name]
    data = make_data(
        4,
        partitioner=LinearPartitioner,
        schedule=schedule,
        servers=servers,
        batch_size=5,
    )
    if options is None:
        module = make_unsplit()
    else:
        make = options.get("make", make_split)
        chosen = {key: value for key, value in options.items() if key != "make"}
        module = make(server_map=servers, **chosen)
    torch.manual_seed(11)  # of the server's passes in cyclesl
    trainer = fit(tmp_path, module, data, callbacks, rounds=2)
    (expected,) = trainer.test(module, datamodule=data, verbose=False)
    assert found == expected
    for client_id in range(4):
        for party in (run.module, module):
            party.parties.show(client_id)
        assert_equal(run.module.state_dict(), module.state_dict())
    assert run.module.totals() == module.totals()
