"""Trains one run: `python -m split_lightning.train [KEY=VALUE ...]`."""

from split_lightning.cli.train import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
