"""Groups of the configuration: an option of a group is a file in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from split_lightning.cli.config import conf_folder
from split_lightning.cli.config_keys import keys_of
from split_lightning.runs.keys import value_at


def options_with(key: str, plain: Any) -> Iterator[str]:
    """Yields the options that have a key, of groups from which one can be chosen.

    Args:
        key: The key, such as `protocol.every`.
        plain: The composed configuration, which lacks it. A group inside of another
            has a choice there if it holds something (`topology/parts`).

    >>> list(options_with("protocol.server_passes", {}))
    ['protocol=cyclesl']
    """
    parts = key.split(".")
    for depth in range(1, len(parts)):
        place, inner = ".".join(parts[:depth]), ".".join(parts[depth:])
        if depth > 1 and not value_at(plain, place):
            return
        group = place.replace(".", "/")
        for file in sorted(Path(conf_folder(), group).glob("*.yaml")):
            content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
            if inner in keys_of(content):
                yield f"{group}={file.stem}"
