"""Building: the data, module and Trainer that a configuration names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from pytorch_lightning.utilities import rank_zero_info

import split_lightning
from split_lightning.callbacks.drift_monitor import DriftMonitor
from split_lightning.callbacks.speed_monitor import SpeedMonitor
from split_lightning.cli.data_shape import SHAPE_KEYS, fill_in
from split_lightning.cli.loggers import build_loggers
from split_lightning.cli.threads import set_threads
from split_lightning.cli.user_errors import is_in_sweep
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.engines.engine import Engine
from split_lightning.engines.remote import NO_SITES, Sites
from split_lightning.models.weights import load_weights
from split_lightning.module import SplitLightningModule
from split_lightning.protocols.protocol import Protocol
from split_lightning.runs.checkpoints import find_checkpoint
from split_lightning.system.work import work_of
from split_lightning.training.fitness import check_network, set_least_batch
from split_lightning.training.support import LOOK_AT_CLIENTS


class Run(NamedTuple):
    """All that a configuration names, built."""

    data: SplitDataModule
    module: SplitLightningModule
    trainer: pl.Trainer
    speed: SpeedMonitor
    checkpoint: str | None


def build(cfg: DictConfig, sites: Sites | None = None) -> Run:
    """Builds what a configuration names; data are loaded and partitioned.

    Data at other sites are not: `check` comes when their sites are there.

    Args:
        cfg: The configuration.
        sites: The sites of a run that continues; `None`: those of the configuration.
    """
    checkpoint = _checkpoint(cfg)
    engine = instantiate(cfg.engine) if sites is None else Engine(sites=sites)
    data = build_data(cfg, at_sites=engine.sites is not NO_SITES)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    module = build_module(cfg, engine)
    module.configure_optimizers()  # a wrong option fails here, not in mid-run
    speed = SpeedMonitor()
    protocol = instantiate(cfg.protocol, _convert_="all")
    found = instantiate(cfg.callbacks, _convert_="all").values()
    callbacks = [speed, protocol, *(own for own in found if own is not None)]
    if cfg.system.clock is not None:
        callbacks.append(instantiate(cfg.system.clock, _convert_="all"))
    trainer = instantiate(
        cfg.trainer,
        callbacks=[
            c
            for c in callbacks
            if _is_wanted(c, cfg.trainer, data, protocol, engine.sites is NO_SITES)
        ],
        logger=build_loggers(cfg, checkpoint) or False,
        _convert_="all",
    )
    if trainer.world_size > 1 and is_in_sweep():
        raise ValueError(
            "Expected one process for each run of a sweep (`trainer.devices=1`), but "
            f"got {trainer.world_size}: each would start the whole sweep again."
        )
    module.verify(trainer, data, protocol)
    run = Run(data, module, trainer, speed, checkpoint)
    if data.ask is None:
        check(cfg, run)
    return run


def check(cfg: DictConfig, run: Run) -> None:
    """Stops where network and data do not fit; sets what depends on both."""
    check_network(run.module, run.data)
    set_least_batch(run.module, run.data, run.trainer.world_size)
    choose_threads(cfg, run.module, run.data)


def build_data(
    cfg: DictConfig, at_sites: bool = False, sole_client: int | None = None
) -> SplitDataModule:
    """Builds the data module, set up to fit; fills the shape of the data in.

    Args:
        cfg: The configuration.
        at_sites: Whether the samples are at other sites; then nothing is loaded.
        sole_client: The client that has all samples of the source; `None`: they are
            partitioned.

    Raises:
        ValueError: If the shape of samples at other sites is not configured, or the
            source of one part of the features returns this part alone.
    """
    # The augmentation may need the shape, which the source alone may know.
    left_out: dict[str, Any] = {"augmentation": None}
    if at_sites:
        left_out["source"] = None
    made = instantiate(cfg.datamodule, _convert_="all", **left_out)
    data: SplitDataModule = made
    data.sole_client = sole_client
    if at_sites:
        _require_shape(cfg)
    else:
        data.prepare_data()
        data.setup("fit")
        if sole_client is not None and cfg.topology.parts is not None:
            _require_whole(cfg, data)
        fill_in(cfg, data)
    data.augmentation = instantiate(cfg.datamodule.augmentation, _convert_="all")
    return data


def _require_whole(cfg: DictConfig, data: SplitDataModule) -> None:
    """Stops where a source returns one party's part of the features alone."""
    sides = [cfg.data.image_size] * 2
    expected, found = (cfg.data.in_channels, *sides), tuple(data.example().shape[1:])
    if None not in expected and found != expected:
        raise ValueError(
            f"Expected `data.source` to return samples of the whole shape {expected}, "
            "with zeros where this party has no features, but got shape "
            f"{found}. The network takes this party's part of them, by "
            f"`topology.parts` ({instantiate(cfg.topology.parts)})."
        )


def _require_shape(cfg: DictConfig) -> None:
    missing = [key for key in SHAPE_KEYS if OmegaConf.select(cfg, key) is None]
    if missing:
        raise ValueError(
            f"Expected `{'`, `'.join(missing)}` to be set where the samples are at "
            "other sites: the server does not load any. Got null."
        )


def _checkpoint(cfg: DictConfig) -> str | None:
    """Returns the checkpoint that `ckpt_path` names, by itself or by its run."""
    if not cfg.ckpt_path:
        return None
    return find_checkpoint(cfg.ckpt_path, Path(cfg.output_dir), not is_in_sweep())


def build_module(cfg: DictConfig, engine: Engine | None = None) -> SplitLightningModule:
    """Builds the module, with initial weights if the configuration has them.

    Args:
        cfg: The configuration.
        engine: Computes; `None`: all parties in this process.
    """
    given: dict[str, Any] = {"engine": engine}
    if cfg.model.weights and not cfg.ckpt_path:  # a checkpoint has the weights
        given["network"] = instantiate(cfg.module.network, _convert_="all")
        weights, exclude = cfg.model.weights, list(cfg.model.weights_exclude)
        load_weights(given["network"], weights, exclude)
    return new_module(cfg, **given)


def new_module(cfg: DictConfig, **given: Any) -> SplitLightningModule:
    """Builds the module as it is before any training.

    Args:
        cfg: The configuration.
        given: Arguments of the module, instead of those in the configuration.
    """
    if cfg.module.get("client_networks") is not None:
        size = cfg.data.image_size
        given["image_shape"] = (cfg.data.in_channels, size, size)
    given.setdefault("engine", None)
    module: SplitLightningModule = instantiate(cfg.module, _convert_="all", **given)
    plain: Any = OmegaConf.to_container(cfg.module, resolve=True)
    shape = {k: v for k, v in given.items() if k == "image_shape"}
    module.configuration = {**plain, **shape, "engine": None}
    return module


def metadata_of(cfg: DictConfig, data: SplitDataModule) -> dict[str, str]:
    """Returns what a reader of saved weights must know."""
    network = OmegaConf.to_container(cfg.module.network, resolve=True)
    return {
        "network": str(cfg.module.network["_target_"]),
        "network_options": json.dumps(network),
        "cut_layer": ",".join(map(str, cfg.topology.cut_layers or ())),
        "classes": ",".join(data.classes),
        "split_lightning": split_lightning.__version__,
        "torch": str(torch.__version__),
    }


def choose_threads(
    cfg: DictConfig, module: SplitLightningModule, data: SplitDataModule
) -> None:
    """Sets the number of threads by the size of the network, and reports it."""
    work = work_of(module.stages(), module.fed(data.example()))
    flops = cfg.batch_size * sum(own.forward + own.backward for own in work)
    rank_zero_info(set_threads(cfg.threads, flops))


def _is_wanted(
    callback: pl.Callback,
    options: DictConfig,
    data: Any,
    protocol: Protocol,
    is_here: bool,
) -> bool:
    """Returns whether the callback has anything to do under this Trainer and data."""
    if isinstance(callback, LOOK_AT_CLIENTS) and not is_here:
        return False
    if isinstance(callback, DriftMonitor):
        if "server" in callback.parties and not protocol.sequential:
            raise ValueError(
                "Expected `callbacks.drift.server` to be false where clients do not "
                f"train one server in turn ({type(protocol).__name__}), but got true."
            )
        return protocol.sequential
    if isinstance(callback, ProgressBar):
        return options.enable_progress_bar is not False and not options.barebones
    if isinstance(callback, Checkpoint):
        on = options.enable_checkpointing is not False and not options.barebones
        monitor = callback.monitor if isinstance(callback, ModelCheckpoint) else None
        by_validation = (monitor or "").startswith("val/")
        validates = data.val_share > 0 and options.limit_val_batches != 0
        return on and (validates or not by_validation)
    return True
