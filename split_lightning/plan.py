"""Prints a round's plan: `python -m split_lightning.plan [KEY=VALUE ...]`."""

from split_lightning.cli.plan import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
