"""The export of a trained network: written, and checked on test images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import split_lightning
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.module import SplitLightningModule
from split_lightning.paths import path_of
from split_lightning.runs.exporting import TOLERANCE, Exporter
from split_lightning.runs.report import print_line

_NUM_IMAGES = 64  # of the test set, on which what was written is checked


def export_run(
    cfg: DictConfig,
    module: SplitLightningModule,
    data: SplitDataModule,
    formats: Sequence[str],
    new_network: Callable[[], nn.Module],
) -> dict[str, float]:
    """Writes the network of a run, and `export.json`, which says how to feed it.

    Args:
        cfg: The run's configuration; `output_dir` is where to write.
        module: The run's module, trained.
        data: The data, of which test images are read.
        formats: Of `safetensors`, `torch` and `onnx`.
        new_network: Makes the unsplit network.

    Returns:
        The largest difference from the run's logits on test images, by format.

    Raises:
        ValueError: If the network cannot be written so, or a check fails.
    """
    if "safetensors" in formats and module.topology.has_client_networks:
        raise ValueError(
            "Expected `format` to be torch or onnx where clients have networks of "
            "their own (`model.client_networks`): there is no one unsplit network "
            "whose weights they are; but got safetensors."
        )
    folder = path_of(cfg.output_dir)
    images = images_of_test(data)
    about = describe(cfg, data, images)
    exporter = Exporter(module.stages(), images, about)
    found = {}
    for name in formats:
        if name == "safetensors":
            found[name] = exporter.export_weights(new_network(), folder)
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
    loader: Any = data.test_dataloader()
    for inputs, _ in loader:
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
    cuts = cfg.topology.cut_layers  # none where the network is not cut
    return {
        "classes": list(data.classes),
        "image_shape": shape,  # of a sample: C, H, W
        "mean": mean,
        "std": std,
        "input": f"{kind} of shape {axes}",
        "network": OmegaConf.to_container(cfg.module.network, resolve=True),
        "cut_layers": cuts and OmegaConf.to_container(cuts, resolve=True),
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
