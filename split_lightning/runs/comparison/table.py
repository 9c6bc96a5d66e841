"""Runs as tables of pandas: one row a run, a group of seeds, or a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from split_lightning.runs.comparison.run_folder import RunFolder, total_bytes
from split_lightning.runs.comparison.settings import differing_settings, shown

if TYPE_CHECKING:
    import pandas as pd

SEED = "seed"
_DATA = ("data", "data/partitioner")


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        keys: The settings in which the runs differ.
        common: The data set and the partition, where all runs have the same.
        runs: A row for each run: name, status, what was typed, settings, figures, error
            and folder; `group` numbers the groups.
        groups: A row for each group of runs that differ only in their seed:
            settings, means of the figures, and sample standard deviations (divisor
            n - 1) with the suffix `_std`. A figure that one run lacks is missing.
        shown: The settings of each group, as tables and legends show them.
        rounds: A row for each round of each run, with its `group` and `bytes`.
    """

    keys: list[str]
    common: str
    runs: pd.DataFrame
    groups: pd.DataFrame
    shown: pd.DataFrame
    rounds: pd.DataFrame

    def names(self) -> pd.Series:
        """Returns each group's name: its first run's, and how many others: `0 +2`."""
        names = self.runs.groupby("group")["run"].agg(["first", "size"])
        others = " +" + (names["size"] - 1).astype(str)
        return names["first"] + others.where(names["size"] > 1, "")


def compared(found: Sequence[RunFolder]) -> Comparison:
    """Returns runs side by side.

    A run that failed, or has not finished, is in no group with those that did; nor are
    two runs of the same seed in one, as neither adds to what the other says.
    """
    import pandas as pd

    keys = differing_settings([run.settings for run in found])
    about = [
        {"run": r.name, "status": r.status, "overrides": " ".join(r.overrides)}
        for r in found
    ]
    values = [{key: _plain(run, key) for key in keys} for run in found]
    ends = [{"error": run.error, "folder": str(run.path)} for run in found]
    figures = pd.DataFrame([run.figures() for run in found], dtype=float)
    settings = pd.DataFrame(values, index=figures.index, columns=keys, dtype=object)
    frames = [pd.DataFrame(about), settings, figures, pd.DataFrame(ends)]
    runs = pd.concat(frames, axis=1)
    runs["group"] = _group_numbers(found, runs, [k for k in keys if k != SEED])
    common = [shown(found[0].settings, k) for k in _DATA if k not in keys]
    return Comparison(
        keys,
        ", ".join(filter(None, common)),
        runs,
        _groups(runs, keys, list(figures)),
        _shown(found, runs["group"], keys),
        _rounds(found, runs["group"]),
    )


def _plain(run: RunFolder, key: str) -> object:
    """Returns a setting in full; a missing one is empty, and no value is `null`."""
    value = run.settings[key].value if key in run.settings else ""
    return "null" if value is None else value


def _group_numbers(
    found: Sequence[RunFolder], runs: pd.DataFrame, keys: list[str]
) -> pd.Series:
    same = runs[["status", *keys]].astype(str)
    same["alone"] = ["" if run.settings else str(run.path) for run in found]
    with_seed = same.assign(own_seed=[str(_plain(run, SEED)) for run in found])
    same["again"] = with_seed.groupby(list(with_seed)).cumcount()
    return same.groupby(list(same), sort=False).ngroup()


def _groups(runs: pd.DataFrame, keys: list[str], figures: list[str]) -> pd.DataFrame:
    import pandas as pd

    by_group = runs.groupby("group")
    about = by_group.agg(
        runs=("run", " ".join), num_runs=("run", "size"), status=("status", "first")
    )
    settings = by_group[keys].nth(0).set_axis(about.index)
    if SEED in keys:
        settings[SEED] = by_group[SEED].agg(lambda seeds: ",".join(map(str, seeds)))
    numbers = by_group[figures]
    complete = numbers.count().eq(about["num_runs"], axis=0)
    spread = numbers.std().where(complete).add_suffix("_std")
    return pd.concat([about, settings, numbers.mean().where(complete), spread], axis=1)


def _shown(
    found: Sequence[RunFolder], group: pd.Series, keys: list[str]
) -> pd.DataFrame:
    import pandas as pd

    rows = [[shown(run.settings, key) for key in keys] for run in found]
    by_group = pd.DataFrame(rows, columns=keys, index=group.index).groupby(group)
    settings = by_group.nth(0).set_axis(by_group.size().index)
    if SEED in keys:
        settings[SEED] = by_group[SEED].agg(",".join)
    return settings


def _rounds(found: Sequence[RunFolder], group: pd.Series) -> pd.DataFrame:
    import pandas as pd

    frames = [
        run.history.assign(
            bytes=[total_bytes(row) for row in run.history.to_dict("records")],
            group=number,
        )
        for run, number in zip(found, group, strict=True)
        if len(run.history)
    ]
    columns = ["round", "val_accuracy", "bytes", "group"]
    return pd.concat(frames) if frames else pd.DataFrame(columns=columns, dtype=float)
