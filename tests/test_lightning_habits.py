"""What users of Lightning are used to: loaders, monitors, loading, weight averaging."""

from functools import partial

import pytest
import torch
from conftest import RandomImages, tiny_network
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from test_train import command
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from split_lightning import (
    Centralized,
    FedAvg,
    ParallelSplitLearning,
    RoundRobinWeightPassing,
    SplitDataModule,
    SplitLightningModule,
)
from split_lightning.runs import load_run

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def make_data(num_clients=3, **options):
    options = {"batch_size": 10, "val_share": 0.2} | options
    return SplitDataModule(RandomImages(), num_clients, **options)


def make_split(cut_layer=1, **options):
    torch.manual_seed(5)
    client = SGD if cut_layer is not None else None
    return SplitLightningModule(tiny_network(), cut_layer, client, SGD, 3, **options)


def make_unsplit(**options):
    return make_split(None, **options)


# A module, and a protocol that trains one network.
KINDS = [(make_split, RoundRobinWeightPassing), (make_unsplit, Centralized)]


def trainer_of(folder, *callbacks, rounds=2, **options):
    return Trainer(
        accelerator="cpu",
        max_epochs=rounds,
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **options,
    )


# Loaders


@pytest.mark.parametrize(
    ("make", "protocol"), [*KINDS, (make_split, ParallelSplitLearning)]
)
def test_loaders_instead_of_the_data_are_refused(tmp_path, make, protocol):
    data = make_data()
    data.setup("fit")
    with pytest.raises(MisconfigurationException, match=r"loaders.*datamodule=data"):
        trainer_of(tmp_path, protocol()).fit(
            make(), data.train_dataloader(), data.val_dataloader()
        )


def plain_loader():
    images = TensorDataset(torch.randn(6, 1, 6, 6), torch.zeros(6, dtype=torch.int64))
    return DataLoader(images, batch_size=3)


def test_a_plain_loader_tests_and_is_refused_elsewhere(tmp_path):
    module, trainer = make_split(), trainer_of(tmp_path, RoundRobinWeightPassing())
    with pytest.raises(MisconfigurationException, match="datamodule=data"):
        trainer.fit(module, plain_loader())
    with pytest.raises(ValueError, match=r"SplitDataModule.*but got list"):
        trainer.validate(module, plain_loader(), verbose=False)
    (found,) = trainer.test(module, plain_loader(), verbose=False)
    assert found["test/loss"] > 0


# Monitors


@pytest.mark.parametrize(("make", "protocol"), KINDS)
@pytest.mark.parametrize(
    ("callback", "options", "words"),
    [
        (partial(EarlyStopping, "val_loss"), {}, "EarlyStopping.*Did you mean 'val/lo"),
        (partial(ModelCheckpoint, monitor="acc"), {}, "ModelCheckpoint.*val/accuracy"),
        (partial(EarlyStopping, "val/loss"), {"val_share": 0.0}, "There are: train/lo"),
        (partial(EarlyStopping, "memory/peak_mib"), {}, "'memory/peak_mib'"),
    ],
)
def test_a_wrong_monitor_is_refused_before_the_first_round(
    tmp_path, make, protocol, callback, options, words
):
    trainer = trainer_of(tmp_path, protocol(), callback())
    with pytest.raises(MisconfigurationException, match=words):
        trainer.fit(make(), datamodule=make_data(**options))
    assert trainer.global_step == 0


class Own(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("own/metric", 1.0)


def test_metrics_that_a_users_callback_logs_can_be_monitored(tmp_path):
    passing = RoundRobinWeightPassing()
    trainer = trainer_of(tmp_path, passing, Own(), EarlyStopping("own/metric"))
    trainer.fit(make_split(), datamodule=make_data())
    assert trainer.current_epoch == 2
    trainer = trainer_of(tmp_path, passing, Own(), EarlyStopping("val_loss"))
    with pytest.raises(MisconfigurationException, match="Did you mean 'val/loss'"):
        trainer.fit(make_split(), datamodule=make_data())


@pytest.mark.parametrize(
    ("make", "protocol"), [KINDS[0], (make_unsplit, FedAvg)], ids=["split", "unsplit"]
)
def test_every_metric_of_a_round_can_be_monitored(tmp_path, make, protocol):
    """Those of single clients too, under the names that the Trainer has."""
    trainer = trainer_of(tmp_path, protocol(), rounds=1)
    trainer.fit(make(), datamodule=make_data())
    names = list(trainer.callback_metrics)
    of_last = [n for n in names if "2" in n]
    assert len(of_last) == 2  # its loss and its accuracy
    for name in ["train/loss", "val/loss", "lr/server", *of_last]:
        stop = EarlyStopping(name, patience=0, mode="max", min_delta=1e9)
        keep = ModelCheckpoint(
            tmp_path / name, monitor=name, filename="kept", save_top_k=-1
        )
        trainer = trainer_of(tmp_path, protocol(), stop, keep, rounds=5)
        trainer.fit(make(), datamodule=make_data())
        assert trainer.current_epoch == 2
        assert (tmp_path / name / "kept.ckpt").is_file()
        assert keep.current_score == trainer.callback_metrics[name]


def test_the_loss_of_a_client_that_may_take_no_part(tmp_path):
    trainer = trainer_of(tmp_path, RoundRobinWeightPassing(), rounds=1)
    trainer.fit(make_split(), datamodule=make_data())
    name = next(n for n in trainer.callback_metrics if "2" in n and "loss" in n)
    some = RoundRobinWeightPassing(clients_per_round=1)
    trainer = trainer_of(tmp_path, some, EarlyStopping(name))
    with pytest.raises(MisconfigurationException, match="a metric of each round"):
        trainer.fit(make_split(), datamodule=make_data())


# Weight averaging


@pytest.mark.parametrize(
    ("make", "protocol"),
    [
        (make_split, partial(RoundRobinWeightPassing, False)),
        (make_split, partial(ParallelSplitLearning, 1)),
        (make_unsplit, FedAvg),
    ],
)
@pytest.mark.parametrize("ema", [EMAWeightAveraging, StochasticWeightAveraging])
def test_averaging_over_time_would_mix_clients(tmp_path, make, protocol, ema):
    average = ema() if ema is EMAWeightAveraging else ema(0.1)
    trainer = trainer_of(tmp_path, protocol(), average)
    with pytest.raises(MisconfigurationException, match=ema.__name__):
        trainer.fit(make(), datamodule=make_data())


class Average(Callback):
    """The moving average, written out."""

    def __init__(self, decay):
        self.decay, self.mean = decay, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = {k: v.detach().clone() for k, v in pl_module.named_parameters()}
        mean = self.mean
        self.mean = now if mean is None else {
            k: self.decay * mean[k] + (1 - self.decay) * now[k] for k in now
        }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "protocol"),
    [*KINDS, (make_split, partial(ParallelSplitLearning, "step"))],
)
def test_averaging_of_one_network_over_time(tmp_path, make, protocol):
    by_hand, ema, module = Average(0.5), EMAWeightAveraging(decay=0.5), make()
    trainer = trainer_of(tmp_path, protocol(), by_hand, ema)
    trainer.fit(module, datamodule=make_data())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), by_hand.mean[name])


# Loading


ONE_NETWORK = {
    "round_robin", "splitfed_v1", "async_round_robin", "gpsl", "fedavg", "centralized",
}  # fmt: skip
APART = {
    "parallel protocol.every=null", "splitfed_v3", "local", "cyclesl protocol.every=2",
    "multi_server protocol.every=2 protocol.servers_every=2",
}  # fmt: skip


@pytest.mark.parametrize("protocol", sorted(ONE_NETWORK | APART))
def test_a_checkpoint_of_the_command_line_needs_no_arguments(
    monkeypatch, tmp_path, protocol
):
    (run,) = command(
        monkeypatch, tmp_path, "num_clients=2", "rounds=1", "batch_size=256",
        *f"protocol={protocol}".split(), "model=mlp", "model.network.hidden=[8]",
    )  # fmt: skip
    file = run / "checkpoints" / "last.ckpt"
    module = SplitLightningModule.load_from_checkpoint(file).eval()
    apart = module.networks.representatives()
    assert len(apart) == (0 if protocol in ONE_NETWORK else 2)
    images = torch.randn(4, 1, 8, 8)
    for client in apart or [module.engine.last_client]:
        expected = load_run(run, "last", client if apart else None)
        assert torch.equal(module.networks.predict(client, images), expected(images))
    assert module.configuration == expected.configuration


class Doubled(nn.CrossEntropyLoss):
    def forward(self, logits, targets):
        return 2 * super().forward(logits, targets)


@pytest.mark.parametrize(("make", "protocol"), KINDS)
def test_other_checkpoints_need_the_network(tmp_path, make, protocol):
    trained = make(criterion=Doubled())
    trainer = trainer_of(tmp_path, protocol(), rounds=1)
    trainer.fit(trained, datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    load = partial(type(trained).load_from_checkpoint, tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match=r"argument `network`.*network=\.\.\."):
        load()
    with pytest.raises(ValueError, match=r"argument `criterion`"):
        load(network=tiny_network())
    loaded = load(network=tiny_network(), criterion=Doubled())
    images = torch.randn(4, 1, 6, 6)
    assert torch.equal(loaded.eval()(images), trained.eval()(images))
    (found,) = trainer_of(tmp_path).test(loaded, datamodule=make_data(), verbose=False)
    (again,) = trainer.test(trained, datamodule=make_data(), verbose=False)
    assert found == again
    with pytest.raises(ValueError, match=r"argument `\w*optimizer` to train"):
        trainer_of(tmp_path, protocol()).fit(loaded, datamodule=make_data())
