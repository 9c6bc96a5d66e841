"""Throughput of `engine=grpc` and `engine=ray` beside `engine=local`.

    python benchmarks/engines.py --root ~/.cache/split_lightning
    python benchmarks/engines.py --cores 0 1 --nvflare ~/nvflare/bin/python

All train torchvision's ResNet-18 on CIFAR-10 (or noise of its shape) with batches of
128 and one thread a party, by the command line, with two clients:

- one batch in flight: `protocol=round_robin`, each client's samples as one turn;
- two: `protocol=splitfed_v2 local_steps=1 shuffle=false`: clients alternate, and one
  computes its forward pass while the server computes for the other.

The runs of a case begin one after the other, and are all ready before any is timed.
Then they train in turns, `--batches` at a time, in alternating order; the others sleep.
A block's figure is the mean of its batches, from the end of one to the end of the next
in the server's process; its first batch is left out. A ratio is taken between blocks
next to each other. `local` computes all parties in one process with one thread.

With `--nvflare`, NVFlare's Collab API trains the same halves (see nvflare_split.py).
Targets are printed beside the figures; none is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import environment
from throughput import BATCH_SIZE, summarize
from trainee import Trainee

import split_lightning

HERE = Path(__file__).resolve().parent
PACKAGE = Path(split_lightning.__file__).resolve().parents[1]
CUTS = ("layer2", "maxpool")
NUM_SAMPLES = 50_000
PROTOCOLS = {
    1: ("protocol=round_robin",),
    2: ("protocol=splitfed_v2", "local_steps=1", "protocol.shuffle=false"),
}
# The least ratio to `local`, by engine, batches in flight and cut.
TARGETS = {
    ("grpc", 1, "layer2"): 0.92,
    ("grpc", 1, "maxpool"): 0.92,
    ("grpc", 2, "layer2"): 1.3,
    ("grpc", 2, "maxpool"): 1.0,
    ("ray", 1, "layer2"): 0.95,
    ("ray", 1, "maxpool"): 0.95,
    ("ray", 2, "layer2"): 1.3,
}


def command_of(
    engine: str, cut: str, in_flight: int, options: argparse.Namespace
) -> list[str]:
    """Returns the command of a run that waits for its turns."""
    data = ["data=cifar10", f"data.root={options.root}"]
    if options.root is None:
        source = "data.source._target_=noise.NoiseImages"
        data = ["data=custom", source, f"+data.source.num_samples={NUM_SAMPLES}"]
    # In turns the first client alone has batches for all blocks.
    needed = 1 + (options.batches + 1) * (options.repeats + 1)
    epochs = -(-needed // (NUM_SAMPLES // 2 // BATCH_SIZE))
    return [
        *(sys.executable, "-m", "split_lightning.train", f"engine={engine}"),
        *(*data, "data.val_share=0", "model=resnet18", f"model.cut_layer={cut}"),
        *PROTOCOLS[in_flight],
        *("num_clients=2", "rounds=1", f"local_epochs={epochs}", "threads=1"),
        *(f"batch_size={BATCH_SIZE}", "logger=none", f"hydra.run.dir={engine}"),
        *("trainer.accelerator=cpu", "trainer.enable_checkpointing=false"),
        *("trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"),
        *("+callbacks.turns._target_=turns.Turns", "+callbacks.turns.address={socket}"),
    ]


def started(
    name: str, cut: str, in_flight: int, folder: Path, options: argparse.Namespace
) -> Trainee:
    """Returns a process that is ready to train."""
    places = [str(PACKAGE), str(HERE), os.environ.get("PYTHONPATH", "")]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    command = command_of(name, cut, in_flight, options)
    if name == "nvflare":
        command = [options.nvflare, str(HERE / "nvflare_split.py"), "--cut", cut]
        command += ["--socket", "{socket}", "--workspace", str(folder / "nvflare")]
        variables["PYTHONPATH"] = str(HERE)
    trainee = Trainee(name, command, folder, variables)
    try:
        trainee.begin()
    except BaseException:
        trainee.end()
        raise
    return trainee


def measure(
    cut: str, in_flight: int, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Returns the seconds of a batch of each engine, one figure a repeat."""
    names = ["local", *options.engines]
    if options.nvflare and in_flight == 1:
        names.append("nvflare")
    trainees: list[Trainee] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in names:
                own = started(name, cut, in_flight, Path(folder), options)
                trainees.append(own)
                if options.cores:
                    own.pin({options.cores[0]}, {options.cores[-1]})
            return in_turns(trainees, options.batches, options.repeats)
        finally:
            for trainee in trainees:
                trainee.end()


def in_turns(
    trainees: list[Trainee], num_batches: int, repeats: int
) -> dict[str, list[float]]:
    """Times blocks in turns, after one of each that does not count."""
    seconds: dict[str, list[float]] = {trainee.name: [] for trainee in trainees}
    for repeat in range(repeats + 1):
        for trainee in trainees if repeat % 2 else reversed(trainees):
            found = trainee.block(num_batches)
            if repeat:
                seconds[trainee.name].append(found)
        if repeat:
            line = "  ".join(f"{k} {1e3 * v[-1]:.0f}" for k, v in seconds.items())
            print(f"  block {repeat}, ms a batch: {line}", flush=True)
    return seconds


def report(seconds: dict[str, list[float]], cut: str, in_flight: int) -> None:
    """Prints the figures of a case."""
    print(f"cut {cut}, {in_flight} in flight: median (min..max) of blocks")
    for name, own in seconds.items():
        speed = BATCH_SIZE / statistics.median(own)
        milliseconds = summarize([1e3 * s for s in own], ".0f")
        line = f"  {name:8}{milliseconds:24} ms a batch, {speed:6.1f} images/s"
        if name != "local":
            ratios = [a / b for a, b in zip(seconds["local"], own, strict=True)]
            target = TARGETS.get((name, in_flight, cut))
            line += f", {summarize(ratios, '.3f')} of local"
            line += f" (target {target})" if target else ""
        print(line, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--root", type=Path, help="the folder of CIFAR-10; default: noise")
    add("--cuts", nargs="+", choices=CUTS, default=CUTS)
    add("--engines", nargs="+", choices=("grpc", "ray"), default=["grpc", "ray"])
    add("--in-flight", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    add("--batches", type=int, default=10, help="timed batches in a block")
    add("--repeats", type=int, default=5, help="blocks of each")
    add(
        "--cores",
        nargs="+",
        type=int,
        help="pins the server's process to the first, and clients to the last",
    )
    add("--nvflare", metavar="PYTHON", help="an interpreter that has NVFlare")
    options = parser.parse_args()
    if min(options.batches, options.repeats) < 1:
        parser.error("--batches and --repeats must be positive")
    options.root = options.root and options.root.expanduser().resolve()
    return options


def main() -> None:
    options = parse()
    first, *others = options.cores or ["any"]
    print(environment.describe())
    print(f"one thread a party; data: {options.root or 'noise'}", end="; ")
    print(f"cores: server {first}, clients {(others or [first])[-1]}", flush=True)
    for cut in options.cuts:
        for in_flight in options.in_flight:
            report(measure(cut, in_flight, options), cut, in_flight)


if __name__ == "__main__":
    main()
