"""A finished run's folder, read: configuration, figures, trained network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from split_lightning.classifier import Classifier
from split_lightning.config import TrainConfig
from split_lightning.models.weights import differences, listed, read_state, read_torch


def read_config(folder: str | Path) -> DictConfig:
    """Returns a run's configuration, with its types and its references (`${seed}`).

    Raises:
        ValueError: If there is no such folder, or it is no run's.
    """
    file = Path(folder).expanduser() / "config.yaml"
    if not file.is_file():
        raise ValueError(
            "Expected argument `run` to be the folder of a run, such as "
            f"runs/digits/2026-01-31_12-00-00-000000, but {_absence(file)}."
        )
    try:
        found = OmegaConf.load(file)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, DictConfig) or "datamodule" not in found:
        raise ValueError(f"Expected {file} to be the configuration of a run.")
    schema = OmegaConf.structured(TrainConfig)
    OmegaConf.set_struct(schema, False)  # a run may have keys of its own
    return cast("DictConfig", OmegaConf.merge(schema, found))


def read_results(folder: str | Path) -> dict[str, Any]:
    """Returns the figures that a run ended with.

    Raises:
        ValueError: If it has not ended, or the file is torn.
    """
    file = Path(folder).expanduser() / "results.json"
    if not file.is_file():
        raise ValueError(f"Expected a run that has ended, but {_absence(file)}.")
    try:
        results: dict[str, Any] = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return results


def load_run(folder: str | Path, checkpoint: str | None = None) -> Classifier:
    """Returns the trained module of a run, from its folder alone, in eval mode.

    Args:
        folder: The run's folder.
        checkpoint: `best` or `last`, or a checkpoint's file; `None`: the final weights.

    Raises:
        ValueError: If something is missing or torn, or does not fit.

    Example::

        module = load_run("runs/digits/2026-01-31_12-00-00-000000")
        logits = module(images)  # normalised as in training
    """
    module = rebuild_module(read_config(folder))
    restore(module, folder, checkpoint)
    return module.eval()


def rebuild_module(cfg: DictConfig) -> Classifier:
    """Builds the module of a run again, at a random start."""
    module: Classifier = instantiate(cfg.protocol.module, _convert_="all")
    return module


def restore(module: Classifier, folder: str | Path, checkpoint: str | None) -> None:
    """Puts the trained weights of a run in place.

    Raises:
        ValueError: If a file is missing or torn, or does not fit.
    """
    folder = Path(folder).expanduser()
    if checkpoint is not None:
        file = checkpoint_file(folder, checkpoint)
        _put(module, _state_of(file), file)
        return
    for name, segment in module.segments().items():
        file = folder / f"{name}.safetensors"
        if not file.is_file():
            raise ValueError(
                f"Expected a run that has ended, but {_absence(file)}. A checkpoint of "
                "it is named with checkpoint=last."
            )
        _put(segment, read_state(file), file)


def checkpoint_file(folder: Path, checkpoint: str) -> Path:
    """Returns the file of a checkpoint that is named as in the folder, or by its path.

    Raises:
        ValueError: If there is none.
    """
    kept = folder / "checkpoints"
    for file in (kept / f"{checkpoint}.ckpt", Path(checkpoint).expanduser()):
        if file.is_file():
            return file
    names = ", ".join(sorted(path.stem for path in kept.glob("*.ckpt"))) or "none"
    raise ValueError(
        f"Expected argument `checkpoint` to be a checkpoint of {folder} (it has: "
        f"{names}) or a file, but got {checkpoint!r}."
    )


def _state_of(file: Path) -> dict[str, Tensor]:
    content = read_torch(file)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"Expected {file} to be a checkpoint of a run.")
    return state


def _put(module: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    if wrong := differences(module, state):
        raise ValueError(
            f"The weights in {file} do not fit the network and the cut of config.yaml: "
            f"{listed(text for _, text in wrong)}. They are of another run, or "
            "`model` was changed."
        )
    module.load_state_dict(state)


def _absence(file: Path) -> str:
    """Says what is not there: the folder, or the file in it."""
    if file.parent.is_dir():
        return f"{file.parent} has no {file.name}"
    return f"there is no folder {str(file.parent)!r}"
