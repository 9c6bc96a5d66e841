"""Exports a trained network: `python -m split_lightning.export run=FOLDER`."""

from split_lightning.cli.export import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
