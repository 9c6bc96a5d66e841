"""Seconds of a run with gRPC over shaped links, beside virtual ones (Linux, root).

    python benchmarks/shaped_link.py --links wan mobile --clients 1 2

The server and each client are processes in network namespaces of their own; each client
has a link to the server with the rates and the delay of `system=wan` or `mobile` (see
tun_link.py, and docs/time.md). The same run has `system=` with these links and with the
floating-point operations per second that this machine reaches on each half of the
network, measured just before: its virtual seconds are compared to those measured, from
the begin of a round to that of the next, without the first round. `after`: the speed
measured again after the run, over that before; where it is not about 1, the machine
did other work, and the row says nothing.

What is in the measured seconds alone: TLS; the headers of TCP and IP (3.5 % of the
bytes at 1,500 bytes a packet); the kernel's TCP, which begins slowly, and again after
each pause; turning tensors into bytes and back; the journal of clients; steps of
optimizers in the clients' processes after their backward pass; one round trip to ask
for the weights that the server relays to the next client; monitors and Lightning's
loop. What only the clock has: clients with servers of their own (`splitfed_v1`) train
at the same time, where the server in fact computes one batch after the other.

ResNet-18, noise of CIFAR-10's shape, batches of 128, one thread a party. The ratio's
target is 0.85 to 1.15; it is printed, not asserted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environment
import pytorch_lightning as pl
import torch
import yaml
from throughput import BATCH_SIZE, summarize
from torch import nn
from torchvision.models import resnet18

import split_lightning as sl
from split_lightning.callbacks.virtual_clock import virtual_seconds
from split_lightning.cli.config import conf_folder
from split_lightning.engines.certificates import write_certificates
from split_lightning.system.work import work_of

HERE = Path(__file__).resolve().parent
PACKAGE = Path(sl.__file__).resolve().parents[1]
PORT = 8443
SECONDS_TO_END = 900


class RoundSeconds(pl.Callback):
    """Writes the seconds of each round, measured and virtual; then ends the process.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.begun: list[float] = []
        self.virtual: list[float] = [0.0]

    def on_train_epoch_start(self, *_: Any) -> None:
        """Notes when a round begins."""
        self.begun.append(time.perf_counter())

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Notes the virtual seconds so far."""
        self.virtual.append(virtual_seconds(trainer) or 0.0)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Writes the file, and ends the process."""
        pairs = zip(self.virtual[1:], self.virtual[2:], strict=False)
        times = zip(self.begun[1:], self.begun[2:], strict=False)
        virtual = [end - begin for begin, end in pairs]
        found = {"measured": [end - begin for begin, end in times], "virtual": virtual}
        self.path.write_text(json.dumps(found))
        raise SystemExit


def flops(cut: str) -> dict[str, float]:
    """Returns the operations per second that this process reaches on each half."""
    network = resnet18(num_classes=10)
    sgd = torch.optim.SGD
    module = sl.SplitLightningModule(network, cut, sgd, sgd, 10, channels_last=True)
    halves = module.stages()
    inputs = module.laid_out(torch.randn(BATCH_SIZE, 3, 32, 32))
    work = work_of(halves, inputs[:1])
    found = {}
    for (role, half), own in zip(halves.items(), work, strict=True):
        half.train()
        optimizer = sgd(half.parameters(), lr=0.01, momentum=0.9)
        seconds = [one_step(half, inputs, optimizer) for _ in range(10)]
        total = BATCH_SIZE * (own.forward + own.backward)
        found[role] = total / statistics.median(seconds[3:])
        with torch.no_grad():
            inputs = half(inputs)
    return found


def one_step(
    half: nn.Module, inputs: torch.Tensor, optimizer: torch.optim.Optimizer
) -> float:
    """Returns the seconds of both passes and a step."""
    inputs = inputs.detach().requires_grad_(inputs.shape[1] > 3)
    begin = time.perf_counter()
    outputs = half(inputs)
    outputs.backward(torch.ones_like(outputs))
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - begin


def system_of(link: str) -> dict[str, float]:
    """Returns the rates and the delay of a system, from its configuration."""
    text = Path(conf_folder(), "system", f"{link}.yaml").read_text()
    system: dict[str, float] = yaml.safe_load(text)["clock"]["system"]
    return {k: float(system[k]) for k in ("uplink", "downlink", "latency")}


@contextlib.contextmanager
def links_up(num_clients: int, system: dict[str, float]) -> Iterator[list[str]]:
    """Makes the namespaces of the server and of clients, with links; yields names."""
    names = [f"split{os.getpid()}-{end}" for end in ("server", *range(num_clients))]
    links = [
        {
            "ends": [
                {
                    "namespace": names[0],
                    "address": f"10.77.{client}.1/30",
                    "rate": system["downlink"],
                },
                {
                    "namespace": names[1 + client],
                    "address": f"10.77.{client}.2/30",
                    "rate": system["uplink"],
                },
            ],
            "delay": system["latency"],
        }
        for client in range(num_clients)
    ]
    relay: subprocess.Popen[str] | None = None
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        command = [sys.executable, str(HERE / "tun_link.py"), *map(json.dumps, links)]
        relay = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert relay.stdout is not None
        if relay.stdout.readline().strip() != "ready":
            sys.exit("The links could not be made (see above); they need root.")
        yield names
    finally:
        if relay is not None:
            relay.kill()
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def words_of(
    link: str, num_clients: int, speeds: dict[str, float], options: argparse.Namespace
) -> list[str]:
    """Returns what all processes of a run are told."""
    num_samples = num_clients * options.batches * BATCH_SIZE
    return [
        *("data=custom", "data.source._target_=noise.NoiseImages", "data.val_share=0"),
        "data.num_classes=10",
        "data.in_channels=3",
        "data.image_size=32",
        f"+data.source.num_samples={num_samples}",
        *("model=resnet18", f"model.cut_layer={options.cut}", "threads=1"),
        *(f"protocol={options.protocol}", f"num_clients={num_clients}"),
        *(f"batch_size={BATCH_SIZE}", f"rounds={options.rounds + 2}", "engine=grpc"),
        *(f"system={link}", f"system.clock.system.client_flops={speeds['client']}"),
        f"system.clock.system.server_flops={speeds['server']}",
        *(options.set or ()),
    ]


def run(
    link: str, num_clients: int, speeds: dict[str, float], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Returns the seconds of the rounds of a run, measured and virtual."""
    words = words_of(link, num_clients, speeds, options)
    places = [str(PACKAGE), str(HERE), os.environ.get("PYTHONPATH", "")]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    started: list[subprocess.Popen[bytes]] = []
    with (
        links_up(num_clients, system_of(link)) as names,
        tempfile.TemporaryDirectory() as place,
    ):
        folder = Path(place)
        certificates = folder / "certificates"
        sites = [f"client-{client}" for client in range(num_clients)]
        hosts = [f"10.77.{client}.1" for client in range(num_clients)]
        write_certificates(certificates, sites, hosts)

        def start(name: str, core: int, own: list[str]) -> None:
            command = ["ip", "netns", "exec", name]
            command += ["taskset", "-c", str(core)] if options.cores else []
            with (folder / f"{name}.log").open("wb") as log:
                started.append(
                    subprocess.Popen(
                        [*command, sys.executable, "-m", *own, *words],
                        env={**os.environ, **variables},
                        cwd=folder,
                        stdout=log,
                        stderr=log,
                    )
                )

        first, *others = options.cores or [0]
        server = [
            *("split_lightning.train", f"engine.listen=0.0.0.0:{PORT}"),
            *(f"engine.certificates={certificates / 'server'}", "logger=none"),
            *("trainer.accelerator=cpu", "trainer.enable_checkpointing=false"),
            *("trainer.enable_progress_bar=false", "hydra.run.dir=run"),
            "trainer.enable_model_summary=false",
            "+callbacks.seconds._target_=shaped_link.RoundSeconds",
            f"+callbacks.seconds.path={folder / 'seconds.json'}",
        ]
        try:
            start(names[0], first, server)
            for client, name in enumerate(names[1:]):
                own = [
                    *("split_lightning.client", "--id", str(client)),
                    f"engine.server={hosts[client]}:{PORT}",
                    f"engine.certificates={certificates / f'client-{client}'}",
                    f"engine.folder={folder / f'client-{client}'}",
                ]
                start(name, (others or [first])[-1], own)
            started[0].wait(SECONDS_TO_END)
        finally:
            for process in started:
                process.kill()
                process.wait()
        if not (folder / "seconds.json").exists():
            logs = [path.read_text()[-2000:] for path in folder.glob("*.log")]
            sys.exit("\n".join(["The run has failed.", *logs]))
        found: dict[str, list[float]] = json.loads(
            (folder / "seconds.json").read_text()
        )
    return found


def report(link: str, num_clients: int, options: argparse.Namespace) -> None:
    """Prints the seconds of a round, measured and virtual."""
    before = flops(options.cut)
    found = run(link, num_clients, before, options)
    after = flops(options.cut)
    virtual = statistics.median(found["virtual"])
    ratios = summarize([seconds / virtual for seconds in found["measured"]], ".3f")
    print(
        f"{link:8}{num_clients:8}  {summarize(found['measured'], '.2f'):24}"
        f"{virtual:8.2f}  {ratios:24}",
        "  ".join(
            f"{role} {1e-9 * speed:.1f} GFLOP/s (after: {after[role] / speed:.2f})"
            for role, speed in before.items()
        ),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--links", nargs="+", choices=("wan", "mobile"), default=["wan", "mobile"])
    add("--clients", type=int, nargs="+", default=[1, 2])
    add("--cut", choices=("layer2", "maxpool"), default="maxpool")
    add("--protocol", default="round_robin")
    add("--batches", type=int, default=8, help="of a client in a round")
    add("--rounds", type=int, default=5, help="that count")
    add("--cores", nargs="+", type=int, help="the server's first, then the clients'")
    add("--set", action="append", metavar="KEY=VALUE", help="of training, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(environment.describe())
    tcp = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    print(f"cut {options.cut}, {options.protocol}, {options.batches} batches a client")
    print(f"TCP's congestion control: {tcp}; target of the ratio: 0.85 to 1.15")
    print(
        f"{'link':8}{'clients':>8}  {'seconds a round':24}"
        f"{'virtual':>8}  measured / virtual"
    )
    for link in options.links:
        for num_clients in options.clients:
            report(link, num_clients, options)


if __name__ == "__main__":
    main()
