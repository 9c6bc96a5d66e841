"""Each protocol's speed as a ratio to `centralized`, and the memory that it takes.

    python benchmarks/protocols.py --clients 10 100
    python benchmarks/protocols.py --memory --clients 10 1000

All train torchvision's ResNet-18 (`--model` names another), as `conf` composes it, on
noise of CIFAR-10's shape, with SGD(lr 0.01, momentum 0.9) and the monitors of bytes
and norms; no validation, checkpoints or progress bar. A step has `--batch-size` images
in all protocols: of one client, or dealt out to those that train together. A turn is
`--turn` batches. (Of CIFAR-10, in batches of 128, ten clients have 39 and 100 have 4.)

Speed: protocols are interleaved in one process, each right beside a run of
`centralized`, before it and after it in turn, so that what else the machine does slows
both alike. Timed is the steady state, from the end of one step to that of another: the
averaging at a round's end is in it only where a round has ended by then. There are two
ratios: by the clock, and by the processor time of this process, which others' work
disturbs less. On an idle machine with one thread they are the same.

Memory: each case is a process of its own; `--rounds` rounds, each client with one
batch in a round: of two images where clients take turns, `--batch-size` in all where
they act together. `peak` is the largest resident set, `live` the weights, buffers and
optimizer states in place at the end, `waiting` what is remembered beside them: of those
who do not act (with `--set 'spill_to=${output_dir}/waiting'` in files), and the last
mean. Sizes are in MiB.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import environment
import pytorch_lightning as pl
import torch
from clients import MIB, peak_rss, tensor_bytes
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from noise import NoiseImages
from omegaconf import DictConfig
from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.loggers import TensorBoardLogger

from split_lightning.callbacks import CommunicationMonitor, CutMonitor
from split_lightning.cli.building import build_module
from split_lightning.cli.config import conf_folder

EVERY = "protocol.every"
BASELINE = "centralized"
# What is typed for each.
PROTOCOLS = {
    "round_robin": ["protocol=round_robin"],
    "async_round_robin": ["protocol=async_round_robin"],
    "splitfed_v1": ["protocol=splitfed_v1"],
    "splitfed_v2": ["protocol=splitfed_v2"],
    "splitfed_v3": ["protocol=splitfed_v3"],
    "multi_server": ["protocol=multi_server"],
    "fedavg": ["protocol=fedavg"],
    "local": ["protocol=local"],
    "parallel": ["protocol=parallel"],
    "parallel, every=1": ["protocol=parallel", f"{EVERY}=1"],
    "parallel, every=step": ["protocol=parallel", f"{EVERY}=step"],
    "gpsl": ["protocol=gpsl"],
    "cyclesl": ["protocol=cyclesl"],
    BASELINE: ["protocol=centralized"],
}


class Speed(NamedTuple):
    """Images per second, of the clock and of the processor's time."""

    clock: float
    cpu: float


class Case:
    """A protocol with a number of clients, composed and built.

    Args:
        name: The protocol.
        num_clients: Number of clients.
        options: The command line's.
        folder: Where to log, and where what waits is spilled to.
    """

    def __init__(
        self, name: str, num_clients: int, options: argparse.Namespace, folder: str
    ) -> None:
        cfg = composed(name, num_clients, options, folder)
        self.protocol = instantiate(cfg.protocol, _convert_="all")
        together = self.protocol.together
        own = options.batch_size if together or not options.memory else 2
        part = max(own // num_clients, 1) if together else own  # of a client in a step
        cfg.batch_size = own if name == "gpsl" else part
        num_samples = num_clients * (part if options.memory else own * options.turn)
        self.cfg, self.folder = cfg, folder
        self.data = instantiate(
            cfg.datamodule, source=NoiseImages(num_samples), _convert_="all"
        )
        self.module = build_module(cfg)

    def fit(self, *callbacks: pl.Callback, **limits: int) -> pl.Trainer:
        """Trains the case."""
        own = [self.protocol, CommunicationMonitor(), CutMonitor()]
        trainer = pl.Trainer(
            accelerator="cpu",
            log_every_n_steps=10,
            callbacks=[*own, *callbacks],
            logger=TensorBoardLogger(self.folder, name="", default_hp_metric=False),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **limits,
        )
        trainer.fit(self.module, datamodule=self.data)
        return trainer


def composed(
    name: str, num_clients: int, options: argparse.Namespace, folder: str
) -> DictConfig:
    """Returns the configuration of a case."""
    typed = [
        *PROTOCOLS[name],
        *("data=cifar10", "data.val_share=0", f"model={options.model}"),
        *(f"num_clients={num_clients}", f"output_dir={folder}"),
        *options.set,
    ]
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        return compose("train", typed)


def speed_of(name: str, num_clients: int, options: argparse.Namespace) -> Speed:
    """Returns a protocol's speed after the warm-up."""
    notes: list[tuple[int, float, float]] = []  # images, and both clocks, step by step
    watch = LambdaCallback(
        on_train_batch_end=lambda trainer, module, outputs, batch, _: notes.append(
            (batch.num_samples, time.perf_counter(), time.process_time())
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        steps = options.warmup + options.batches
        case = Case(name, num_clients, options, folder)
        case.fit(watch, max_steps=steps, max_epochs=-1)
    timed = notes[options.warmup :]
    images = sum(count for count, *_ in timed)
    _, *starts = notes[options.warmup - 1]
    _, *ends = timed[-1]
    return Speed(*(images / (b - a) for a, b in zip(starts, ends, strict=True)))


def measure_speed(options: argparse.Namespace) -> None:
    """Prints each protocol's speed, and its ratio to the run of `centralized` by it."""
    rows: dict[tuple[str, int], list[tuple[Speed, Speed]]] = {}
    for repeat in range(options.repeats):
        for num_clients in options.clients:
            for name in options.protocols:
                order = (name, BASELINE) if repeat % 2 else (BASELINE, name)
                found = {
                    which: speed_of(which, num_clients, options) for which in order
                }
                pair = (found[name], found[BASELINE])
                rows.setdefault((name, num_clients), []).append(pair)
                print(
                    f"repeat {repeat + 1}", row(name, num_clients, [pair]), flush=True
                )
    print(f"\nratio to {BASELINE}, median (min..max)")
    print(f"{'':22} clients  images/s  {'by the clock':22}by processor time")
    for key, pairs in rows.items():
        print(row(*key, pairs))


def row(name: str, num_clients: int, pairs: list[tuple[Speed, Speed]]) -> str:
    """Returns a line: the speed, and both ratios with their spread."""
    speed = statistics.median(own.clock for own, _ in pairs)
    line = f"{name:22}{num_clients:8}{speed:10.1f}  "
    for i in range(2):
        ratios = [own[i] / baseline[i] for own, baseline in pairs]
        middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
        line += f"{middle:.3f} ({least:.3f}..{most:.3f})  "
    return line


def memory_of(name: str, num_clients: int, options: argparse.Namespace) -> list[float]:
    """Returns peak, live and waiting bytes of a case, and seconds of a round."""
    starts: list[float] = []
    clock = LambdaCallback(
        on_train_epoch_start=lambda *_: starts.append(time.perf_counter())
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        case = Case(name, num_clients, options, folder)
        trainer = case.fit(clock, max_epochs=options.rounds)
        starts.append(time.perf_counter())
        peak = peak_rss()  # before what is in files is read
        waiting = tensor_bytes(case.module.engine.state_dict())
    states = [optimizer.state for optimizer in trainer.optimizers]
    live = tensor_bytes([case.module.state_dict(), states])
    return [peak, live, waiting, starts[-1] - starts[-2]]


def measure_memory(options: argparse.Namespace) -> None:
    """Prints what each case takes, in a process of its own."""
    print(f"{'':22} clients      peak      live   waiting   s/round  peak ratio")
    given = ["--case", "--memory", "--model", options.model, "--set", *options.set]
    if options.folder:
        given += ["--folder", str(options.folder)]
    for name in ("batch_size", "rounds", "threads"):
        given += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for name in options.protocols:
        first = 0.0
        for num_clients in options.clients:
            # NOTE Linux hands the parent's peak down: this process only imports.
            case = ["--protocols", name, "--clients", str(num_clients)]
            command = [sys.executable, __file__, *given, *case]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            *sizes, seconds = json.loads(done.stdout.splitlines()[-1])
            first = first or sizes[0]
            columns = "".join(f"{size / MIB:10,.1f}" for size in sizes)
            line = f"{name:22}{num_clients:8}{columns}{seconds:10.1f}"
            print(f"{line}{sizes[0] / first:12.2f}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS)[:-1])
    add("--clients", type=int, nargs="+", default=[10, 100])
    add("--model", default="resnet18", help="of conf/model")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more keys of conf")
    add("--batch-size", type=int, default=100, help="images in a step")
    add("--turn", type=int, default=2, help="batches in a turn")
    add("--batches", type=int, default=20, help="timed steps in a repeat")
    add("--warmup", type=int, default=3, help="steps before them")
    add("--repeats", type=int, default=5)
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=2, help="with --memory")
    add("--memory", action="store_true", help="memory in the place of speed")
    add("--folder", type=Path, help="where runs are logged, and spill to")
    add("--case", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.batches, options.warmup, options.turn, *options.clients) < 1:
        parser.error("--batches, --warmup, --turn and --clients: at least 1 each")
    if any(options.batch_size % count for count in options.clients):
        parser.error("--batch-size: divisible by each of --clients")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    if options.case:
        print(json.dumps(memory_of(options.protocols[0], options.clients[0], options)))
        return
    print(environment.describe(), f"model={options.model}", *options.set, flush=True)
    (measure_memory if options.memory else measure_speed)(options)


if __name__ == "__main__":
    main()
