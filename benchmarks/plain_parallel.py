"""The most that `protocol=parallel` can reach: a plain loop beside the unsplit network.

    python benchmarks/plain_parallel.py --clients 100 --cut-layer maxpool

A step of the loop: each client computes its own image with a segment of its own, one
after the other; the server computes all of them as one batch; all step. The unsplit
network computes the same images as one batch. There is no code of the package in either
but `split`. Both take turns; ratios are of processor time, one thread.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import environment
import torch
from torch import nn
from torchvision.models import resnet18

from split_lightning.models import split

SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def steps_of(num_clients: int, cut_layer: str) -> dict[str, Callable[[], None]]:
    """Returns what takes a step with clients, and with the unsplit network."""
    network = resnet18(num_classes=10)
    client, server = split(copy.deepcopy(network), cut_layer)
    clients = [copy.deepcopy(client) for _ in range(num_clients)]
    optimizers = [
        SGD([p for each in clients for p in each.parameters()]),
        SGD(server.parameters()),
    ]
    unsplit_optimizer = SGD(network.parameters())
    images = torch.randn(num_clients, 3, 32, 32)
    labels = torch.randint(10, (num_clients,))
    loss = nn.functional.cross_entropy

    def parallel() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        pairs = zip(clients, images.split(1), strict=True)
        smashed = [each(image) for each, image in pairs]
        received = torch.cat([own.detach() for own in smashed]).requires_grad_()
        loss(server(received), labels).backward()
        assert received.grad is not None
        torch.autograd.backward(smashed, received.grad.split(1))
        for optimizer in optimizers:
            optimizer.step()

    def unsplit() -> None:
        unsplit_optimizer.zero_grad()
        loss(network(images), labels).backward()
        unsplit_optimizer.step()

    return {"parallel": parallel, "unsplit": unsplit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--clients", type=int, default=100)
    add("--cut-layer", default="maxpool")
    add("--repeats", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(environment.describe(), flush=True)
    steps, ratios = steps_of(options.clients, options.cut_layer), list[float]()
    for repeat in range(-2, options.repeats):  # the first ones warm up
        seconds = {}
        for name in sorted(steps, reverse=repeat % 2 == 0):
            start = time.process_time()
            steps[name]()
            seconds[name] = time.process_time() - start
        if repeat >= 0:
            ratios.append(seconds["unsplit"] / seconds["parallel"])
    print(
        f"{options.clients} clients, cut after {options.cut_layer}: "
        f"{statistics.median(ratios):.2f} of the unsplit network's speed "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
