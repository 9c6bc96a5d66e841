"""The export of a run: rebuilt from its folder, written, and checked on test images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

import split_lightning
from split_lightning.artifacts import make_folder
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.exporting import TOLERANCE, Exporter, require_onnx
from split_lightning.report import print_line
from split_lightning.runs import choose_network, rebuild_module, restore

_NUM_IMAGES = 64  # of the test set, on which what was written is checked


def export_run(
    cfg: DictConfig,
    run: str | Path,
    formats: Sequence[str],
    checkpoint: str | None = None,
    client: int | None = None,
) -> dict[str, float]:
    """Writes the network of a run, and `export.json`, which says how to feed it.

    Returns:
        The largest difference from the run's logits on test images, by format.

    Raises:
        ValueError: If something is missing or does not fit, or a check fails.
    """
    if "onnx" in formats:
        require_onnx()
    folder = make_folder(cfg.output_dir)
    module = rebuild_module(cfg)
    restore(module, run, checkpoint)
    choose_network(module, client)
    if "safetensors" in formats and module.parties.kinds.have_networks:
        raise ValueError(
            "Expected `format` to be torch or onnx where clients have networks of "
            "their own (`model.client_networks`): there is no one unsplit network "
            "whose weights they are; but got safetensors."
        )
    data = instantiate(cfg.datamodule, _convert_="all")
    images = images_of_test(data)
    about = describe(cfg, data, images)
    exporter = Exporter(module.stages(), images, about)
    found = {}
    for name in formats:
        if name == "safetensors":
            network = instantiate(cfg.protocol.module.network, _convert_="all")
            found[name] = exporter.export_weights(network, folder)
        elif name == "torch":
            found[name] = exporter.export_programs(folder)
        else:
            found[name] = exporter.export_onnx(folder)
    (folder / "export.json").write_text(json.dumps(about, indent=2) + "\n")
    return found


def images_of_test(data: SplitDataModule) -> Tensor:
    """Returns the first test images, normalised, `(B, C, H, W)`."""
    data.prepare_data()
    data.setup("test")
    batches, count = [], 0
    for inputs, _ in data.test_dataloader():
        batches.append(inputs)
        count += len(inputs)
        if count >= _NUM_IMAGES:
            break
    return torch.cat(batches)[:_NUM_IMAGES]


def describe(cfg: DictConfig, data: SplitDataModule, images: Tensor) -> dict[str, Any]:
    """Returns what a user of the network must know, in plain values."""
    shape = list(images.shape[1:])
    mean, std = (list(map(float, cfg.datamodule[key])) for key in ("mean", "std"))
    axes = f"(B, {', '.join('CHW' if len(shape) == 3 else map(str, shape))})"
    if images.is_floating_point():
        mean, std = (own * (shape[0] // len(own)) for own in (mean, std))
        kind = (
            "(values - mean) / std, where integers are divided by the largest value of "
            "their type first (uint8 by 255): float32"
        )
    else:
        mean, std, kind = [], [], "ids, int64"
    return {
        "classes": list(data.classes),
        "image_shape": shape,  # of a sample: C, H, W
        "mean": mean,
        "std": std,
        "input": f"{kind} of shape {axes}",
        "network": OmegaConf.to_container(cfg.protocol.module.network, resolve=True),
        "cut_layers": OmegaConf.to_container(cfg.topology.cut_layers, resolve=True),
        "split_lightning": split_lightning.__version__,
        "torch": str(torch.__version__),
    }


def print_export(found: dict[str, float], folder: Path) -> None:
    """Prints how far the written files are from the run, and where they are."""
    console = Console()
    table = Table("format", "largest difference of a logit")
    for name, difference in found.items():
        table.add_row(name, f"{difference:.1e}")
    console.print(table)
    console.print(f"(allowed: {TOLERANCE:g} of the largest logit, or of 1)")
    for file in sorted(folder.iterdir()):
        print_line(console, str(file))
