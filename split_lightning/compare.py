"""Compares runs: `python -m split_lightning.compare FOLDER...`."""

import sys

from split_lightning.cli.compare import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
