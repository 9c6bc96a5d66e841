"""A round of the command line in which few of many clients take part.

    python benchmarks/clients.py --sampled 100 --clients 100 1000 10000 --samples 50000
    python benchmarks/clients.py --plan --clients 100000 --samples 200000

- `--sampled`: a round of so many clients, of one batch each, by the command line's own
  configuration (`--set` adds to it). The data set has the same `--samples` whatever the
  number of clients. `before`: from the start of the command in a process that has
  imported torch to the end of the first step; `ratio`: of the peak to that of the
  fewest clients.
- `--plan`: what `python -m split_lightning.plan` takes for the same round.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from command_line import train
from processes import MIB, peak_rss, run_alone
from stopwatch import Probe

CLIENTS = str(Path(__file__).parent / "clients.py")
BATCH_SIZE = 2


class Round(NamedTuple):
    """What a round of the command line took (bytes, seconds)."""

    before: float
    peak_before: float
    seconds: float
    peak: float


class FirstBatch(Probe):
    """Notes what training took until the end of the first step."""

    seconds = peak = 0.0

    def tick(self, batch: Any) -> None:
        """Notes the time and the memory of the first step."""
        if not self.seconds:
            self.seconds, self.peak = time.perf_counter(), peak_rss()


def keys(num_clients: int, options: argparse.Namespace) -> list[str]:
    """Returns the command line of a round in which few of many clients take part."""
    return [
        f"num_clients={num_clients}",
        f"clients_per_round={options.sampled}",
        "rounds=1",
        "local_steps=1",
        f"batch_size={BATCH_SIZE}",
        "data=cifar10",
        "data.val_share=0",
        f"datamodule.source={{_target_:noise.NoiseImages,num_samples:{options.samples}}}",
        "model=resnet18",
        f"model.cut_layer={options.cut_layer}",
        *options.set,
    ]


def train_round(num_clients: int, options: argparse.Namespace) -> Round:
    """Trains a round by the command line, in this process."""
    start, first = time.perf_counter(), FirstBatch()
    words = [
        *keys(num_clients, options),
        f"threads={options.threads}",
        "trainer.accelerator=cpu",
        f"trainer.limit_train_batches={options.sampled}",
        "trainer.limit_test_batches=1",
    ]
    train(words, first)
    before, end = first.seconds - start, time.perf_counter()
    return Round(before, first.peak, end - first.seconds, peak_rss())


def plan_round(num_clients: int, options: argparse.Namespace) -> None:
    """Prints what the plan of a round takes, and what it says."""
    words = keys(num_clients, options)
    command = [sys.executable, "-m", "split_lightning.plan", *words]
    here = str(Path(__file__).parent)  # of `noise`
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    seconds = time.perf_counter() - start
    peak = peak_rss(resource.RUSAGE_CHILDREN)
    print(f"{num_clients:,} clients: {seconds:.1f} s, peak {peak / MIB:,.0f} MiB")


def report_rounds(options: argparse.Namespace) -> None:
    """Prints what a round of the command line takes, by number of clients."""
    print(f"{options.sampled} clients a round, {options.samples:,} samples", end="; ")
    print("times in s, sizes in MiB")
    print(" clients    before  peak before  the rest      peak   ratio", flush=True)
    least = 0.0
    for num_clients in sorted(options.clients):
        case = ["--case", "round", "--clients", str(num_clients)]
        for name in ("sampled", "samples", "cut_layer", "threads"):
            case += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        case += [word for key in options.set for word in ("--set", key)]
        figures = Round(*run_alone(CLIENTS, case))
        least = least or figures.peak
        print(
            f"{num_clients:8,}{figures.before:10.1f}{figures.peak_before / MIB:13,.0f}"
            f"{figures.seconds:10.1f}{figures.peak / MIB:10,.0f}"
            f"{figures.peak / least:8.2f}",
            flush=True,
        )
