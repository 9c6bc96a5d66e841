"""Images per second: ours, the source notebook's loop, and the unsplit network.

    python benchmarks/throughput.py --root ~/.cache/cifar10 [--bf16]

All train torchvision's ResNet-18 on CIFAR-10 with batches of 128 and SGD(lr 0.01,
momentum 0.9), interleaved in one process and in alternating order, so that what else
the machine does slows all alike; ratios are taken within a repeat. Timed is the steady
state, from the end of one full batch to the end of another.

- `ours`: `SplitLightningModule` cut after `maxpool`, channels-last, one client, from
  `SplitDataModule` through Lightning's Trainer, with weight passing, the monitors and
  TensorBoard as in a normal run; no validation, checkpoints or progress bar.
- `notebook`: its torchvision data set, DataLoader (two workers) and step.
- `unsplit`: the bare loop, contiguous fp32, on images in memory, normalised beforehand.

With `--accelerator cpu` or `gpu` it compares ours with bare loops on that device, on
noise: see benchmarks/accelerator.py.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import accelerator
import environment
import notebook
import pytorch_lightning as pl
import torch
from noise import NoiseImages
from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.models import resnet18

import split_lightning as sl
from split_lightning.callbacks import CommunicationMonitor, SpeedMonitor
from split_lightning.data import Images

BATCH_SIZE = 128
FULL_BATCHES = 50_000 // BATCH_SIZE
HALVES = (0.5, 0.5, 0.5)
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


class Data(NamedTuple):
    """The same images, as each variant takes them."""

    ours: sl.SplitDataModule
    notebook: CIFAR10
    unsplit: Images


class Stopwatch:
    """Times the batches that follow the warm-up."""

    def __init__(self, warmup: int, batches: int) -> None:
        self.warmup = warmup
        self.batches = batches
        self._ended, self._times = 0, []

    def tick(self) -> bool:
        """Notes the end of a batch; tells whether it was the last."""
        self._ended += 1
        if self._ended in (self.warmup, self.warmup + self.batches):
            if notebook.device.type == "cuda":
                torch.cuda.synchronize()
            self._times.append(time.perf_counter())
        return len(self._times) == 2

    @property
    def images_per_second(self) -> float:
        """Speed after the warm-up."""
        start, end = self._times
        return self.batches * BATCH_SIZE / (end - start)


def train_ours(data: Data, watch: Stopwatch, precision: str = "32-true") -> None:
    module = sl.SplitLightningModule(
        resnet18(num_classes=10), "maxpool", SGD, SGD, 10, channels_last=True
    )
    ticks = LambdaCallback(on_train_batch_end=lambda *_: watch.tick())
    passing, traffic = sl.RoundRobinWeightPassing(), CommunicationMonitor()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator=notebook.device.type,
            devices=1,
            precision=precision,
            max_epochs=1,
            limit_train_batches=watch.warmup + watch.batches,
            log_every_n_steps=10,
            callbacks=[SpeedMonitor(), passing, traffic, ticks],
            logger=TensorBoardLogger(folder, name="", default_hp_metric=False),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data.ours)


def train_unsplit(data: Data, watch: Stopwatch) -> None:
    network = resnet18(num_classes=10).to(notebook.device)
    optimizer, criterion = SGD(network.parameters()), nn.CrossEntropyLoss()
    parts = [
        tensor.to(notebook.device).split(BATCH_SIZE) for tensor in data.unsplit[:2]
    ]
    for inputs, targets in zip(*parts, strict=True):
        criterion(network(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.tick()


def load(root: Path | None, num_batches: int) -> Data:
    if root is None:
        source = dataset = NoiseImages(50_000, notebook.transform)
    else:
        source = sl.TorchvisionImages("CIFAR10", root)
        dataset = CIFAR10(root, train=True, transform=notebook.transform)
    module = sl.SplitDataModule(
        source, 1, batch_size=BATCH_SIZE, val_share=0.0, mean=HALVES, std=HALVES
    )
    loaded = source.load(train=True)
    count = num_batches * BATCH_SIZE
    inputs, targets = loaded.inputs[:count], loaded.targets[:count]
    inputs = inputs.float().div(255).sub(0.5).div(0.5)
    return Data(module, dataset, Images(inputs, targets))


def measure(options: argparse.Namespace, data: Data) -> dict[str, list[float]]:
    """Returns the images per second of each variant, one figure a repeat."""
    variants = {
        "ours": train_ours,
        "notebook": lambda data, watch: notebook.train(data.notebook, watch.tick),
        "unsplit": train_unsplit,
    }
    if options.bf16:
        variants["ours bf16"] = partial(train_ours, precision="bf16-mixed")
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(options.repeats):
        order = list(variants) if repeat % 2 == 0 else list(reversed(variants))
        for name in order:
            watch = Stopwatch(options.warmup, options.batches)
            variants[name](data, watch)
            speeds[name].append(watch.images_per_second)
        line = "  ".join(f"{name} {speeds[name][-1]:.1f}" for name in order)
        print(f"repeat {repeat + 1}, images per second: {line}", flush=True)
    return speeds


def summarize(figures: list[float], form: str) -> str:
    """Returns the median and the spread of a figure over the repeats."""
    spread = f"{min(figures):{form}}..{max(figures):{form}}"
    return f"{statistics.median(figures):{form}}  ({spread})"


def report(speeds: dict[str, list[float]]) -> None:
    print("\nimages per second, median (min..max)")
    for name, figures in speeds.items():
        print(f"  {name:24}{summarize(figures, '.1f')}")
    print("ratio within a repeat, median (min..max)")
    for pair in ("ours / unsplit", "ours / notebook", "ours bf16 / unsplit"):
        ours, other = pair.split(" / ")
        if ours in speeds:
            ratios = [a / b for a, b in zip(speeds[ours], speeds[other], strict=True)]
            print(f"  {pair:24}{summarize(ratios, '.3f')}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--root", type=Path, default=Path("~/.cache/split_lightning"))
    add("--synthetic", action="store_true", help="noise of CIFAR-10's shape")
    add("--batches", type=int, default=20, help="timed batches in a repeat")
    add("--warmup", type=int, default=5, help="batches before them")
    add("--repeats", type=int, default=5)
    add("--threads", type=int, help="default: torch's own choice")
    add("--bf16", action="store_true", help="ours in bf16-mixed, too")
    add("--accelerator", choices=("cpu", "gpu"), help="ours beside bare loops on it")
    new = parser.add_argument_group("with --accelerator").add_argument
    new("--batch-size", type=int, default=BATCH_SIZE)
    new("--stems", nargs="+", choices=accelerator.STEMS, default=[*accelerator.STEMS])
    precisions = [*accelerator.PRECISIONS]
    new("--precisions", nargs="+", choices=precisions, default=precisions)
    new("--profile", action="store_true", help="operations instead of speed")
    options = parser.parse_args()
    if not 0 < options.warmup < options.warmup + options.batches <= FULL_BATCHES:
        parser.error(f"--warmup and --batches: at least 1 each, {FULL_BATCHES} in all")
    return options


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    if options.accelerator:
        print(environment.describe(), flush=True)
        accelerator.run(options)
        return
    root = None if options.synthetic else options.root.expanduser()
    if root and not (root / CIFAR10.base_folder).is_dir():
        print(f"No CIFAR-10 in {root}: noise instead (--root names its folder).")
        root = None
    print(environment.describe(), f"data: {root or 'noise'}", sep="\n", flush=True)
    report(measure(options, load(root, options.warmup + options.batches)))


if __name__ == "__main__":
    main()
