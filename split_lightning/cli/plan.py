"""Prints a round's plan: `python -m split_lightning.plan [KEY=VALUE ...]`.

It lists the actions, the bytes that they send, and the virtual seconds. Nothing is
trained.
"""

from __future__ import annotations

from collections.abc import Sequence

from split_lightning.cli.run_command import Command, ending_with_one_line, typed_words

COMMAND = Command(
    name="plan",
    folder="plan",
    keys={"round": 1, "csv": None},
    reads=(
        "experiment",
        "seed",
        "rounds",
        "datamodule",
        "module",
        "protocol",
        "system.clock",
        "trainer.precision",
    ),
    help="""Prints the plan of a round: its actions, the bytes of each, and totals.

Nothing is trained; the data are loaded and partitioned as in training. With a system
(system=lan) the plan has virtual seconds, too.

round=NUMBER        the round, from 1 (default: 1); the rounds before it are counted
                    in a second column of the totals
csv=FILE            writes all actions to a file; the terminal shows about 50
+experiment=NAME    the keys of an experiment
KEY=VALUE           a key of training: protocol=fedavg, num_clients=9, system=lan""",
    usage="[KEY=VALUE ...]",
)


def main(words: Sequence[str] | None = None) -> None:
    """Prints the plan of a round.

    Args:
        words: What is typed, such as `["protocol=fedavg", "system=lan"]`; `None`: from
            the command line.
    """
    words = typed_words(COMMAND) if words is None else list(words)
    with ending_with_one_line(words):
        from split_lightning.cli.planned_round import compose_plan, planned_round
        from split_lightning.runs.plan_report import report_plan  # these are slow

        cfg = compose_plan(COMMAND, words)
        report_plan(planned_round(cfg), cfg.csv)
