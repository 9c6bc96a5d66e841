"""Prints the costs of each cut: `python -m split_lightning.cuts [KEY=VALUE ...]`.

Prints a table of the layers after which the configured network can be cut, and writes
`cuts.csv` and `cuts.png`. It needs no data set where the configuration has the shape of
a sample; else (`data=custom`) it loads the source.
"""

from __future__ import annotations

from collections.abc import Sequence

from split_lightning.cli.run_command import Command, ending_with_one_line, typed_words

COMMAND = Command(
    name="cuts",
    folder="cuts",
    keys={"depth": None},
    reads=(
        "experiment",
        "model.network",
        *(f"data.{key}" for key in ("in_channels", "image_size", "num_classes")),
    ),
    help="""Prints what each cut of a network costs the client, the server and the link.

model=NAME          the network, as in training; or model.network._target_=...
data=NAME           the data set, for the shape of its samples: it is not loaded,
                    except with data=custom
+experiment=NAME    the network and the data set of an experiment
depth=NUMBER        the most parts of a layer's path (layer1.0 has two), or all;
                    default: the smallest number that leaves eight cuts
output_dir=FOLDER   where cuts.csv and cuts.png go; default: cuts/NETWORK-SHAPE
KEY=VALUE           a key of training: data.image_size=64, data.num_classes=100""",
    usage="[KEY=VALUE ...]",
)


def main(words: Sequence[str] | None = None) -> None:
    """Prints and writes the costs of each cut.

    Args:
        words: What is typed, such as `["model=resnet18", "data=cifar10"]`; `None`: from
            the command line.
    """
    words = typed_words(COMMAND) if words is None else list(words)
    with ending_with_one_line(words):
        from split_lightning.cli.measured_cuts import compose_cuts, measured_cuts
        from split_lightning.runs.artifacts import make_folder  # these are slow
        from split_lightning.runs.cut_report import report_costs

        cfg, sample = compose_cuts(COMMAND, words)
        costs = measured_cuts(cfg, sample)
        report_costs(costs, make_folder(cfg.output_dir))
