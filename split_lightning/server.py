"""Trains with clients at other sites: `python -m split_lightning.server`."""

from split_lightning.cli.server import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
