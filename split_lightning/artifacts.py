"""What a run leaves in its folder beside TensorBoard's files and checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn


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
    try:
        save_file(state, path, metadata=dict(metadata))
    except SafetensorError as error:  # for all that the system refuses, too
        raise OSError(f"Cannot write {path}: {error}") from error


def save_results(results: Mapping[str, Any], path: Path) -> None:
    """Writes the figures of a run as JSON; what is not finite as `null`."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in results.items()
    }
    path.write_text(json.dumps(finite, indent=2, allow_nan=False) + "\n")
