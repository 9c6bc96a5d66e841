"""Says what each cut would cost: `python -m split_lightning.cuts [KEY=VALUE ...]`.

Prints a table of the layers after which the configured network can be cut, and writes
`cuts.csv` and `cuts.png`. It needs no data set where the configuration has the shape of
a sample; else (`data=custom`) it loads the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track
from torch import Tensor

from split_lightning.artifacts import make_folder
from split_lightning.building import build_data
from split_lightning.config import check_classes, check_values, conf_folder
from split_lightning.cut_cost import CutCost, cut_costs
from split_lightning.cut_report import layers_down_to, report_costs
from split_lightning.data_shape import is_open, leave_out_shape
from split_lightning.models.split import cut_layers
from split_lightning.run_command import (
    Command,
    check_used,
    ending_with_one_line,
    typed_words,
)

COMMAND = Command(
    name="cuts",
    folder="cuts",
    keys={"depth": None},
    reads=(
        "experiment",
        "model.network",
        *(f"data.{key}" for key in ("in_channels", "image_size", "num_classes")),
    ),
    help="""Says what each cut of a network would cost client, server and link.

model=NAME          the network, as in training; or model.network._target_=...
data=NAME           whose images and classes; nothing is read or downloaded, but for
                    data=custom
+experiment=NAME    both, as an experiment has them
depth=NUMBER        layers whose paths have at most so many parts (layer1.0: two), or
                    `all`; default: the fewest that leave eight cuts to choose from
output_dir=FOLDER   where cuts.csv and cuts.png go; default: cuts/NETWORK-SHAPE
KEY=VALUE           of the configuration: data.image_size=64, data.num_classes=100""",
    usage="[KEY=VALUE ...]",
)


def measure(cfg: DictConfig, sample: Tensor) -> list[CutCost]:
    """Returns the costs of the cuts that a configuration asks for.

    Args:
        cfg: The configuration.
        sample: A sample, of which the shape and the type count.

    Raises:
        ValueError: If the network cannot be cut, or does not fit the images.
    """
    if cfg.topology.parts is not None:
        raise ValueError(
            "Expected a topology of whole samples, but got one for holders of parts "
            f"({cfg.topology.parts._target_}): there the bottoms are cut off the top, "
            "and `model.cut_layer` says where. Leave `topology` out to see what the "
            "cuts of the network take on whole samples."
        )
    network = instantiate(cfg.model.network, _convert_="all")
    every = cut_layers(network)
    layers = every if cfg.depth == "all" else layers_down_to(every, cfg.depth)
    if not layers:
        raise ValueError(
            f"Expected `depth` to leave a layer to cut after, but got {cfg.depth}: "
            f"{type(network).__name__} has {len(every)} cut layers."
        )
    console = Console(stderr=True)
    watched = track(
        layers,
        description="cutting",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    return cut_costs(network, sample.shape, watched, sample.dtype)


def main(words: Sequence[str] | None = None) -> None:
    """Prints and writes what each cut costs.

    Args:
        words: What is typed, such as `["model=resnet18", "data=cifar10"]`; `None`: from
            the command line.
    """
    words = typed_words(COMMAND) if words is None else list(words)
    with ending_with_one_line(words):
        cfg, sample = _composed(words)
        costs = measure(cfg, sample)
        report_costs(costs, make_folder(cfg.output_dir))


def _composed(words: Sequence[str]) -> tuple[DictConfig, Tensor]:
    """Returns the configuration with the command's keys, checked, and a sample."""
    own = [f"+{key}=null" for key in COMMAND.keys]
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        cfg = compose("train", [*own, "output_dir='???'", *words])
    leave_out_shape(cfg)
    reads = (*COMMAND.reads, *(["data.source"] if is_open(cfg) else []))
    check_used(cfg, words, COMMAND._replace(reads=reads))
    if cfg.model.cut_layer is None:
        cfg.model.cut_layer = 0  # all are measured, whichever is chosen
    has_folder = not OmegaConf.is_missing(cfg, "output_dir")
    if not has_folder:
        cfg.output_dir = COMMAND.folder
    check_values(cfg)
    check_classes(cfg)
    depth = cfg.depth
    if not (depth in (None, "all") or (type(depth) is int and depth >= 1)):
        raise ValueError(
            f"Expected `depth` to be an integer of at least 1, or all, but got {depth}."
        )
    sample = _sample_of(cfg)
    if not has_folder:
        cfg.output_dir = str(_default_folder(cfg, sample))
    return cfg, sample


def _default_folder(cfg: DictConfig, sample: Tensor) -> Path:
    target = OmegaConf.select(cfg, "model.network._target_")
    shape = "x".join(map(str, sample.shape))
    return Path(COMMAND.folder, f"{str(target).rpartition('.')[2]}-{shape}")


def _sample_of(cfg: DictConfig) -> Tensor:
    """Returns a sample of the data; a made-up one if its shape is configured."""
    if is_open(cfg):
        return build_data(cfg).example()[0]
    return torch.zeros(cfg.data.in_channels, cfg.data.image_size, cfg.data.image_size)


if __name__ == "__main__":
    main()
