"""Tests a finished run again: `python -m split_lightning.evaluate run=FOLDER`.

The network is rebuilt from the run's folder alone. Further words change keys of the
run's own configuration, as in training: `data.root=...`, `trainer.accelerator=...`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from split_lightning.cli.run_command import (
    TRAINER_KEYS,
    Command,
    compose_run,
    ending_with_one_line,
    typed_words,
    with_run_key,
)

COMMAND = Command(
    name="evaluate",
    folder="evaluation",
    keys={"checkpoint": None, "client": None},
    reads=(
        "threads",
        *(f"trainer.{key}" for key in TRAINER_KEYS),
        *(f"datamodule.{key}" for key in ("source", "batch_size", "mean", "std")),
        *(f"module.{key}" for key in ("network", "cut_layer", "num_classes")),
        *(f"module.{key}" for key in ("criterion", "channels_last")),
    ),
    help="""Tests a finished run again, from its folder alone.

FOLDER              the run's folder, as the first word; or run=FOLDER, anywhere
checkpoint=best     best, last, or a checkpoint's file, instead of the final weights
client=ID           the client whose network is tested, where clients have networks of
                    their own; default: all, for the mean over their networks
output_dir=FOLDER   where the results go; default: evaluation, in the run's folder
KEY=VALUE           changes the run's configuration: data.root=..., batch_size=...,
                    trainer.accelerator=..., trainer.limit_test_batches=...""",
)


def main(words: Sequence[str] | None = None) -> None:
    """Tests a run; prints the figures of training and those of each class.

    Args:
        words: The typed words, such as `["run=runs/digits/..."]`; `None`: from the
            command line.
    """
    words = with_run_key(typed_words(COMMAND) if words is None else words)
    with ending_with_one_line(words):
        cfg = compose_run(COMMAND, words)
        from split_lightning.cli.rebuilding import evaluate  # these are slow
        from split_lightning.runs.evaluation import print_evaluation

        results, figures = evaluate(cfg, cfg.run, cfg.checkpoint, cfg.client)
        print_evaluation(results, figures, Path(cfg.output_dir))
