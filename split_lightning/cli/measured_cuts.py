"""The cuts of a configured network, measured."""

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

from split_lightning.cli.building import build_data
from split_lightning.cli.config import check_classes, check_values, conf_folder
from split_lightning.cli.data_shape import is_open, leave_out_shape
from split_lightning.cli.run_command import Command, check_used
from split_lightning.models.cut_cost import CutCost, cut_costs
from split_lightning.models.split import cut_layers
from split_lightning.runs.cut_report import layers_down_to


def measured_cuts(cfg: DictConfig, sample: Tensor) -> list[CutCost]:
    """Returns the costs of the cuts that a configuration asks for.

    Args:
        cfg: The configuration.
        sample: A sample; only its shape and type matter.

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


def compose_cuts(command: Command, words: Sequence[str]) -> tuple[DictConfig, Tensor]:
    """Returns the configuration with the command's keys, checked, and a sample."""
    own = [f"+{key}=null" for key in command.keys]
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        cfg = compose("train", [*own, "output_dir='???'", *words])
    leave_out_shape(cfg)
    reads = (*command.reads, *(["data.source"] if is_open(cfg) else []))
    check_used(cfg, words, command._replace(reads=reads))
    if cfg.model.cut_layer is None:
        cfg.model.cut_layer = 0  # all are measured
    has_folder = not OmegaConf.is_missing(cfg, "output_dir")
    if not has_folder:
        cfg.output_dir = command.folder
    check_values(cfg)
    check_classes(cfg)
    depth = cfg.depth
    if not (depth in (None, "all") or (type(depth) is int and depth >= 1)):
        raise ValueError(
            f"Expected `depth` to be an integer of at least 1, or all, but got {depth}."
        )
    sample = _sample_of(cfg)
    if not has_folder:
        cfg.output_dir = str(Path(command.folder, _name_of(cfg, sample)))
    return cfg, sample


def _name_of(cfg: DictConfig, sample: Tensor) -> str:
    """Returns a folder's name: the network and the shape of a sample."""
    target = OmegaConf.select(cfg, "model.network._target_")
    shape = "x".join(map(str, sample.shape))
    return f"{str(target).rpartition('.')[2]}-{shape}"


def _sample_of(cfg: DictConfig) -> Tensor:
    """Returns a sample of the data; a made-up one if its shape is configured."""
    if is_open(cfg):
        return build_data(cfg).example()[0]
    return torch.zeros(cfg.data.in_channels, cfg.data.image_size, cfg.data.image_size)
