"""Weight passing, watched from outside at each turn."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import RandomImages, Recorder, tiny_network
from pytorch_lightning import Callback, Trainer

from split_lightning import (
    RoundRobinWeightPassing,
    SplitDataModule,
    SplitLightningModule,
)
from split_lightning.store import tensors_in


def cloned(module, client_id=None):
    segment = module.segments(client_id)["client"]
    return {name: tensor.clone() for name, tensor in segment.state_dict().items()}


class Watch(Callback):
    """Notes the client segment at the start and the end of each turn."""

    def __init__(self):
        self.turns = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.turns or self.turns[-1]["end"] is not None:
            (client,) = batch.client_ids
            start = cloned(pl_module, client)
            self.turns.append({"client": client, "start": start, "end": None})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch.ends_turn:
            self.turns[-1]["end"] = cloned(pl_module)
            self.turns[-1]["active"] = pl_module.engine.last_client


def run(tmp_path, passing=None, rounds=2, logger=False, **data_options):
    watch, passing = Watch(), passing or RoundRobinWeightPassing()
    options = {"num_clients": 3, "batch_size": 7, "val_share": 0.0} | data_options
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    module = SplitLightningModule(tiny_network(), 1, optimizer, optimizer, 3)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=rounds,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[passing, watch],
    )
    trainer.fit(module, datamodule=SplitDataModule(RandomImages(), **options))
    return module, watch.turns


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
def test_each_client_goes_on_from_the_last_one(tmp_path, policy):
    passing = RoundRobinWeightPassing(optimizer_state=policy)
    module, turns = run(tmp_path, passing)
    assert [turn["client"] for turn in turns] == [0, 1, 2, 0, 1, 2]
    assert [turn["active"] for turn in turns] == [0, 1, 2, 0, 1, 2]
    for last, turn in pairwise(turns):
        assert same(turn["start"], last["end"])  # over the end of the round too
        assert "1.running_mean" in turn["start"]  # buffers too
    assert module.totals()["handoffs"] == 5


def test_every_turn_changes_all_weights(tmp_path):
    _, turns = run(tmp_path)
    for turn in turns:
        for name, tensor in turn["start"].items():
            assert not torch.equal(tensor, turn["end"][name]), name


def test_waiting_clients_share_no_memory_with_the_live_segment(tmp_path):
    for passing in (True, False):
        module, _ = run(tmp_path, RoundRobinWeightPassing(enabled=passing))
        live = {t.data_ptr() for t in module.client.state_dict().values()}
        optimizer, _ = module.optimizers(use_pl_optimizer=False)
        live |= {s["momentum_buffer"].data_ptr() for s in optimizer.state.values()}
        own = module.engine.stores[0].state_dict()["own"]
        waiting = tensors_in(own)
        assert len(waiting) >= 6
        pointers = [tensor.data_ptr() for tensor in waiting]
        assert not live & set(pointers)
        assert len(set(pointers)) == len(pointers)


def test_disabled_lets_each_client_go_on_from_its_own(tmp_path):
    module, turns = run(tmp_path, RoundRobinWeightPassing(enabled=False))
    first, second = turns[:3], turns[3:]
    for one, other in pairwise(first):
        assert same(one["start"], other["start"])  # the weights of the run's start
    for before, after in zip(first, second, strict=True):
        assert same(after["start"], before["end"])
    assert not same(second[0]["start"], second[1]["start"])
    assert module.totals()["handoffs"] == 0


def test_a_client_that_follows_itself_is_handed_nothing(tmp_path):
    passing = RoundRobinWeightPassing(shuffle=True, clients_per_round=1)
    module, turns = run(tmp_path, passing, rounds=6)
    clients = [turn["client"] for turn in turns]
    changes = sum(a != b for a, b in pairwise(clients))
    assert 0 < changes < 5
    assert module.totals()["handoffs"] == changes


@pytest.mark.parametrize("passing", [True, False])
def test_clients_that_never_share_validate_their_own_weights(tmp_path, passing):
    """Held against a loop over the clients' weights at the ends of their turns."""
    logger = Recorder()
    module, turns = run(
        tmp_path,
        RoundRobinWeightPassing(enabled=passing),
        rounds=1,
        val_share=0.4,
        logger=logger,
    )
    assert same(cloned(module), turns[-1]["end"])  # put back after validation
    data = SplitDataModule(RandomImages(), 3, batch_size=7, val_share=0.4)
    data.setup("fit")
    module.eval()
    for client_id, turn in enumerate(turns):
        module.client.load_state_dict((turn if not passing else turns[-1])["end"])
        with torch.no_grad():
            right = [
                module(inputs).argmax(1) == targets
                for owner, inputs, targets, *_ in data.val_dataloader()
                if owner == client_id
            ]
        expected = torch.cat(right).float().mean().item()
        assert logger.metrics[f"clients/accuracy/{client_id}"] == pytest.approx(
            expected
        )
