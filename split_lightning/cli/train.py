"""Trains one run: `python -m split_lightning.train [KEY=VALUE ...]`.

`--help` lists the groups and keys; experiments are in `conf/experiment`. Torch and
Lightning, which take seconds, are imported after the configuration is checked.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import hydra
from omegaconf import DictConfig

import split_lightning
from split_lightning.cli.choices import choice_of
from split_lightning.cli.config import (
    check_classes,
    check_values,
    conf_folder,
    typed_overrides,
)
from split_lightning.cli.data_shape import leave_out_shape
from split_lightning.cli.engine_keys import check_server, leave_out_source
from split_lightning.cli.run_folder import (
    anchor_paths,
    no_folder_if_refused,
    one_folder_for_all_processes,
)
from split_lightning.cli.sweep import attempt, ending_with_comparison
from split_lightning.cli.threads import wait_passively
from split_lightning.cli.user_errors import is_in_sweep, one_message, run_hydra
from split_lightning.paths import import_from_working_folder


@hydra.main(version_base="1.3", config_path=conf_folder(), config_name="train")
def _hydra_main(cfg: DictConfig) -> float | None:
    return attempt(main, cfg)


def main(cfg: DictConfig | None = None) -> float | None:
    """Trains one run.

    Args:
        cfg: The composed configuration; `None`: from the command line.

    Returns:
        The value of the metric that the configuration names (`metric`), for sweepers;
        `None` where it was not measured, and from the command line.
    """
    if cfg is None:
        if "--version" in sys.argv[1:]:
            print(f"split_lightning {split_lightning.__version__}")
            return None
        run_command_line(_hydra_main)
        return None
    with no_folder_if_refused():
        with one_message():
            leave_out_source(cfg)
            check_values(cfg, typed_overrides())
            _say_what_begins(cfg)
            leave_out_shape(cfg)
            check_classes(cfg)
            anchor_paths(cfg)
            check_server(cfg, typed_overrides(), is_in_sweep())
        from split_lightning.cli.training import train  # torch and Lightning

        metric: float | None = train(cfg).get(cfg.metric.replace("/", "_"))
    return metric


def run_command_line(hydra_main: Callable[[], Any]) -> None:
    """Runs a Hydra application that trains, with what was typed."""
    wait_passively()
    with ending_with_comparison():
        import_from_working_folder()
        one_folder_for_all_processes()
        run_hydra(hydra_main, conf_folder())


def _say_what_begins(cfg: DictConfig) -> None:
    """Prints one line, before seconds go into importing torch."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        counts = (
            f"{number:,} {word}{'' if number == 1 else 's'}"
            for word, number in (("client", cfg.num_clients), ("round", cfg.rounds))
        )
        version = split_lightning.__version__
        what = f"{choice_of(cfg, 'protocol')} on {choice_of(cfg, 'data')}"
        text = f"split_lightning {version}: {what}, {', '.join(counts)}"
        print(f"{text}, seed {cfg.seed}", flush=True)
