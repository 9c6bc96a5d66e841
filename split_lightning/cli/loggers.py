"""Loggers: built from a configuration, given a run's choices, and closed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import loggers as lightning
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from split_lightning.runs.checkpoints import next_step

# The extra of this package that brings what a logger needs.
_EXTRAS = {"MLFlowLogger": "mlflow", "WandbLogger": "wandb"}


def build_loggers(cfg: DictConfig, checkpoint: str | None = None) -> list[Logger]:
    """Builds the loggers of a configuration; those that are null are left out.

    Args:
        cfg: The run's configuration; `logger` holds loggers by name.
        checkpoint: The checkpoint that the run resumes from. TensorBoard then hides
            what an earlier run logged after it.

    Raises:
        ValueError: If an entry is no logger, or its package is not installed.
    """
    entries = (cfg.logger or {}).items()
    return [_built(str(k), v, checkpoint) for k, v in entries if v is not None]


def _built(name: str, node: Any, checkpoint: str | None) -> Logger:
    target = str(node.get("_target_")) if OmegaConf.is_dict(node) else ""
    given = _given(node, target, checkpoint)
    try:
        logger = instantiate(node, _convert_="all", **given) if target else node
    except InstantiationException as error:
        extra = _EXTRAS.get(target.rpartition(".")[2])
        if extra is None or not isinstance(error.__cause__, ImportError):
            raise
        raise ValueError(
            f"`logger={name}` needs a package that is not installed: "
            f'pip install "split-lightning[{extra}]".'
        ) from error
    if not isinstance(logger, Logger):
        raise ValueError(
            f"Expected `logger.{name}` to be an object whose `_target_` is one of "
            f"Lightning's loggers, but got {node!r}."
        )
    return logger


def _given(node: Any, target: str, checkpoint: str | None) -> dict[str, Any]:
    """Returns the arguments that a logger needs besides the configured ones."""
    if checkpoint and target.endswith(".TensorBoardLogger"):
        return {"purge_step": next_step(checkpoint)}
    if target.endswith(".MLFlowLogger") and not node.get("artifact_location"):
        kind, _, file = str(node.get("tracking_uri")).partition(":///")
        if kind == "sqlite":  # else MLflow makes a folder where the command was typed
            return {"artifact_location": Path(file).resolve().with_suffix("").as_uri()}
    return {}


@rank_zero_only
def log_choices(loggers: Iterable[Logger], choices: Mapping[str, Any]) -> None:
    """Gives the choices of a run to its loggers, before it begins."""
    for logger in loggers:
        logger.log_hyperparams(dict(choices))


@rank_zero_only
def end_logs(
    loggers: Iterable[Logger], choices: Mapping[str, Any], tags: Iterable[str]
) -> None:
    """Ends the logs of a run that has finished.

    TensorBoard's table of hyperparameters gets its row only now: before, it would have
    no metrics.

    Args:
        loggers: The run's loggers.
        choices: Its choices, by name.
        tags: The metrics beside them, by the tags under which they were logged.
    """
    from torch.utils.tensorboard.summary import hparams

    for logger in loggers:
        if isinstance(logger, lightning.TensorBoardLogger):
            # `log_hyperparams` with metrics would log each a second time.
            writer = logger.experiment._get_file_writer()
            metrics = dict.fromkeys(tags, 0.0)
            for summary in hparams(dict(choices), metrics):  # type: ignore[no-untyped-call]
                writer.add_summary(summary)
        logger.finalize("success")


@rank_zero_only
def close_loggers(loggers: Iterable[Logger]) -> None:
    """Closes W&B's run, which the next run of this process would continue."""
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        wandb.finish()
