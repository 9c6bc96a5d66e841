"""Computes for a client of a run: `python -m split_lightning.client --id NUMBER`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from split_lightning.cli.run_command import Command, ending_with_one_line
from split_lightning.cli.threads import wait_passively
from split_lightning.paths import import_from_working_folder

COMMAND = Command(
    name="client",
    folder="client",
    keys={},
    reads=(),
    help="""Computes for one client, until the server ends the run.

The keys are those of the server's run; the data and the folder are the client's own.

engine.server=HOST:PORT        the server
engine.certificates=FOLDER     the client's certificate, key and authority
engine.folder=FOLDER           where the client saves its state, to survive a restart
KEY=VALUE                      a key of training""",
)


def main(words: Sequence[str] | None = None) -> None:
    """Computes for a client, until the server ends the run.

    Args:
        words: What is typed; `None`: from the command line.
    """
    wait_passively()
    import_from_working_folder()
    parser = argparse.ArgumentParser(
        prog="python -m split_lightning.client",
        usage="%(prog)s --id NUMBER [KEY=VALUE ...]",
        description=COMMAND.help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--id", required=True, help="the client's number, from 0")
    parser.add_argument("--config", help="a file with all keys, in place of defaults")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with ending_with_one_line(options.words):
        from split_lightning.cli.client_site import compose_client, serve

        serve(compose_client(options.config, options.words), options.id)
