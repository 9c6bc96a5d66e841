"""Seconds of a training step by threads, by how they wait, and by what else runs.

    python benchmarks/threads.py [--repeats 3]

Each row is a new process, since OpenMP reads its settings once. The rows of a repeat
are interleaved. On a busy machine one endless loop per core runs beside the training.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections import defaultdict

from environment import describe

STEPS = {"digits": 300, "resnet18": 8}
BUSY = "while True: pass"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(milliseconds_per_step(options.child))
        return
    print(describe())
    print("network   machine  threads  waiting  ms per step: median (min to max)")
    found = defaultdict(list)
    for _ in range(options.repeats):
        for network in STEPS:
            for busy in (False, True):
                for threads, policy in ((1, "PASSIVE"), (None, "PASSIVE"), (None, "")):
                    key = (network, busy, threads, policy)
                    found[key].append(measured(*key))
    for (network, busy, threads, policy), values in found.items():
        print(
            f"{network:9s} {'busy' if busy else 'idle':8s} {threads or 'all':7} "
            f"{policy.lower() or 'default':8s} {statistics.median(values):.1f} "
            f"({min(values):.1f} to {max(values):.1f})"
        )


def measured(network, busy, threads, policy):
    """Returns the milliseconds of a step, as a process of its own measures them."""
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    others = [
        subprocess.Popen([sys.executable, "-c", BUSY])
        for _ in range(len(os.sched_getaffinity(0)) if busy else 0)
    ]
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--child", network],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
    finally:
        for other in others:
            other.kill()
    return float(done.stdout)


def milliseconds_per_step(name):
    """Times steps of a two-stage loop, in this process."""
    import time

    import torch
    from torchvision.models import resnet18

    from split_lightning.models import DigitsCNN, split

    network, images = {
        "digits": lambda: (DigitsCNN(), torch.randn(32, 1, 8, 8)),
        "resnet18": lambda: (resnet18(num_classes=10), torch.randn(128, 3, 32, 32)),
    }[name]()
    labels = torch.randint(0, 10, (len(images),))
    segments = split(network, "maxpool")
    client, server = segments
    optimizers = [torch.optim.SGD(own.parameters(), lr=0.01) for own in segments]

    def step():
        smashed = client(images)
        received = smashed.detach().requires_grad_()
        torch.nn.functional.cross_entropy(server(received), labels).backward()
        smashed.backward(received.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(3):
        step()
    start = time.perf_counter()
    for _ in range(STEPS[name]):
        step()
    return 1000 * (time.perf_counter() - start) / STEPS[name]


if __name__ == "__main__":
    main()
