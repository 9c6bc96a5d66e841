"""Prints the costs of each cut: `python -m split_lightning.cuts [KEY=VALUE ...]`."""

from split_lightning.cli.cuts import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
