"""Runs that differ in nothing but their seed: their means and standard deviations."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from split_lightning.comparison.run_folder import Figures, RunFolder
from split_lightning.comparison.settings import Setting, shown

SEED = "seed"


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in nothing but their seed; often one alone.

    Attributes:
        runs: At least one; all have the same status, and seeds of their own.
    """

    runs: tuple[RunFolder, ...]

    @property
    def name(self) -> str:
        """The first run's name, and how many there are beside it: `0 +2`."""
        others = len(self.runs) - 1
        return f"{self.runs[0].name} +{others}" if others else self.runs[0].name

    @property
    def status(self) -> str:
        """What all runs' `status` is."""
        return self.runs[0].status

    @property
    def settings(self) -> dict[str, Setting]:
        """The first run's settings; but for the seed, they are those of all."""
        return self.runs[0].settings

    def shown(self, key: str) -> str:
        """Returns a setting as a table shows it; of the seed, that of each run."""
        runs = self.runs if key == SEED else self.runs[:1]
        return ",".join(shown(run.settings, key) for run in runs)

    def means(self) -> Figures:
        """Returns the means of the runs' figures."""
        return _means([run.figures() for run in self.runs])

    def deviations(self) -> Figures:
        """Returns the sample standard deviations (divisor n - 1) of the figures.

        They are `None` where there is one run alone, or a run lacks the figure.
        """
        return _deviations([run.figures() for run in self.runs])

    def history(self) -> list[tuple[Figures, Figures]]:
        """Returns means and deviations of each round that all runs have done."""
        rows = [{row["round"]: row for row in run.history} for run in self.runs]
        rounds = [r for r in rows[0] if all(r in of_run for of_run in rows)]
        together = [[of_run[r] for of_run in rows] for r in rounds]
        return [(_means(figures), _deviations(figures)) for figures in together]


def grouped(runs: Iterable[RunFolder], keys: Sequence[str]) -> list[RunGroup]:
    """Returns the runs in groups that differ in nothing but their seed.

    A run that failed, or has not finished, is in no group with those that did; nor are
    two runs of the same seed in one, as neither adds to what the other tells.

    Args:
        runs: The runs.
        keys: The settings in which they differ, from `differing_settings`.
    """
    groups: dict[object, list[RunFolder]] = {}
    seen: Counter[object] = Counter()
    for run in runs:
        values = tuple(_value(run, key) for key in keys if key != SEED)
        same = (run.status, values if run.settings else run.path)
        with_seed = (same, _value(run, SEED))
        groups.setdefault((same, seen[with_seed]), []).append(run)
        seen[with_seed] += 1
    return [RunGroup(tuple(members)) for members in groups.values()]


def _value(run: RunFolder, key: str) -> str:
    return repr(run.settings[key].value) if key in run.settings else ""


def _means(figures: Sequence[Figures]) -> Figures:
    return {
        key: None if (values := _values(figures, key)) is None else _mean(values)
        for key in figures[0]
    }


def _deviations(figures: Sequence[Figures]) -> Figures:
    return {
        key: statistics.stdev(values)
        if (values := _values(figures, key)) is not None and len(values) > 1
        else None
        for key in figures[0]
    }


def _mean(values: Sequence[float]) -> float:
    return values[0] if len(values) == 1 else statistics.fmean(values)


def _values(figures: Sequence[Figures], key: str) -> list[float] | None:
    """Returns the values of a figure, or `None` if one lacks it."""
    values = [value for row in figures if (value := row.get(key)) is not None]
    return values if len(values) == len(figures) else None
