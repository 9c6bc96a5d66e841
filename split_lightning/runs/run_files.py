"""A run's files, read: its configuration and its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf

from split_lightning.paths import absence, path_of
from split_lightning.runs.schema import TrainConfig


def read_config(folder: str | Path) -> DictConfig:
    """Returns a run's configuration, with its types and its references (`${seed}`).

    Raises:
        ValueError: If there is no such folder, or it is no run's.
    """
    file = path_of(folder) / "config.yaml"
    if not file.is_file():
        raise ValueError(
            "Expected argument `run` to be the folder of a run, such as "
            f"runs/digits/2026-01-31_12-00-00-000000, but {absence(file)}."
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
        ValueError: If it has not ended, or the file is damaged.
    """
    file = path_of(folder) / "results.json"
    if not file.is_file():
        raise ValueError(f"Expected a run that has ended, but {absence(file)}.")
    try:
        results: dict[str, Any] = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return results
