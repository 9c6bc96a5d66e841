"""A finished run, rebuilt from its folder: loaded, tested and exported."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig

from split_lightning.callbacks.confusion_matrix import ClassFigures, ConfusionMatrix
from split_lightning.callbacks.round_progress_bar import RoundProgressBar
from split_lightning.cli.building import choose_threads, new_module
from split_lightning.cli.run_command import TRAINER_KEYS
from split_lightning.module import SplitLightningModule
from split_lightning.runs import evaluation, run_export
from split_lightning.runs.artifacts import make_folder, save_results
from split_lightning.runs.exporting import require_onnx
from split_lightning.runs.run_files import read_config
from split_lightning.runs.trained_weights import choose_network, restore
from split_lightning.training.support import require_one_device


def load_run(
    folder: str | Path, checkpoint: str | None = None, client: int | None = None
) -> SplitLightningModule:
    """Returns the trained module of a run, from its folder alone, in eval mode.

    Args:
        folder: The run's folder.
        checkpoint: `best` or `last`, or a checkpoint's file; `None`: the final weights.
        client: The client, where clients ended with different networks.

    Raises:
        ValueError: If something is missing or damaged, or does not fit, or `client` is
            needed, or none of those that have a network of their own.

    Example::

        module = load_run("runs/digits/2026-01-31_12-00-00-000000")
        logits = module(images)  # normalised as in training
    """
    module = rebuild_module(read_config(folder))
    restore(module, folder, checkpoint)
    choose_network(module, client)
    return module.eval()


def rebuild_module(cfg: DictConfig) -> SplitLightningModule:
    """Builds the module of a run again, at a random start."""
    module = new_module(cfg)
    protocol = instantiate(cfg.protocol, _convert_="all")
    module.follow(protocol, cfg.datamodule.num_clients)
    return module


def evaluate(
    cfg: DictConfig,
    run: str | Path,
    checkpoint: str | None = None,
    client: int | None = None,
) -> tuple[dict[str, Any], ClassFigures]:
    """Tests the network of a run as training did; writes the results.

    Args:
        cfg: The run's configuration, as it is or changed. `output_dir` is where
            `results.json` and the tables and pictures of `ConfusionMatrix` go.
        run: The run's folder.
        checkpoint: `best` or `last`, or a checkpoint's file; `None`: the final weights.
        client: The client to test, where clients have different networks;
            `None`: all, for the mean over them.

    Returns:
        The results, and each class's figures.

    Raises:
        ValueError: If the folder lacks something, or what it has does not fit.
    """
    folder = make_folder(cfg.output_dir)
    confusion = ConfusionMatrix(folder)
    trainer = _trainer(cfg, confusion)
    data = instantiate(cfg.datamodule, _convert_="all")
    module = rebuild_module(cfg)
    # In the precision of the run first: weights of 64 bits are not to be rounded.
    trainer.precision_plugin.convert_module(module)
    restore(module, run, checkpoint)
    if client is not None:
        choose_network(module, client)
    data.setup("test")
    choose_threads(cfg, module, data)
    results, figures = evaluation.evaluate(trainer, module, data, confusion)
    origin = {"run": str(run), "weights": checkpoint or "final"}
    if client is not None:
        origin["client"] = str(client)
    save_results({**origin, **results}, folder / "results.json")
    return results, figures


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
    make_folder(cfg.output_dir)
    module = rebuild_module(cfg)
    restore(module, run, checkpoint)
    choose_network(module, client)
    data = instantiate(cfg.datamodule, _convert_="all")
    new_network = partial(instantiate, cfg.module.network, _convert_="all")
    return run_export.export_run(cfg, module, data, formats, new_network)


def _trainer(cfg: DictConfig, confusion: ConfusionMatrix) -> pl.Trainer:
    if cfg.trainer.get("limit_test_batches") == 0:
        raise ValueError(
            "Expected `trainer.limit_test_batches` to leave something to test, but "
            "got 0."
        )
    chosen = {key: cfg.trainer[key] for key in TRAINER_KEYS if key in cfg.trainer}
    callbacks: list[pl.Callback] = [confusion]
    if chosen.get("enable_progress_bar"):
        callbacks.append(RoundProgressBar())
    trainer: pl.Trainer = instantiate(
        {"_target_": cfg.trainer["_target_"], **chosen},
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        _convert_="all",
    )
    require_one_device(trainer)
    return trainer
