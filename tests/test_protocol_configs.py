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
    AsynchronousSplitLightningModule,
    CycleSplitLightningModule,
    RoundRobinWeightPassing,
    ServerMap,
)
from split_lightning.callbacks import (
    AsynchronousWeightPassing,
    ClientAveraging,
    ServerAveraging,
)
from split_lightning.cli.building import build
from split_lightning.cli.config import check_classes, check_values
from split_lightning.data import (
    AsynchronousSchedule,
    ParallelSchedule,
    PooledSchedule,
    RoundRobinSchedule,
)

EACH = ServerMap(None)


def composed(folder, *typed):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*TINY, f"output_dir={folder}", *typed])


def make_cycle(**options):
    return CycleSplitLightningModule(network(), 2, SGD, SGD, 3, **options)


def make_asynchronous(**options):
    return AsynchronousSplitLightningModule(network(), 2, SGD, SGD, 3, **options)


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
    "data.image_size=6",
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
    "async_round_robin": (
        AsynchronousSchedule(),
        None,
        [AsynchronousWeightPassing()],
        {"make": make_asynchronous},
    ),
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


# What each protocol takes, but for those that have no use for it.
NO_USE = {
    "clients_per_round": {"centralized"},
    "local_epochs": set(),
    "local_steps": PROTOCOLS
    - {"round_robin", "async_round_robin", "splitfed_v2", "multi_server"},
    "optimizer_state": {"centralized", "local", "gpsl", "splitfed_v3"},
    "server_optimizer_state": PROTOCOLS
    - {"splitfed_v1", "splitfed_v3", "multi_server"},
    "buffers": {"centralized", "local", "gpsl", "round_robin"},
    "spill_to": {"centralized", "gpsl"},
}
TYPED = {
    "clients_per_round": 3,
    "local_epochs": 2,
    "local_steps": 1,
    "optimizer_state": "reset",
    "server_optimizer_state": "travel",
    "buffers": "keep",
    "spill_to": "waiting",
}


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_each_protocol_takes_the_keys_of_all(tmp_path, name):
    """A key that a configuration does not pass on fails here."""
    taken = {key for key, without in NO_USE.items() if name not in without}
    typed = [f"protocol={name}", *(f"{key}={TYPED[key]}" for key in sorted(taken))]
    if name == "parallel":  # without averaging it has no use for `optimizer_state`
        typed.append("protocol.callbacks.weight_passing.every=1")
    cfg = composed(tmp_path, *typed)
    check_values(cfg, typed)
    check_classes(cfg)
    for key in NO_USE.keys() - taken:
        with pytest.raises(ValueError, match=f"does not use `{key}`"):
            check_values(cfg, [f"{key}={TYPED[key]}"])

    cfg.callbacks = {}
    run = build(cfg)
    run.data.setup("fit")
    sampler = run.data.train_dataloader().sampler
    steps = list(sampler.plans())
    clients = {plan.client_id for step in steps for plan in step}
    samples = sum(len(plan.indices) for step in steps for plan in step)
    assert len(clients) == (3 if "clients_per_round" in taken else 1)
    assert samples == 2 * sum(len(sampler.partition[k]) for k in clients)
    if "local_steps" in taken:  # more turns than clients
        assert sum(step[0].ends_turn for step in steps) > len(clients)
    parties = run.module.parties
    if "optimizer_state" in taken:
        assert parties.clients.optimizer_state == "reset"
    if "server_optimizer_state" in taken:
        assert parties.servers.optimizer_state == "travel"
    if "buffers" in taken:
        held = [parties.clients, *([parties.servers] if parties.servers else [])]
        assert {replicas.buffers for replicas in held} == {"keep"}
    if "spill_to" in taken:
        assert parties.spill.folder == Path("waiting")


def test_each_protocol_is_here():
    assert EXPECTED.keys() == PROTOCOLS


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_the_configured_protocol_is_the_one_in_python(tmp_path, name):
    cfg = composed(tmp_path, f"protocol={name}")
    check_values(cfg)
    check_classes(cfg)
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
