"""What the package adds to a training step: processor time, own calls, own files.

    PYTHONHASHSEED=0 python benchmarks/overhead.py [--list] [--profile]

The digits network is cut after `relu1`; a batch has 32 images; torch has one thread.
The variants are interleaved in one process, in alternating order, and each difference
is taken within a repeat. Times are processor milliseconds of a batch in the middle of
a turn.

- `bare loop`: the two segments, two SGDs, two backward passes, on batches in memory.
- `Lightning`: the same in a minimal LightningModule with manual optimization.
- `package`: `SplitLightningModule`, `SplitDataModule` and `RoundRobinWeightPassing` in
  a Trainer without other callbacks and without a logger.
- `command line`: what `python -m split_lightning.train` builds by default: its
  callbacks and TensorBoard too. It runs in this process.
- `loader`: the data module's batches alone, without training.

Own calls are counted in separate runs: see `stopwatch.Calls`. A step that logs is one
of `trainer.log_every_n_steps`. Python's hash seed may change the number of calls, where
a loop over a set ends early: `PYTHONHASHSEED` makes it the same in each run.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import pstats
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import environment
import pytorch_lightning as pl
import torch
from command_line import train
from stopwatch import Calls, Probe, Profile, Times, measured_by
from torch import Tensor, nn
from torch.utils.data import DataLoader

import split_lightning as sl
from split_lightning.models import DigitsCNN, split

CUT, BATCH_SIZE, WARMUP = "relu1", 32, 20
BATCHES_OF_A_PASS = 20  # of one of two clients, or a few more
NUM_CLIENTS = 2
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
Variant = Callable[[Probe, int], None]


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields so many batches of digits' shape that are in memory."""
    drawn = torch.Generator().manual_seed(0)
    inputs = torch.rand(BATCH_SIZE, 1, 8, 8, generator=drawn)
    targets = torch.randint(10, (BATCH_SIZE,), generator=drawn)
    return itertools.repeat((inputs, targets), count)


def segments() -> tuple[nn.Module, nn.Module]:
    """Returns the client's and the server's segment."""
    client, server = split(DigitsCNN(), CUT)
    return client, server


def bare_loop(probe: Probe, count: int) -> None:
    client, server = segments()
    client_optimizer, server_optimizer = (
        SGD(client.parameters()),
        SGD(server.parameters()),
    )
    for inputs, targets in batches(count):
        client_optimizer.zero_grad()
        server_optimizer.zero_grad()
        smashed = client(inputs)
        received = smashed.detach().requires_grad_()
        nn.functional.cross_entropy(server(received), targets).backward()
        smashed.backward(received.grad)
        client_optimizer.step()
        server_optimizer.step()
        probe.tick(None)


class MinimalModule(pl.LightningModule):
    """The bare loop's step in Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.client, self.server = segments()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Trains both segments on a batch."""
        inputs, targets = batch
        client_optimizer, server_optimizer = self.optimizers()
        client_optimizer.zero_grad()
        server_optimizer.zero_grad()
        smashed = self.client(inputs)
        received = smashed.detach().requires_grad_()
        loss = nn.functional.cross_entropy(self.server(received), targets)
        self.manual_backward(loss)
        self.manual_backward(smashed, received.grad)
        client_optimizer.step()
        server_optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns the client's and the server's optimizer."""
        return [SGD(self.client.parameters()), SGD(self.server.parameters())]


def new_trainer(count: int, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Returns a Trainer of one round that does nothing but train."""
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=count,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def lightning(probe: Probe, count: int) -> None:
    with measured_by(probe) as stopwatch:
        in_memory = DataLoader(list(batches(count)), batch_size=None)
        new_trainer(count, [stopwatch]).fit(MinimalModule(), in_memory)


def parts_of_the_package(
    count: int,
) -> tuple[pl.LightningModule, sl.SplitDataModule, list[pl.Callback]]:
    """Returns the module, the data and the callbacks: all that uses the package's API.

    Args:
        count: Number of batches that a client's turn has at least.
    """
    data = sl.SplitDataModule(
        sl.DigitsImages(),
        NUM_CLIENTS,
        batch_size=BATCH_SIZE,
        local_epochs=passes(count),
        val_share=0.0,
    )
    module = sl.SplitLightningModule(DigitsCNN(), CUT, SGD, SGD, 10)
    return module, data, [sl.RoundRobinWeightPassing()]


def passes(count: int) -> int:
    """Returns the passes after which a client has trained on so many batches."""
    return -(-count // BATCHES_OF_A_PASS)


def package(probe: Probe, count: int, turn: int | None = None) -> None:
    module, data, callbacks = parts_of_the_package(turn or count)
    with measured_by(probe) as stopwatch:
        trainer = new_trainer(count, [*callbacks, stopwatch])
        trainer.fit(module, datamodule=data)


def loader(probe: Probe, count: int) -> None:
    _, data, _ = parts_of_the_package(count)
    data.setup("fit")
    for batch in itertools.islice(data.train_dataloader(), count):
        probe.tick(batch)


def command_line(probe: Probe, count: int, turn: int | None = None) -> None:
    """Runs `python -m split_lightning.train` in this process."""
    words = [
        f"num_clients={NUM_CLIENTS}",
        "rounds=1",
        f"local_epochs={passes(turn or count)}",
        f"model.cut_layer={CUT}",
        f"trainer.limit_train_batches={count}",
        "trainer.accelerator=cpu",
        "threads=1",
    ]
    train(words, probe)


TIMED: dict[str, Variant] = {
    "bare loop": bare_loop,
    "Lightning": lightning,
    "package": package,
    "command line": command_line,
    "loader": loader,
}
# What a difference between two variants is the cost of.
PARTS = {
    "Lightning's loop": ("Lightning", "bare loop"),
    "the package's module, data and protocol": ("package", "Lightning"),
    "default callbacks and logger": ("command line", "package"),
    "all": ("command line", "bare loop"),
}


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Returns the milliseconds of a batch of each variant, one figure a repeat."""
    found: dict[str, list[float]] = {name: [] for name in TIMED}
    for repeat in range(-1, options.repeats):  # the first one warms up
        order = list(TIMED) if repeat % 2 == 0 else list(reversed(TIMED))
        for name in order:
            times = Times()
            TIMED[name](times, WARMUP + options.batches)
            if repeat >= 0:
                found[name].append(times.milliseconds(WARMUP, options.batches))
    return found


def summary(figures: list[float]) -> str:
    """Returns the median and the range of a figure over the repeats."""
    spread = f"({min(figures):.2f} to {max(figures):.2f})"
    return f"{statistics.median(figures):8.2f}  {spread:18}"


def report_times(found: dict[str, list[float]]) -> None:
    """Prints each variant beside the bare loop, and the parts."""
    bare = found["bare loop"]
    print("\nprocessor ms of a batch: median (min to max)       over the bare loop")
    for name, figures in found.items():
        over = [a - b for a, b in zip(figures, bare, strict=True)]
        beside = "" if name in ("bare loop", "loader") else summary(over)
        print(f"  {name:16}{summary(figures)}  {beside}".rstrip())
    print("parts, differences within a repeat: median (min to max)")
    for name, (more, less) in PARTS.items():
        over = [a - b for a, b in zip(found[more], found[less], strict=True)]
        print(f"  {name:42}{summary(over)}".rstrip())


def report_calls(name: str, run: Callable[..., None], list_files: bool) -> None:
    """Prints the own calls of a steady step, of one that logs, and of a hand-off."""
    calls = Calls()
    run(calls, 2 * BATCHES_OF_A_PASS, turn=BATCHES_OF_A_PASS)
    hand_off = calls.begins_turn.index(True)
    # Without a turn's first two and last two steps.
    ends = [place for place, begins in enumerate(calls.begins_turn) if begins]
    steady = calls.steps[2 : ends[0] - 2]
    totals = [step.total() for step in steady]
    usual = statistics.median_low(totals)
    typical = steady[totals.index(usual)]
    # A protocol may act at the end of the last step, or before the first one.
    around = calls.steps[hand_off - 1 : hand_off + 1]
    extra = sum(step.total() - usual for step in around)
    print(
        f"  {name:16}{usual:6} calls in {len(typical):3} files; at most {max(totals)} "
        f"in a step that logs; a hand-off adds {extra}"
    )
    if list_files:
        print_files(typical, calls.steps[hand_off])


def print_files(step: Counter[str], hand_off: Counter[str]) -> None:
    """Prints the calls by file."""
    print(f"    {'file':44}{'steady':>8}{'first of a turn':>18}")
    for file in sorted({*step, *hand_off}, key=lambda f: (-step[f], -hand_off[f])):
        print(f"    {file:44}{step[file]:8}{hand_off[file]:18}")


def report_profile(batches: int) -> None:
    """Prints the functions of the command line's steps that take most time."""
    probe = Profile(WARMUP)
    command_line(probe, WARMUP + batches)
    print(f"\n{batches} steps of the command line, by own time")
    pstats.Stats(probe.profile).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--batches", type=int, default=200, help="timed batches in a repeat")
    add("--repeats", type=int, default=5)
    add("--list", action="store_true", help="own calls by file")
    add("--profile", action="store_true", help="of the command line, by own time")
    options = parser.parse_args()
    if min(options.batches, options.repeats) < 1:
        parser.error("--batches and --repeats must be 1 or more")
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    print(environment.describe(), flush=True)
    report_times(measure(options))
    print("own calls of a step in the middle of a turn", flush=True)
    report_calls("package", package, options.list)
    report_calls("command line", command_line, options.list)
    if options.profile:
        report_profile(options.batches)


if __name__ == "__main__":
    main()
