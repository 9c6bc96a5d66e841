"""Tests a finished run again: `python -m split_lightning.evaluate run=FOLDER`."""

from split_lightning.cli.evaluate import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
