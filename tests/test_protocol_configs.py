"""What `protocol=NAME` builds is the protocol that a plain loop was held against."""

from pathlib import Path

import pytest
import torch
from flwr_datasets.partitioner import LinearPartitioner
from hydra import compose, initialize_config_dir
from protocols import assert_equal, fit, make_data, make_split, make_unsplit, state_of
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from split_lightning import (
    GPSL,
    AsynchronousWeightPassing,
    Centralized,
    CycleSL,
    FedAvg,
    Local,
    MultiServer,
    ParallelSplitLearning,
    RoundRobinWeightPassing,
    SplitFedV1,
    SplitFedV2,
    SplitFedV3,
)
from split_lightning.cli.building import build
from split_lightning.cli.config import check_classes, check_values

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
EXPECTED = {
    "round_robin": RoundRobinWeightPassing(),
    "async_round_robin": AsynchronousWeightPassing(),
    "parallel": ParallelSplitLearning(),
    "gpsl": GPSL(),
    "cyclesl": CycleSL(server_batch_size=5),
    "splitfed_v1": SplitFedV1(),
    "splitfed_v2": SplitFedV2(),
    "splitfed_v3": SplitFedV3(),
    "multi_server": MultiServer(),
    "centralized": Centralized(),
    "fedavg": FedAvg(),
    "local": Local(),
}
# What each protocol takes, but for those that have no use for it.
NO_USE = {
    "clients_per_round": {"centralized"},
    "local_epochs": set(),
    "local_steps": {"parallel", "gpsl", "cyclesl", "centralized"},
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


def composed(folder, *typed):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*TINY, f"output_dir={folder}", *typed])
    check_values(cfg, typed)
    check_classes(cfg)
    cfg.callbacks = {}
    return cfg


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_each_protocol_takes_the_keys_of_all(tmp_path, name):
    """A key that a configuration does not pass on fails here."""
    taken = {key for key, without in NO_USE.items() if name not in without}
    typed = [f"protocol={name}", *(f"{key}={TYPED[key]}" for key in sorted(taken))]
    if name == "parallel":  # without averaging it has no use for `optimizer_state`
        typed.append("protocol.every=1")
    for key in NO_USE.keys() - taken - {"spill_to"}:
        with pytest.raises(ValueError, match=f"does not use `{key}`"):
            composed(tmp_path, *typed, f"{key}={TYPED[key]}")
    if "spill_to" not in taken:
        with pytest.raises(MisconfigurationException, match="`spill_to` to be null"):
            build(composed(tmp_path, *typed, "spill_to=waiting"))

    run = build(composed(tmp_path, *typed))
    loader, protocol = run.data.train_dataloader(), run.data.protocol
    parts = [(step, part) for step in loader.planned() for part in step.parts]
    clients = {part.client_id for _, part in parts}
    samples = sum(part.num_samples for _, part in parts)
    assert len(clients) == (3 if "clients_per_round" in taken else 1)
    assert samples == 2 * sum(len(loader.partition[k]) for k in clients)
    if "local_steps" in taken:  # more turns than clients
        assert sum(part.ends_turn for _, part in parts) > len(clients)
    policy = getattr(protocol, "policy", protocol)
    if "optimizer_state" in taken:
        assert policy.optimizer_state == "reset"
    if "server_optimizer_state" in taken:
        assert policy.server_optimizer_state == "travel"
    if "buffers" in taken:
        assert policy.buffers == "keep"
    if "spill_to" in taken:
        assert run.module.engine.spill.folder == Path("waiting")


def test_each_protocol_is_here():
    assert EXPECTED.keys() == PROTOCOLS


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_the_configured_protocol_is_the_one_in_python(tmp_path, name):
    run = build(composed(tmp_path, f"protocol={name}"))
    torch.manual_seed(11)
    run.trainer.fit(run.module, datamodule=run.data)
    (found,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)

    protocol = EXPECTED[name]
    data = make_data(4, protocol, partitioner=LinearPartitioner, batch_size=5)
    module = make_split() if protocol.unsplit_at is None else make_unsplit()
    torch.manual_seed(11)  # of the server's passes in cyclesl
    trainer = fit(tmp_path, module, data, rounds=2)
    (expected,) = trainer.test(module, datamodule=data, verbose=False)
    assert found == expected
    for client_id in range(1 if protocol.pools_samples else 4):
        own = state_of(run.module, client_id)
        assert_equal(own, state_of(module, client_id))
    assert run.module.totals() == module.totals()
