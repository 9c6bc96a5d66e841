"""Split learning with NVFlare's Collab API, for benchmarks/engines.py --nvflare.

    python benchmarks/engines.py --nvflare ~/nvflare/bin/python

Needs `nvflare` (2.9), torch and torchvision, and nothing of split_lightning. The server
calls the client's functions for each batch, as in NVFlare's split-learning example
(examples/advanced/collab/simple_split_learning): forward, then backward with the
gradient, then its own step. The parties are processes of a provisioned deployment on
this machine (`PocEnv`: gRPC with mutual TLS), with the halves of torchvision's
ResNet-18, SGD(lr 0.01, momentum 0.9), channels-last, batches of 128, noise of the shape
of CIFAR-10, and one thread each. It sends contiguous tensors only, so they are laid out
anew at both ends. The deployment's ports, 8002 and 8003, must be free.

It trains blocks in turns with other processes (see baton.py).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from nvflare.collab import CollabRecipe, collab
from nvflare.recipe import PocEnv
from torch import Tensor, nn
from torchvision.models import resnet18

BATCH_SIZE = 128
NUM_BATCHES = 100  # of different samples
SECONDS_FOR_A_CALL = 300
_client: dict[str, Any] = {}


def halves(cut: str) -> list[nn.Sequential]:
    """Returns the layers of ResNet-18 up to the cut, and those behind it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = resnet18(num_classes=10).to(memory_format=torch.channels_last)
    layers = dict(network.named_children())
    last = list(layers).index(cut) + 1
    modules = [*layers.values()]
    modules.insert(-1, nn.Flatten())
    return [nn.Sequential(*modules[:last]), nn.Sequential(*modules[last:])]


def laid_out(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)


@collab.publish
def forward(number: int, cut: str) -> Tensor:
    """Returns the client's smashed data."""
    if not _client:
        module, draw = halves(cut)[0], torch.Generator().manual_seed(0)
        shape = (NUM_BATCHES, BATCH_SIZE, 3, 32, 32)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=draw)
        _client.update(module=module, optimizer=sgd(module), images=images)
    inputs = _client["images"][number % NUM_BATCHES].float().div(127.5).sub(1)
    _client["smashed"] = _client["module"](laid_out(inputs))
    return _client["smashed"].detach().contiguous()


@collab.publish
def backward(gradient: Tensor) -> None:
    """Steps the client."""
    _client["optimizer"].zero_grad()
    _client["smashed"].backward(laid_out(gradient))
    _client["optimizer"].step()


@collab.main
def train() -> None:
    """Trains from the server, as long as the baton says so."""
    sys.path.append(collab.get_app_prop("folder"))
    from baton import Baton

    cut, address = collab.get_app_prop("cut"), collab.get_app_prop("socket")
    module, criterion = halves(cut)[1], nn.CrossEntropyLoss()
    optimizer, draw = sgd(module), torch.Generator().manual_seed(1)
    labels = torch.randint(10, (NUM_BATCHES, BATCH_SIZE), generator=draw)
    client = collab.clients[0](timeout=SECONDS_FOR_A_CALL)
    baton, number, goes_on = Baton(address), 0, True
    while goes_on:
        smashed = laid_out(client.forward(number, cut)).requires_grad_()
        criterion(module(smashed), labels[number % NUM_BATCHES]).backward()
        client.backward(smashed.grad.contiguous())
        optimizer.step()
        optimizer.zero_grad()
        number += 1
        goes_on = baton.tick()


def deploy(cut: str, address: str, workspace: str) -> None:
    """Runs the server and the client in a deployment of their own, until they end."""
    os.environ["NVFLARE_POC_WORKSPACE"] = workspace
    recipe = CollabRecipe("split", min_clients=1, sync_task_timeout=60)
    folder = str(Path(__file__).resolve().parent)
    for name, value in (("cut", cut), ("socket", address), ("folder", folder)):
        recipe.set_server_prop(name, value)
    run = recipe.execute(PocEnv(num_clients=1))
    run.get_result()  # waits, and stops the deployment
    if run.get_status() != "FINISHED:COMPLETED":
        sys.exit(f"The job ended with {run.get_status()}; see {workspace}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cut", choices=("layer2", "maxpool"), default="layer2")
    parser.add_argument("--workspace", default="/tmp/nvflare_split")
    parser.add_argument("--socket", required=True)
    options = parser.parse_args()
    deploy(options.cut, options.socket, options.workspace)
