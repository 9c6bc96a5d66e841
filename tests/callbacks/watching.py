"""Small fits, and what they wrote, for the tests of the monitors."""

from functools import partial

import torch
from conftest import RandomImages
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from split_lightning import (
    Centralized,
    RoundRobinWeightPassing,
    SplitDataModule,
    SplitLightningModule,
)

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class ListLogger(Logger):
    """Keeps all that is logged, as (step, value) by name."""

    name, version = "list", 0

    def __init__(self):
        super().__init__()
        self.logged = {}

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            self.logged.setdefault(name, []).append((step, value))

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def steps(self, name):
        return [step for step, _ in self.logged.get(name, [])]

    def values(self, name):
        return [value for _, value in self.logged.get(name, [])]


class SaveAt(Callback):
    """Saves a checkpoint after a batch; to be the last of the callbacks."""

    def __init__(self, path, epoch, batch_idx):
        self.path, self.epoch, self.batch_idx = path, epoch, batch_idx

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch_idx):
            trainer.save_checkpoint(self.path)


def network():
    """A network without dropout: what it computes is a function of its inputs."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def make_data(num_clients=3, **options):
    options = {"batch_size": 7, "val_share": 0.2, "seed": 3, **options}
    return SplitDataModule(RandomImages(), num_clients, **options)


def make_module(cut_layer=1, net=None, optimizer=SGD, **options):
    return SplitLightningModule(
        net or network(), cut_layer, optimizer, optimizer, 3, **options
    )


def make_centralized():
    return SplitLightningModule(network(), None, None, SGD, num_classes=3)


def make_trainer(tmp_path, callbacks, passing=True, **options):
    """Returns a Trainer.

    Args:
        tmp_path: Where to write.
        callbacks: The callbacks but for the protocol.
        passing: The protocol, or whether a round robin passes weights; `None` is for
            the unsplit network.
        options: Those of the Trainer.
    """
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False} | (
        options
    )
    if passing is None:
        passing = Centralized()
    elif isinstance(passing, bool):
        passing = RoundRobinWeightPassing(enabled=passing)
    return Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_progress_bar=options.pop("enable_progress_bar", False),
        enable_model_summary=False,
        callbacks=[passing, *callbacks],
        **options,
    )


def fit(tmp_path, callbacks, module=None, data=None, ckpt_path=None, **options):
    """Fits, and returns the trainer and the module."""
    trainer = make_trainer(tmp_path, callbacks, **options)
    module = module or make_module()
    trainer.fit(module, datamodule=data or make_data(), ckpt_path=ckpt_path)
    return trainer, module


def batches_of(data, rounds):
    """Yields (round, batch of a client) as a plain loop reads them."""
    data.setup("fit")
    loader = data.train_dataloader()
    for round_index in range(rounds):
        loader.set_epoch(round_index)
        for step in loader:
            for batch in step.parts:
                yield round_index, batch


def events(folder):
    """Returns all that TensorBoard's files in a folder hold."""
    accumulator = EventAccumulator(
        str(folder), {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    )
    accumulator.Reload()
    return accumulator
