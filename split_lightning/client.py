"""Computes for a client of a run: `python -m split_lightning.client --id NUMBER`."""

from split_lightning.cli.client import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
