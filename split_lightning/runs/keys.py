"""Keys of a plain configuration: paths such as `optimizer.client.lr`."""

from __future__ import annotations

import re
from typing import Any

from omegaconf import MISSING


def value_at(node: Any, key: str) -> Any:
    """Returns the value of a key, or `MISSING` if there is no such key.

    >>> value_at({"data": {"mean": [0.5, 0.4]}}, "data.mean[1]")
    0.4
    """
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(node, list):
            node = {str(i): item for i, item in enumerate(node)}
        node = node.get(part, MISSING) if isinstance(node, dict) else MISSING
    return node


def is_within(key: str, other: str) -> bool:
    """Returns whether a key is another one, or a part of what that holds.

    >>> is_within("data.mean[0]", "data"), is_within("database", "data")
    (True, False)
    """
    return re.match(rf"{re.escape(other)}($|[.\[])", key) is not None
