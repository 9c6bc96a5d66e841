"""Computes for a client of a run: `python -m split_lightning.client --id NUMBER`."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence

from split_lightning.cli.run_command import ending_with_one_line
from split_lightning.cli.threads import wait_passively
from split_lightning.paths import import_from_working_folder
from split_lightning.signals import Interrupted

_HELP = """Computes for one client, until the server ends the run.

The client takes the keys of the run from the server: options of its own configuration
and numbers, never code. What it names itself comes first. If then something differs
that must not, the server names it. The data, and all files, are the client's own.

--id NUMBER                  the client's number, from 0
engine.server=HOST:PORT      the server, such as server.example:8443
engine.certificates=FOLDER   the client's certificate and key, from
                             `split-lightning certificates`
engine.folder=FOLDER         where it saves its state, to continue after a restart;
                             default: runs/NAME/client-NUMBER
engine.patience=SECONDS      how long it waits for a server that gives no answer
engine.own_data=true         all samples of data.source are this client's; default:
                             it has a part of a data set that all clients have
data.root=FOLDER             its data
KEY=VALUE                    a key of training, as for the server"""


def main(words: Sequence[str] | None = None) -> None:
    """Computes for a client, until the server ends the run.

    Args:
        words: What is typed; `None`: from the command line.
    """
    wait_passively()
    import_from_working_folder()
    options = _options(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    with ending_with_one_line(options.words):
        from split_lightning.cli.client_keys import compose_client, read_client

        if options.config is None:
            cfg = compose_client(options.id, options.words)
        else:
            cfg = read_client(options.config, options.words)
        from split_lightning.cli.client_site import serve  # imports torch

        try:
            serve(cfg, options.id)
        except Interrupted as stopped:
            kept = "the same command continues where it stopped"
            print(f"\n{stopped}: {kept}.", file=sys.stderr)
            raise SystemExit(128 + stopped.signal) from stopped


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m split_lightning.client",
        usage="%(prog)s --id NUMBER [KEY=VALUE ...]",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--id", required=True, help=argparse.SUPPRESS)
    # All keys of a run, for the clients that `train engine=grpc` starts.
    parser.add_argument("--config", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(words)
    if not re.fullmatch(r"\d+(\.\d+)?", options.id):
        parser.error(
            "Expected --id to be a client's number, such as 3 (or 3.1, where a client "
            f"has several parties), but got {options.id!r}."
        )
    return options
