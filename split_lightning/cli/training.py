"""Training: builds what a configuration names, fits, tests, and writes the results."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from split_lightning.callbacks.checkpoint_io import FOLDER, LAST
from split_lightning.callbacks.history import History
from split_lightning.callbacks.resume_checkpoint import ResumeCheckpoint
from split_lightning.callbacks.virtual_clock import virtual_seconds
from split_lightning.cli.building import Run, build, check, metadata_of
from split_lightning.cli.choices import summary
from split_lightning.cli.config import typed_overrides
from split_lightning.cli.data_shape import fill_in
from split_lightning.cli.loggers import close_loggers, end_logs, log_choices
from split_lightning.cli.sites import clients_here
from split_lightning.cli.user_errors import Refused, is_in_sweep, one_message
from split_lightning.engines.remote import SiteAbsent, Sites
from split_lightning.runs.artifacts import save_results
from split_lightning.runs.config_file import ConfigFile
from split_lightning.runs.network_files import save_networks
from split_lightning.runs.report import print_results
from split_lightning.signals import Interrupted, interrupted_by_signals
from split_lightning.typed_words import key_value, shell_line

_MEASURED = ("accuracy", "loss")
_logger = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Trains and tests what a configuration names; returns and writes the results."""
    folder = Path(cfg.output_dir)
    composed = copy.deepcopy(cfg)  # `instantiate` resolves what it meets, in place
    end: type[SystemExit] = Refused  # until the run begins
    try:
        with interrupted_by_signals():
            run = _begin(cfg, composed, folder)
            end = SystemExit
            if cfg.engine.get("listen") is not None:
                print(f"If this server stops, continue with: {_command(folder)}")
            with one_message(lambda: run.speed.has_begun, lambda: _remedy(folder)):
                try:
                    with clients_here(cfg, run.module):
                        results = _attempt(cfg, composed, run)
                        while isinstance(results, SiteAbsent):
                            cfg = _without(results, composed, run)
                            sites = run.module.engine.sites
                            run = _begin(cfg, composed, folder, sites)
                            results = _attempt(cfg, composed, run)
                    return results
                finally:
                    run.module.engine.close()
                    close_loggers(run.trainer.loggers)
    except Interrupted as stopped:
        _say_resume(stopped, folder)
        raise end(128 + stopped.signal) from stopped


def _begin(
    cfg: DictConfig, composed: DictConfig, folder: Path, sites: Sites | None = None
) -> Run:
    """Builds a run, which writes its configuration when it begins."""
    with one_message(remedy=lambda: _remedy(folder)):
        run = build(cfg, sites)
        if run.data.ask is None:
            fill_in(composed, run.data)
    absences = run.module.engine.sites.absences
    if absences is not None and run.checkpoint is None and sites is None:
        absences.forget()  # those of a run before
    callbacks: list[pl.Callback] = run.trainer.callbacks  # type: ignore[attr-defined]
    callbacks.append(ConfigFile(composed, folder / "config.yaml"))
    return run


def _attempt(
    cfg: DictConfig, composed: DictConfig, run: Run
) -> dict[str, Any] | SiteAbsent:
    """Trains and tests a run; returns the results, or that a client is absent."""
    try:
        if run.data.ask is not None:
            run.data.setup("fit")
            check(cfg, run)
            fill_in(composed, run.data)
        results = _fit_and_test(cfg, run)
        run.module.end()
    except SiteAbsent as gone:
        return gone
    return results


def _without(gone: SiteAbsent, composed: DictConfig, run: Run) -> DictConfig:
    """Notes an absence; returns the configuration of the run that continues.

    Raises:
        SiteAbsent: If the run cannot continue without the client.
    """
    number, absences = run.trainer.current_epoch, run.module.engine.sites.absences
    if absences is None or gone.client_id in absences.of(number):
        raise gone
    _logger.warning("%s Round %d begins again without it.", gone.reason, number + 1)
    absences.note(number, [gone.client_id])
    close_loggers(run.trainer.loggers)
    cfg = copy.deepcopy(composed)
    last = Path(cfg.output_dir, FOLDER, LAST)
    cfg.ckpt_path = str(last) if last.is_file() else None
    return cfg


@rank_zero_only
def _say_resume(stopped: Interrupted, folder: Path) -> None:
    """Prints what is left of a run that was asked to stop."""
    last = folder / FOLDER / LAST
    if not last.is_file():
        print(f"\n{stopped}; there is no checkpoint to resume from.", file=sys.stderr)
        return
    kept = "" if stopped.checkpoint else f"; the last checkpoint is {last}"
    print(f"\n{stopped}{kept}\nResume with: {_command(folder)}", file=sys.stderr)


def _command(folder: Path) -> str:
    """Returns the command that resumes the run, or the sweep, of this process."""
    if not HydraConfig.initialized():
        return key_value("ckpt_path", folder)
    where = key_value("hydra.run.dir", folder)
    if is_in_sweep():
        depth = len(Path(HydraConfig.get().sweep.subdir).parts)
        where = key_value("hydra.sweep.dir", folder.parents[depth - 1])
    ours = ("ckpt_path=", "hydra.run.dir=", "hydra.sweep.dir=")
    kept = [own for own in sys.argv[1:] if not own.lstrip("+").startswith(ours)]
    # Beside the other keys: an option between keys would end them.
    keys = [n for n, own in enumerate(kept, 1) if "=" in own and own[0] != "-"]
    place = keys[-1] if keys else len(kept)
    words = [*kept[:place], where, "ckpt_path=last", *kept[place:]]
    return shell_line("python", "-m", "split_lightning.train", *words)


def _fit_and_test(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Trains and tests what was built; returns and writes the results."""
    trainer, module = run.trainer, run.module
    log_choices(trainer.loggers, summary(cfg, typed_overrides()))
    with warnings.catch_warnings():
        if run.checkpoint is not None:  # its folder has checkpoints, as it should
            warnings.filterwarnings("ignore", "Checkpoint directory .* is not empty")
        trainer.fit(
            module, datamodule=run.data, ckpt_path=run.checkpoint, weights_only=True
        )
    metrics = _kept(trainer) | _plain(trainer.callback_metrics)
    trainer.test(module, datamodule=run.data, verbose=False)
    metrics |= _plain(trainer.callback_metrics)

    results = {
        **{
            key.replace("/", "_"): value
            for key, value in metrics.items()
            if key.startswith(("test/", "val/")) or key == "train/loss"
        },
        "networks": len(module.networks.representatives()) or 1,
        **module.totals(),
        "skipped_batches": module.skipped_batches,
        "rounds": trainer.current_epoch,
        "images_per_second": run.speed.images_per_second,
        "seconds": run.speed.fit_seconds,
        **_virtual(trainer),
        "seed": cfg.seed,
        **_best(trainer),
    }
    if trainer.is_global_zero:
        write(cfg, run, results)
        print_results(results, Path(cfg.output_dir))
    return results


def _plain(metrics: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in metrics.items()}


def _kept(trainer: pl.Trainer) -> dict[str, float]:
    """Returns what a checkpoint kept, where there was nothing left to train."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ResumeCheckpoint):
            return callback.metrics
    return {}


def _remedy(folder: Path) -> str:
    """Says how to resume a run that the system stopped."""
    last = folder / FOLDER / LAST
    where = f"(The run's folder is {folder}.)"
    if not last.is_file():
        return where
    remedy = shell_line(key_value("ckpt_path", last))
    return f"{where} Resume from its last good checkpoint with {remedy}"


def _best(trainer: pl.Trainer) -> dict[str, Any]:
    """Returns the round of the highest validation accuracy, where that was measured."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        row = callback.best() if isinstance(callback, History) else None
        if row is not None:
            return {
                "best_round": row["round"],
                "best_val_accuracy": row["val_accuracy"],
            }
    return {}


def _virtual(trainer: pl.Trainer) -> dict[str, Any]:
    """Returns the virtual seconds of a run, and those to each tenth of accuracy."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, History) and virtual_seconds(trainer) is not None:
            return {
                "virtual_seconds": virtual_seconds(trainer),
                "time_to_accuracy": callback.time_to_accuracy(),
            }
    return {}


def write(cfg: DictConfig, run: Run, results: dict[str, Any]) -> None:
    """Writes the results, the networks and the hyperparameters of a run."""
    folder = Path(cfg.output_dir)
    save_results(results, folder / "results.json")
    is_apart = cfg.engine.get("listen") is not None  # each party has its own folder
    role = "server" if is_apart else None
    save_networks(run.module, folder, metadata_of(cfg, run.data), role)
    tags = [f"{part}/{name}" for part in ("test", "val") for name in _MEASURED]
    known = [tag for tag in tags if tag.replace("/", "_") in results]
    end_logs(run.trainer.loggers, summary(cfg, typed_overrides()), known)
