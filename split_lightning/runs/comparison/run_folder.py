"""A run, read from its folder: settings, figures, rounds, and its end."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from split_lightning.runs.comparison.settings import Setting, flat_settings

if TYPE_CHECKING:
    import pandas as pd

FAILURE = "failure.json"  # left by a run of a sweep that failed
_MARKS = ("config.yaml", FAILURE)  # a folder that holds one of these is a run's
BYTES = (
    "uplink_bytes",
    "downlink_bytes",
    "handoff_bytes",
    "averaging_bytes",
    "server_averaging_bytes",
    "hop_bytes",
    "layer_bytes",
)
_FIGURES = ("test_accuracy", "test_loss", "val_accuracy", "val_loss")
_COUNTS = (
    "handoffs",
    "images",
    "seconds",
    "virtual_seconds",
    "images_per_second",
    "networks",
)

Figures = dict[str, float | None]


@dataclass(frozen=True)
class RunFolder:
    """The content of a run's folder.

    Attributes:
        path: The folder.
        name: The folder as seen from what all compared runs have in common.
        status: `finished`, `failed`, `unfinished` (running, or killed) or `unreadable`.
        history: `history.csv`, a row a round; empty where there is none.
        settings: See `flat_settings`; empty where no configuration is left.
        overrides: What was typed for this run.
        results: What `results.json` holds.
        error: Why the run failed, or why it cannot be read.
        mistake: Whether a failure was a user's mistake, not a bug.
    """

    path: Path
    name: str
    status: str
    history: pd.DataFrame
    settings: dict[str, Setting] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    mistake: bool = False

    def figures(self) -> Figures:
        """Returns the figures of the run; those of its last round if it has no others.

        `bytes` is the sum of all bytes; `rounds_done` is no setting, as `rounds` is.
        What was not measured is `None`.
        """
        last = {} if self.history.empty else dict(self.history.iloc[-1])
        found = {**last, **self.results}
        figures = {
            key: _number(found.get(key)) for key in (*_FIGURES, *BYTES, *_COUNTS)
        }
        figures["rounds_done"] = _number(found.get("rounds", found.get("round")))
        figures["bytes"] = total_bytes(found)
        return figures


def total_bytes(row: Any) -> float | None:
    """Returns all bytes of results or of a round; `None` where none were measured."""
    counts = [count for key in BYTES if (count := _number(row.get(key))) is not None]
    return sum(counts) if counts else None


def find_runs(folders: Iterable[str | Path]) -> list[RunFolder]:
    """Returns the runs in folders: runs themselves, or folders that hold runs.

    Args:
        folders: Looked through to any depth; each run comes once, `2` before `10`.

    Raises:
        ValueError: If one is no folder, or holds no run.
    """
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(
                f"Expected argument `folders` to be folders, but got {str(folder)!r}."
            )
        inside = {path.parent for mark in _MARKS for path in folder.rglob(mark)}
        paths = sorted(filter(_is_run, inside), key=_in_order)
        if not paths:
            raise ValueError(
                f"Expected argument `folders` to hold runs (folders with a "
                f"config.yaml, as split-lightning writes it), but found none in "
                f"{str(folder)!r}."
            )
        found |= dict.fromkeys(path.resolve() for path in paths)
    return [
        read_run(path, name)
        for path, name in zip(found, _names(list(found)), strict=True)
    ]


def read_run(path: Path, name: str | None = None) -> RunFolder:
    """Returns the content of a run's folder, complete or not."""
    name = path.name if name is None else name
    try:
        return _read(path, name)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        none = _history(path / "nowhere")
        return RunFolder(path, name, "unreadable", none, error=f"{path}: {error}")


def _read(path: Path, name: str) -> RunFolder:
    cfg, typed = _config(path), path / ".hydra" / "overrides.yaml"
    choices = _choices(path / ".hydra" / "hydra.yaml")
    failure, results = _json(path / FAILURE), _json(path / "results.json")
    status = "failed" if failure else "finished" if results else "unfinished"
    return RunFolder(
        path,
        name,
        status,
        _history(path / "history.csv"),
        settings={} if cfg is None else flat_settings(cfg, choices),
        overrides=list(OmegaConf.load(typed)) if typed.is_file() else [],
        results=results,
        error=str(failure.get("error", "")),
        mistake=bool(failure.get("mistake", False)),
    )


def _is_run(folder: Path) -> bool:
    """Returns whether a folder is a run's, not another with a `config.yaml`."""
    if folder.name == ".hydra":
        return False
    if any((folder / name).is_file() for name in (FAILURE, "results.json")):
        return True
    lines = (folder / "config.yaml").read_text(errors="replace").splitlines()
    return any(line.startswith("protocol:") for line in lines)


def _config(folder: Path) -> DictConfig | None:
    """Returns a run's configuration, with its interpolations if a file has them."""
    files = [folder / "config.yaml", folder / ".hydra" / "config.yaml"]
    there = [file for file in files if file.is_file()]
    if not there:  # it failed before
        return None
    best = next((file for file in there if "${" in file.read_text()), there[0])
    cfg = OmegaConf.load(best)
    return cfg if isinstance(cfg, DictConfig) else None


def _choices(file: Path) -> dict[str, str]:
    """Returns the option of each group that was chosen, as Hydra notes it."""
    if not file.is_file():
        return {}
    choices = OmegaConf.select(OmegaConf.load(file), "hydra.runtime.choices")
    return {str(group): str(option) for group, option in (choices or {}).items()}


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text()) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds no figures.")
    return content


def _history(file: Path) -> pd.DataFrame:
    import pandas as pd

    if not file.is_file() or not file.stat().st_size:
        return pd.DataFrame()
    rows = pd.read_csv(file, on_bad_lines="skip").apply(pd.to_numeric, errors="coerce")
    return rows.dropna(subset="round")


def _number(value: Any) -> float | None:
    """Returns a finite number, or `None` where there is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _in_order(path: Path) -> list[tuple[int, int | str]]:
    """Sorts `2` before `10`."""
    words = re.split(r"(\d+)", str(path))
    return [(0, int(word)) if word.isdigit() else (1, word) for word in words]


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns each path as seen from the folder that all have in common."""
    if len(paths) < 2:
        return [path.name for path in paths]
    parts = [path.parts for path in paths]
    levels = enumerate(zip(*parts, strict=False))
    shortest = min(len(part) for part in parts) - 1  # of a run that holds another
    same = next((i for i, level in levels if len(set(level)) > 1), shortest)
    return ["/".join(part[same:]) for part in parts]
