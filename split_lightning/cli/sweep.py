"""Sweeps: a run that fails does not end the others; a comparison ends them."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from split_lightning.cli.config import direction_of
from split_lightning.cli.user_errors import UserMistake, is_in_sweep, refuse
from split_lightning.typed_words import shell_line

if TYPE_CHECKING:
    from split_lightning.runs.comparison import RunFolder

# The folders of the sweeps that this process has begun: Hydra builds the callback and
# keeps it to itself, and tells it of no end but a good one.
_begun: list[Path] = []


class SweepComparison(Callback):
    """Ends a sweep with a comparison of its runs: `hydra.callbacks`."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Stops a search in the wrong direction; notes where the sweep's runs go."""
        wanted = direction_of(config.metric)
        direction = OmegaConf.select(config, "hydra.sweeper.direction")
        if direction is not None and _name(direction) != wanted:
            refuse(
                f"Expected `hydra.sweeper.direction` to be {wanted}, as "
                f"`metric={config.metric}` asks for, but got {_name(direction)}."
            )
        _begun.append(Path(config.hydra.sweep.dir))


@contextmanager
def ending_with_comparison() -> Iterator[None]:
    """Compares the runs of a sweep inside the block, however it ends.

    Raises:
        SystemExit: If runs failed: with status 2 if all by a user's mistake, or else 1.
    """
    _begun.clear()
    try:
        yield
    finally:
        failed = [run for folder in _begun for run in _compared(folder)]
    if failed:
        raise SystemExit(2 if all(run.mistake for run in failed) else 1)


def attempt(run: Callable[[DictConfig], float | None], cfg: DictConfig) -> float | None:
    """Runs a job; in a sweep its failure is written to its folder, and no other ends.

    A sweeper that searches (Optuna) is told of a failure by the value `None`, which it
    counts as a failed trial; or by the exception, so that its `max_failure_rate` holds,
    where one was chosen.

    Args:
        run: Returns the value to search by.
        cfg: The job's configuration.
    """
    if not is_in_sweep():
        return run(cfg)
    settings = HydraConfig.get()
    from split_lightning.runs.comparison.run_folder import FAILURE

    record = Path(settings.runtime.output_dir) / FAILURE
    record.unlink(missing_ok=True)  # of an earlier sweep in the same folder
    try:
        value = run(cfg)
        if settings.sweeper.get("direction") is not None:
            _check_finite(value, cfg.metric)
    except Exception as error:
        _leave_failure(error, record)
        if _has_failure_rate(settings):
            raise
        return None
    return value


def _check_finite(value: float | None, metric: str) -> None:
    """Stops a trial without a value; Optuna's plugin ends the study at a NaN."""
    if value is None or not math.isfinite(value):
        raise UserMistake(
            f"Expected `metric={metric}` to be a finite number, to search by, but got "
            f"{'no value' if value is None else value}."
        )


def _has_failure_rate(settings: HydraConf) -> bool:
    """Returns whether `max_failure_rate` was chosen; Optuna's own is 0."""
    typed = (word.partition("=")[0] for word in settings.overrides.hydra)
    is_typed = "hydra.sweeper.max_failure_rate" in typed
    return bool(settings.sweeper.get("max_failure_rate")) or is_typed


def _leave_failure(error: Exception, record: Path) -> None:
    """Writes why a job failed to its folder, and prints it: a bug with its trace."""
    mistake = isinstance(error, UserMistake)
    message = str(error) if mistake else f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    print(f"split-lightning: error: {message}", file=sys.stderr)
    if not mistake:
        print(trace, file=sys.stderr)
    left = {"error": message, "mistake": mistake, "trace": trace}
    record.write_text(json.dumps(left, indent=2) + "\n")


def _compared(folder: Path) -> list[RunFolder]:
    """Compares the runs of a sweep, names those that failed, and returns these."""
    from split_lightning.runs.comparison import compare, find_runs

    try:
        runs = find_runs([folder])
    except ValueError:  # it ended before a run had begun
        return []
    compare(runs, folder)
    failed = [run for run in runs if run.status == "failed"]
    for run in failed:
        words = shell_line(*run.overrides)
        print(f"failed: {words}\n  {run.error}\n  {run.path}", file=sys.stderr)
    return failed


def _name(direction: Any) -> str:
    """Returns a direction as it is typed; Optuna's own default is an enumeration."""
    return str(getattr(direction, "name", direction))
