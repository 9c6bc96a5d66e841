"""Memory of the server and time of a step, by number of clients with gRPC.

    python benchmarks/many_clients.py --clients 1 100

A server trains in a process of its own. All clients are threads of `--hosts` other
processes, each with a site, a journal, a certificate and a stream of its own. Clients
take turns (`RoundRobinWeightPassing`); the samples are shared out among them, so the
steps of a round are as many and as large with one client as with 100. The network is
tiny: what is timed is mostly messages, of 0.5 MiB each way with 32 images.

Columns: `peak`: the server's largest resident set from the time before clients connect
to the end; `before`: as large then (the peak of the imports before is left out);
`connected`: the peak when training begins; `step`: median milliseconds of the steps in
a turn, of the last round; `first`: of the first step of a turn, where weights are
passed on; `mean`: of all steps. The last lines compare the largest number of clients to
the smallest, within a repeat. Targets are printed beside the figures; none is asserted.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import environment
import pytorch_lightning as pl
import torch
from noise import NoiseImages
from processes import MIB, peak_since_reset, reset_peak, run_alone
from throughput import summarize
from torch import nn

import split_lightning as sl
from split_lightning.engines.answers import Answers
from split_lightning.engines.certificates import write_certificates
from split_lightning.engines.grpc_client import GrpcClient
from split_lightning.engines.grpc_sites import GrpcSites
from split_lightning.engines.journal import Journal

SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
MIB_TARGET, STEP_TARGET = 150, 1.0


class Figures(NamedTuple):
    """What a case took: MiB, then milliseconds."""

    peak: float
    before: float
    connected: float
    step: float
    first: float
    mean: float


class Steps(pl.Callback):
    """Notes the steps of the last round."""

    def __init__(self) -> None:
        self.before = self.connected = 0
        self.times: list[float] = []
        self.ends_turn: list[bool] = []

    def begin(self) -> None:
        """Notes what is resident before there are clients."""
        reset_peak()
        self.before = peak_since_reset()

    def on_train_start(self, *_: Any) -> None:
        """Notes the peak when all clients are connected."""
        self.connected = peak_since_reset()

    def on_train_epoch_start(self, *_: Any) -> None:
        """Forgets the steps of the round before."""
        self.times, self.ends_turn = [], []

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Notes the end of a step."""
        self.times.append(time.perf_counter())
        self.ends_turn.append(batch.ends_turn)

    def figures(self) -> Figures:
        """Returns the figures of the run."""
        pairs = zip(self.times, self.times[1:], strict=False)
        steps = [1e3 * (end - start) for start, end in pairs]
        begins = self.ends_turn[: len(steps)]
        inner = [s for s, first in zip(steps, begins, strict=True) if not first]
        outer = [s for s, first in zip(steps, begins, strict=True) if first]
        return Figures(
            peak_since_reset() / MIB,
            self.before / MIB,
            self.connected / MIB,
            statistics.median(inner),
            statistics.median(outer or [float("nan")]),
            statistics.mean(steps),
        )


def parts(
    options: argparse.Namespace, engine: sl.Engine | None = None
) -> tuple[sl.RoundRobinWeightPassing, sl.SplitLightningModule, sl.SplitDataModule]:
    """Returns the protocol, the module and the data, as all processes have them."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16 * 16, 10),
    )
    module = sl.SplitLightningModule(network, 2, SGD, SGD, 10, engine=engine)
    data = sl.SplitDataModule(
        NoiseImages(options.steps * options.batch_size),
        options.clients[0],
        batch_size=options.batch_size,
        val_share=0.0,
    )
    return sl.RoundRobinWeightPassing(), module, data


def serve(options: argparse.Namespace) -> Figures:
    """Trains with clients of other processes."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    steps, hosts = Steps(), list[subprocess.Popen[bytes]]()
    with tempfile.TemporaryDirectory() as folder:
        names = [f"client-{number}" for number in range(options.clients[0])]
        certificates = Path(folder, "certificates")
        write_certificates(certificates, names, ["127.0.0.1"])
        sites = GrpcSites("127.0.0.1:0", certificates / "server")
        command = [sys.executable, *sys.argv, "--folder", folder]

        def begin(port: int) -> None:
            for host in range(options.hosts):
                own = ["--port", str(port), "--host", str(host)]
                hosts.append(subprocess.Popen([*command, *own]))

        sites.start = begin
        protocol, module, data = parts(options, sl.Engine(sites=sites))
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=options.rounds,
            callbacks=[protocol, steps],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        steps.begin()
        try:
            trainer.fit(module, datamodule=data)
            figures = steps.figures()
            module.end()
            for host in hosts:
                host.wait(60)
        finally:
            for host in hosts:
                host.kill()
            module.engine.close()
    return figures


def host(options: argparse.Namespace) -> None:
    """Computes for every `hosts`-th client, each in a thread."""
    threads = []
    _, _, data = parts(options)  # the samples once; a site loads its client's alone
    data.prepare_data()
    data.setup("fit")
    for number in range(options.host, options.clients[0], options.hosts):
        protocol, module, _ = parts(options)
        name = f"client-{number}"
        site = module.as_site(data, protocol, num_hosted=1)
        answers = Answers(site, Journal(options.folder / "journals" / name))
        client = GrpcClient(
            name,
            f"127.0.0.1:{options.port}",
            options.folder / "certificates" / name,
            module.hello(data, [number]),
            patience=5,
        )
        threads.append(
            threading.Thread(target=client.serve, args=(answers, lambda final: None))
        )
    for thread in threads:
        thread.start()


def measure(options: argparse.Namespace) -> dict[int, list[Figures]]:
    """Runs each number of clients in turn, one figure a repeat."""
    found: dict[int, list[Figures]] = {count: [] for count in options.clients}
    columns = "".join(f"{name:>10}" for name in Figures._fields)
    print(f"clients{columns}", flush=True)
    for repeat in range(options.repeats):
        for count in options.clients if repeat % 2 == 0 else options.clients[::-1]:
            case = ["--case", "--clients", str(count)]
            case += ["--hosts", str(min(count, options.hosts))]
            for name in ("steps", "rounds", "batch_size"):
                case += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
            found[count].append(Figures(*run_alone(__file__, case)))
            row = "".join(f"{value:10.1f}" for value in found[count][-1])
            print(f"{count:7}{row}", flush=True)
    return found


def report(found: dict[int, list[Figures]]) -> None:
    """Compares the most clients to the fewest."""
    few, many = min(found), max(found)
    pairs = list(zip(found[few], found[many], strict=True))
    more = summarize([b.peak - a.peak for a, b in pairs], ".1f")
    print(f"{many} clients beside {few}, median (min..max) of repeats")
    print(f"  MiB more at the server  {more}  (target: under {MIB_TARGET})")
    for name in ("step", "mean"):
        ratios = [getattr(b, name) / getattr(a, name) for a, b in pairs]
        target = f"  (target: {STEP_TARGET})" if name == "step" else ""
        print(f"  {name:22}  {summarize(ratios, '.3f')}{target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--clients", type=int, nargs="+", default=[1, 100])
    add("--steps", type=int, default=400, help="in a round, of all clients")
    add("--rounds", type=int, default=2)
    add("--batch-size", type=int, default=32)
    add("--repeats", type=int, default=3)
    add("--hosts", type=int, default=4, help="processes with the clients")
    add("--case", action="store_true", help=argparse.SUPPRESS)
    add("--host", type=int, help=argparse.SUPPRESS)
    add("--port", type=int, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 2 * max(options.clients):
        parser.error("--steps must be twice as many as --clients, or more")
    torch.set_num_threads(1)
    if options.host is not None:
        host(options)
    elif options.case:
        print(json.dumps(serve(options)))
    else:
        print(environment.describe(), flush=True)
        report(measure(options))


if __name__ == "__main__":
    main()
