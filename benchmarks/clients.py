"""Memory and time by number of clients: ours beside the source notebook's way.

    python benchmarks/clients.py --clients 10 100 1000 --cut-layer maxpool

Each case trains `--rounds` rounds of torchvision's ResNet-18 in a process of its own,
on noise of CIFAR-10's shape: a turn is one batch of two images, to keep rounds short.

- `ours reset`, `ours travel`, `ours keep`: `SplitLightningModule` with that
  `optimizer_state`. One client segment is live; the other clients wait. With `reset`
  and `travel` nothing is remembered of them, with `keep` one momentum buffer of the
  client segment each.
- `notebook`: a list of whole ResNet-18s, 45 MiB each, and of as many SGDs; the next
  client loads the last one's weights. (As printed, its loop steps another optimizer by
  a typo; here it steps the client's own.) Past `--notebook-max` clients its figures
  are not measured but extrapolated, and marked so.

With `--sampled` or `--plan`: see benchmarks/rounds.py.

Columns: `peak`: the process's largest resident set; `live`: weights, buffers and
optimizer states at the end; `waiting`: as much of that as is held for clients whose
turn it is not; `s/round`: seconds of the last round. Sizes are in MiB.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import environment
import notebook
import pytorch_lightning as pl
import torch
from noise import NoiseImages
from processes import MIB, peak_rss, run_alone
from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.loggers import TensorBoardLogger
from rounds import Round, plan_round, report_rounds, train_round
from torch import Tensor
from torchvision.models import resnet18

import split_lightning as sl

SAMPLES_PER_CLIENT = 2
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
WAYS = ("ours reset", "ours travel", "ours keep", "notebook")
CUT_LAYERS = [name for name, _ in resnet18().named_children()][:-1]


class Figures(NamedTuple):
    """What a case took (bytes, seconds)."""

    peak: float
    live: float
    waiting: float
    seconds: float


def train_ours(policy: str, num_clients: int, cut_layer: str, rounds: int) -> Figures:
    source = NoiseImages(num_clients * SAMPLES_PER_CLIENT)
    data = sl.SplitDataModule(
        source, num_clients, batch_size=SAMPLES_PER_CLIENT, val_share=0.0
    )
    module = sl.SplitLightningModule(
        resnet18(num_classes=10), cut_layer, SGD, SGD, 10, optimizer_state=policy
    )
    starts: list[float] = []
    clock = LambdaCallback(
        on_train_epoch_start=lambda *_: starts.append(time.perf_counter()),
        on_train_end=lambda *_: starts.append(time.perf_counter()),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=rounds,
            callbacks=[sl.RoundRobinWeightPassing(), clock],
            logger=TensorBoardLogger(folder, name="", default_hp_metric=False),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
    waiting = tensor_bytes(module.engine.state_dict())
    states = [optimizer.state for optimizer in trainer.optimizers]
    live = tensor_bytes([module.state_dict(), states]) + waiting
    return Figures(peak_rss(), live, waiting, starts[-1] - starts[-2])


def train_notebook(num_clients: int, cut_layer: str, rounds: int) -> Figures:
    config = {"cut_layer": CUT_LAYERS.index(cut_layer), "logits": 10}
    clients = [notebook.ResNet18Client(config) for _ in range(num_clients)]
    client_optimizers = [notebook.sgd(client) for client in clients]
    server = notebook.ResNet18Server(config)
    server_optimizer = notebook.sgd(server)
    images = NoiseImages(num_clients * SAMPLES_PER_CLIENT).load(train=True)
    inputs = images.inputs.float().div(127.5).sub(1).split(SAMPLES_PER_CLIENT)
    labels = images.targets.split(SAMPLES_PER_CLIENT)
    for round_index in range(rounds):
        start = time.perf_counter()
        for k, client in enumerate(clients):
            if round_index or k:
                client.load_state_dict(clients[k - 1].state_dict())
            optimizers = (client_optimizers[k], server_optimizer)
            notebook.train_step(client, server, *optimizers, inputs[k], labels[k])
        seconds = time.perf_counter() - start
    optimizers = [*client_optimizers, server_optimizer]
    held = [
        tensor_bytes([model.state_dict(), optimizer.state])
        for model, optimizer in zip([*clients, server], optimizers, strict=True)
    ]
    return Figures(peak_rss(), sum(held), sum(held[: num_clients - 1]), seconds)


def tensor_bytes(held: Any) -> int:
    """Returns the bytes of all tensors in nested containers."""
    if isinstance(held, Tensor):
        return held.nbytes
    values = list(held.values()) if isinstance(held, Mapping) else held
    return sum(map(tensor_bytes, values)) if isinstance(values, list) else 0


def run_case(way: str, options: argparse.Namespace) -> Figures | Round:
    """Runs a case in this process."""
    if way == "round":
        return train_round(options.clients[0], options)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    train = train_notebook if way == "notebook" else partial(train_ours, way.split()[1])
    return train(options.clients[0], options.cut_layer, options.rounds)


def measure(way: str, num_clients: int, options: argparse.Namespace) -> Figures:
    """Runs a case in a process of its own; extrapolates it where it is too large."""
    run = min(num_clients, options.notebook_max) if way == "notebook" else num_clients
    case = ["--case", way, "--clients", str(run)]
    for name in ("cut_layer", "rounds", "threads"):
        case += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    peak, live, waiting, seconds = run_alone(__file__, case)
    more = (num_clients - run) * waiting / (run - 1)
    seconds *= num_clients / run
    return Figures(peak + more, live + more, waiting + more, seconds)


def report(way: str, options: argparse.Namespace) -> None:
    """Prints a way's figures, by number of clients."""
    rows = {}
    for num_clients in options.clients:
        rows[num_clients] = figures = measure(way, num_clients, options)
        sizes = "".join(f"{size / MIB:11,.1f}" for size in figures[:3])
        row = f"{way:12}{num_clients:8,}{sizes}{figures.seconds:10.2f}"
        guessed = way == "notebook" and num_clients > options.notebook_max
        note = f"  EXTRAPOLATED from {options.notebook_max}" if guessed else ""
        print(row + note, flush=True)
    first, last = min(rows), max(rows)
    if first < last:
        slopes = [
            (b - a) / (last - first) / 1024
            for a, b in zip(rows[first][:3], rows[last][:3], strict=True)
        ]
        print("  KiB a client      " + "".join(f"{slope:11,.1f}" for slope in slopes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--clients", type=int, nargs="+", default=[10, 100, 1000])
    add("--cut-layer", choices=CUT_LAYERS, default="maxpool")
    add("--rounds", type=int, default=2)
    add("--notebook-max", type=int, default=100, help="extrapolate from there on")
    add("--threads", type=int, default=1, help="a batch of two needs no more")
    add("--sampled", type=int, help="clients in a round of the command line")
    add("--samples", type=int, default=50_000, help="of the data set, then")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="then, too")
    add("--plan", action="store_true", help="the plan of such a round (100 clients)")
    add("--case", choices=(*WAYS, "round"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(*options.clients, options.notebook_max) < 2:
        parser.error("--clients and --notebook-max must be 2 or more")
    torch.set_num_threads(options.threads)
    if options.plan:
        options.sampled = options.sampled or 100
        for num_clients in options.clients:
            plan_round(num_clients, options)
        return
    if options.case:
        print(json.dumps(run_case(options.case, options)))
        return
    print(environment.describe(), f"cut after {options.cut_layer}", sep="\n")
    if options.sampled:
        report_rounds(options)
        return
    print(f"{'':12} clients       peak       live    waiting   s/round", flush=True)
    for way in WAYS:
        report(way, options)


if __name__ == "__main__":
    main()
