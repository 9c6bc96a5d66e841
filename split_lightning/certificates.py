"""Writes certificates: `python -m split_lightning.certificates --clients NUMBER`."""

from split_lightning.cli.certificates import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
