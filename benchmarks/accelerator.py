"""Images per second on a CPU or GPU: ours, a bare split loop, and the unsplit network.

    python benchmarks/throughput.py --accelerator gpu --batches 100 --warmup 20
    python benchmarks/throughput.py --accelerator gpu --profile --batches 20

All train ResNet-18 (torchvision's stem, or that of `cifar_resnet18`) on noise of
CIFAR-10's shape, cut after the layer of the configuration, channels-last, in fp32 and
in bf16 (autocast). They are interleaved in one process and in alternating order;
ratios are taken within a repeat.

- `ours`: `SplitLightningModule` and `SplitDataModule` with one client, in a Trainer
  with `RoundRobinWeightPassing` and no logger. Images come from the CPU's memory.
- `command line`: what `python -m split_lightning.train` builds, in this process.
- `split loop`, `unsplit loop`: bare loops on images that are on the device.

The profile counts what makes the CPU wait for the device, per step.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from command_line import train
from noise import NoiseImages
from stopwatch import Probe, measured_by
from torch import Tensor, nn
from torchvision.models import resnet18

import split_lightning as sl
from split_lightning.models import cifar_resnet18, split

STEMS = {
    "resnet18": (resnet18, "maxpool"),
    "cifar_resnet18": (cifar_resnet18, "layer1"),
}
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
WAITS = (
    "aten::item",
    "aten::_local_scalar_dense",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaMemcpyAsync",
)


class Case:
    """A network and a precision, which every variant trains.

    Args:
        stem: The network.
        precision: `fp32` or `bf16`.
        options: Those of the command line.
    """

    def __init__(self, stem: str, precision: str, options: argparse.Namespace) -> None:
        self.stem, self.precision = stem, precision
        self.make, self.cut = STEMS[stem]
        self.accelerator = options.accelerator
        self.device = torch.device("cuda" if options.accelerator == "gpu" else "cpu")
        self.batch_size = options.batch_size
        self.count = options.warmup + options.batches
        self.num_samples = self.count * self.batch_size

    def network(self) -> nn.Module:
        """Returns the network, on the device."""
        network: nn.Module = self.make(num_classes=10)
        return network.to(self.device, memory_format=torch.channels_last)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the same batch on the device, again and again."""
        images = NoiseImages(self.batch_size).images
        inputs = images.inputs.float().div(127.5).sub(1)
        inputs = inputs.to(self.device, memory_format=torch.channels_last)
        return itertools.repeat((inputs, images.targets.to(self.device)), self.count)

    def autocast(self) -> Any:
        """Returns the context of the precision."""
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


def unsplit_loop(case: Case, probe: Probe) -> None:
    network = case.network()
    optimizer = SGD(network.parameters())
    for inputs, targets in case.batches():
        optimizer.zero_grad()
        with case.autocast():
            loss = nn.functional.cross_entropy(network(inputs), targets)
        loss.backward()
        optimizer.step()
        probe.tick(None)


def split_loop(case: Case, probe: Probe) -> None:
    client, server = split(case.network(), case.cut)
    optimizers = [SGD(segment.parameters()) for segment in (client, server)]
    for inputs, targets in case.batches():
        for optimizer in optimizers:
            optimizer.zero_grad()
        with case.autocast():
            smashed = client(inputs)
            received = smashed.detach().requires_grad_()
            loss = nn.functional.cross_entropy(server(received), targets)
        loss.backward()
        smashed.backward(received.grad)
        for optimizer in optimizers:
            optimizer.step()
        probe.tick(None)


def ours(case: Case, probe: Probe) -> None:
    data = sl.SplitDataModule(
        NoiseImages(case.num_samples), 1, batch_size=case.batch_size, val_share=0.0
    )
    network = case.make(num_classes=10)
    module = sl.SplitLightningModule(
        network, case.cut, SGD, SGD, 10, channels_last=True
    )
    with measured_by(probe) as stopwatch:
        trainer = pl.Trainer(
            accelerator=case.accelerator,
            devices=1,
            precision=PRECISIONS[case.precision],
            max_epochs=1,
            callbacks=[sl.RoundRobinWeightPassing(), stopwatch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)


def command_line(case: Case, probe: Probe) -> None:
    """Runs `python -m split_lightning.train` in this process."""
    source = f"{{_target_:noise.NoiseImages,num_samples:{case.num_samples}}}"
    words = [
        "num_clients=1",
        "rounds=1",
        "data=cifar10",
        "data.val_share=0",
        f"datamodule.source={source}",
        f"model={case.stem}",
        f"model.cut_layer={case.cut}",
        f"batch_size={case.batch_size}",
        f"threads={torch.get_num_threads()}",
        f"trainer.accelerator={case.accelerator}",
        f"trainer.precision={PRECISIONS[case.precision]}",
        "trainer.limit_test_batches=1",
    ]
    train(words, probe)


VARIANTS: dict[str, Callable[[Case, Probe], None]] = {
    "ours": ours,
    "command line": command_line,
    "split loop": split_loop,
    "unsplit loop": unsplit_loop,
}


class Clock(Probe):
    """Times the steps after the first ones, with the device's work.

    Args:
        first: Number of steps before the timed ones.
        count: Number of timed steps.
    """

    def __init__(self, first: int, count: int) -> None:
        self._ends, self._ended, self._times = (first, first + count), 0, list[float]()

    def tick(self, batch: Any) -> None:
        """Waits for the device at the first and the last timed step."""
        self._ended += 1
        if self._ended in self._ends:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Seconds of the timed steps."""
        start, end = self._times
        return end - start


class Operations(Probe):
    """Profiles the steps after the first ones.

    Args:
        first: Number of steps before the profiled ones.
        count: Number of profiled steps.
    """

    def __init__(self, first: int, count: int) -> None:
        self._ends, self._ended = (first, first + count), 0
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self.profile = torch.profiler.profile(activities=kinds)

    def tick(self, batch: Any) -> None:
        """Begins and ends with a step."""
        self._ended += 1
        if self._ended == self._ends[0]:
            self.profile.start()
        elif self._ended == self._ends[1]:
            self.profile.stop()


def compare(case: Case, options: argparse.Namespace) -> None:
    """Prints the images per second of each variant, and ours as a ratio."""
    speeds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(options.repeats):
        for name in list(VARIANTS) if repeat % 2 == 0 else list(reversed(VARIANTS)):
            clock = Clock(options.warmup, options.batches)
            VARIANTS[name](case, clock)
            speeds[name].append(options.batches * case.batch_size / clock.seconds)
    print(f"\n{case.stem}, cut after {case.cut}, {case.precision}, {case.accelerator}")
    print("                images per second       as a ratio to the split loop")
    for name, figures in speeds.items():
        pairs = zip(figures, speeds["split loop"], strict=True)
        ratios = summary([own / other for own, other in pairs], ".3f")
        print(f"  {name:14}{summary(figures, '.1f'):26}{ratios}", flush=True)


def summary(figures: list[float], form: str) -> str:
    """Returns the median and the range of a figure over the repeats."""
    spread = f"{min(figures):{form}} to {max(figures):{form}}"
    return f"{statistics.median(figures):{form}} ({spread})"


def profile(case: Case, options: argparse.Namespace) -> None:
    """Prints the operations of each variant that take most time, and what waits."""
    key = (
        "self_cuda_time_total" if case.device.type == "cuda" else "self_cpu_time_total"
    )
    for name, variant in VARIANTS.items():
        probe = Operations(options.warmup, options.batches)
        variant(case, probe)
        found = probe.profile.key_averages()
        counts = {own.key: own.count / options.batches for own in found}
        waits = ", ".join(f"{wait} {counts.get(wait, 0):.2f}" for wait in WAITS)
        print(f"\n{name}, {case.stem}, {case.precision}; a step: {waits}")
        print(found.table(sort_by=key, row_limit=15, max_name_column_width=50))


def run(options: argparse.Namespace) -> None:
    """Compares all, or profiles them."""
    if options.accelerator == "gpu" and not torch.cuda.is_available():
        sys.exit("--accelerator gpu needs a GPU, and there is none here.")
    for stem in options.stems:
        for precision in options.precisions:
            case = Case(stem, precision, options)
            (profile if options.profile else compare)(case, options)
