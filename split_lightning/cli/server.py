"""Trains with clients at other sites: `python -m split_lightning.server`.

It is `train` with `engine=grpc` and an address to listen at.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from split_lightning.cli import train
from split_lightning.cli.config import conf_folder
from split_lightning.cli.engine_keys import require_listen, with_grpc
from split_lightning.cli.run_folder import no_folder_if_refused
from split_lightning.cli.sweep import attempt
from split_lightning.cli.user_errors import one_message, refuse

_HELP = """\
usage: python -m split_lightning.server [KEY=VALUE ...]

Trains with clients at other sites: as `train engine=grpc`, for one run.

It waits for a client of each number, from 0 to num_clients - 1. They learn the keys
from it that decide how all train.

engine.listen=HOST:PORT      where clients reach it, such as 0.0.0.0:8443
engine.certificates=FOLDER   the server's certificate and key, from
                             `split-lightning certificates`
+experiment=NAME             the keys of an experiment
KEY=VALUE                    a key of training, as `train --help` lists them"""


@hydra.main(version_base="1.3", config_path=conf_folder(), config_name="train")
def _hydra_main(cfg: DictConfig) -> float | None:
    return attempt(_serve, cfg)


def main() -> None:
    """Trains one run with what was typed on the command line."""
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(_HELP)
        return
    if {"-m", "--multirun"} & set(words):
        refuse(
            "A server trains one run, since its clients take part in one: leave -m "
            "out. With `split-lightning train -m engine=grpc`, each run starts its own "
            "clients on this machine."
        )
    try:
        sys.argv[1:] = with_grpc(words, "server")
    except ValueError as error:
        refuse(str(error))
    train.run_command_line(_hydra_main)


def _serve(cfg: DictConfig) -> float | None:
    """Trains one run, if it says where to listen."""
    with no_folder_if_refused(), one_message():
        require_listen(cfg)
    return train.main(cfg)
