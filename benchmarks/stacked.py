"""Clients with different weights: one after the other, and stacked (torch.func).

    python benchmarks/stacked.py --clients 10 100 --images 1 10

Clients that act together with segments of their own (`protocol=parallel`) are computed
one after the other, each a forward and a backward of its own. The alternative is to
stack their weights and to let `torch.func.vmap` compute all in one: convolutions then
become grouped ones. Both compute the same gradients, which is checked first; both are
timed in turn, `--repeats` times, in one run. A ratio above 1 speaks for stacking.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import environment
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torchvision.models import resnet18

from split_lightning.models import split

Work = Callable[[], list[Tensor]]


def segments_of(num_clients: int, cut_layer: str) -> list[nn.Module]:
    """Returns a segment of ResNet-18 for each client, each with its own weights."""
    first, _ = split(resnet18(num_classes=10), cut_layer)
    segments = [copy.deepcopy(first) for _ in range(num_clients)]
    for segment in segments:
        for parameter in segment.parameters():
            nn.init.normal_(parameter, std=0.1)
    return segments


def one_by_one(segments: list[nn.Module], inputs: Tensor, gradients: Tensor) -> Work:
    """Returns what computes each client's gradients by itself."""

    def work() -> list[Tensor]:
        for segment, own, gradient in zip(segments, inputs, gradients, strict=True):
            segment.zero_grad()
            segment(own).backward(gradient)
        return [
            torch.stack([p.grad for p in same if p.grad is not None])
            for same in zip(*(s.parameters() for s in segments), strict=True)
        ]

    return work


def stacked(segments: list[nn.Module], inputs: Tensor, gradients: Tensor) -> Work:
    """Returns what computes all clients' gradients at once."""
    parameters, buffers = stack_module_state(segments)
    shape = copy.deepcopy(segments[0])

    def of_one(own: dict[str, Tensor], kept: dict[str, Tensor], x: Tensor) -> Tensor:
        outputs: Tensor = functional_call(shape, (own, kept), (x,))
        return outputs

    def work() -> list[Tensor]:
        outputs = vmap(of_one)(parameters, buffers, inputs)
        return list(torch.autograd.grad(outputs, list(parameters.values()), gradients))

    return work


def seconds_of(work: Work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(num_clients: int, num_images: int, options: argparse.Namespace) -> str:
    """Returns a line: both in milliseconds, and the ratio of each repeat."""
    torch.manual_seed(0)
    segments = segments_of(num_clients, options.cut_layer)
    inputs = torch.randn(num_clients, num_images, 3, 32, 32)
    outputs = segments[0](inputs[0])
    gradients = torch.randn(num_clients, *outputs.shape)
    ways = [make(segments, inputs, gradients) for make in (one_by_one, stacked)]
    for own, other in zip(*(way() for way in ways), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-2)
    pairs = [[seconds_of(way) for way in ways] for _ in range(options.repeats)]
    ratios = [single / joint for single, joint in pairs]
    single, joint = (
        statistics.median(times) * 1e3 for times in zip(*pairs, strict=True)
    )
    return (
        f"{num_clients:8}{num_images:8}{single:12.1f}{joint:12.1f}   "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--clients", type=int, nargs="+", default=[10, 100])
    add("--images", type=int, nargs="+", default=[1, 10], help="of a client in a step")
    add("--cut-layer", default="maxpool")
    add("--repeats", type=int, default=7)
    add("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(environment.describe(), f"cut_layer={options.cut_layer}", flush=True)
    print(" clients  images  one by one     stacked   ratio, median (min..max); ms")
    for num_clients in options.clients:
        for num_images in options.images:
            print(compare(num_clients, num_images, options), flush=True)


if __name__ == "__main__":
    main()
