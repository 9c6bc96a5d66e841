"""Says what each cut would cost: `python -m split_lightning.cuts [KEY=VALUE ...]`.

Prints a table of the layers after which the configured network can be cut, and writes
`cuts.csv` and `cuts.png`. It needs no data set: the shape of an image is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track

from split_lightning.artifacts import make_folder
from split_lightning.config import check_classes, check_values, conf_folder
from split_lightning.cut_cost import CutCost, cut_costs
from split_lightning.cut_report import layers_down_to, report_costs
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
data=NAME           whose images and classes; nothing is read or downloaded
+experiment=NAME    both, as an experiment has them
depth=NUMBER        layers whose paths have at most so many parts (layer1.0: two), or
                    `all`; default: the fewest that leave eight cuts to choose from
output_dir=FOLDER   where cuts.csv and cuts.png go; default: cuts/NETWORK-SHAPE
KEY=VALUE           of the configuration: data.image_size=64, data.num_classes=100""",
    usage="[KEY=VALUE ...]",
)


def measure(cfg: DictConfig) -> list[CutCost]:
    """Returns the costs of the cuts that a configuration asks for.

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
    return cut_costs(network, _image_shape(cfg), watched)


def main(words: Sequence[str] | None = None) -> None:
    """Prints and writes what each cut costs.

    Args:
        words: What is typed, such as `["model=resnet18", "data=cifar10"]`; `None`: from
            the command line.
    """
    words = typed_words(COMMAND) if words is None else list(words)
    with ending_with_one_line(words):
        cfg = _composed(words)
        costs = measure(cfg)
        report_costs(costs, make_folder(cfg.output_dir))


def _composed(words: Sequence[str]) -> DictConfig:
    """Returns the configuration with the command's keys, checked."""
    own = [f"+{key}=null" for key in COMMAND.keys]
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        cfg = compose("train", [*own, "output_dir='???'", *words])
    check_used(cfg, words, COMMAND)
    if OmegaConf.is_missing(cfg, "output_dir"):
        cfg.output_dir = str(_default_folder(cfg))
    check_values(cfg)
    check_classes(cfg)
    depth = cfg.depth
    if not (depth in (None, "all") or (type(depth) is int and depth >= 1)):
        raise ValueError(
            f"Expected `depth` to be an integer of at least 1, or all, but got {depth}."
        )
    return cfg


def _default_folder(cfg: DictConfig) -> Path:
    target = OmegaConf.select(cfg, "model.network._target_")
    shape = "x".join(map(str, _image_shape(cfg)))
    return Path(COMMAND.folder, f"{str(target).rpartition('.')[2]}-{shape}")


def _image_shape(cfg: DictConfig) -> tuple[int, int, int]:
    return cfg.data.in_channels, cfg.data.image_size, cfg.data.image_size


if __name__ == "__main__":
    main()
