"""The files of a run apart from TensorBoard's files and checkpoints."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save
from torch import Tensor, nn

from split_lightning.paths import path_of

_RESOLVER = re.compile(r"\$\{\s*[\w.]+\s*:")  # `${hydra:...}`, `${now:...}`


def make_folder(output_dir: str) -> Path:
    """Returns a folder that can be written to; makes it where there is none.

    Raises:
        ValueError: If it cannot be written to.
    """
    folder = path_of(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            "Expected argument `output_dir` to be a folder that can be written to, "
            f"but: {error}. Name another one with output_dir=FOLDER."
        ) from error
    return folder


def save_segment(segment: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes the parameters and buffers of a segment as safetensors.

    Args:
        segment: The segment, or a whole network.
        path: The file to write.
        metadata: What a reader must know: network, cut layer, classes, versions.

    Raises:
        OSError: If the file cannot be written.
    """
    state = {
        name: tensor.detach().cpu().contiguous().clone()  # tied ones apart
        for name, tensor in segment.state_dict().items()
    }
    save_tensors(state, path, metadata)


def save_tensors(
    state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]
) -> None:
    """Writes tensors as safetensors, in one step.

    The library's own `save_file` leaves a file that no other user can read.

    Raises:
        OSError: If the file cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(save(dict(state), metadata=dict(metadata)))
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def save_config(cfg: DictConfig, path: Path) -> None:
    """Writes the configuration of a run so that it can be changed and read anywhere.

    References to other keys (`${seed}`) stay; the run's folder, and all that asks
    Hydra, the clock or the environment (`${now:...}`), is written as it was in the run.
    """
    plain = _without_resolvers(OmegaConf.to_container(cfg, resolve=False), cfg)
    plain["output_dir"] = str(cfg.output_dir)
    OmegaConf.save(plain, path)


def _without_resolvers(node: Any, cfg: DictConfig, key: str = "") -> Any:
    """Returns a part of a plain configuration with the resolvers' results in place."""
    if isinstance(node, dict):
        inner = f"{key}." if key else ""
        return {k: _without_resolvers(v, cfg, f"{inner}{k}") for k, v in node.items()}
    if isinstance(node, list):
        return [_without_resolvers(v, cfg, f"{key}[{i}]") for i, v in enumerate(node)]
    if not isinstance(node, str) or not _RESOLVER.search(node):
        return node
    value = OmegaConf.select(cfg, key)
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    return value


def save_results(results: Mapping[str, Any], path: Path) -> None:
    """Writes the figures of a run as JSON; non-finite ones as `null`."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in results.items()
    }
    path.write_text(json.dumps(finite, indent=2, allow_nan=False) + "\n")
