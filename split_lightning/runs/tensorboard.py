"""`TensorBoardLogger`: TensorBoard's files, in a folder of any name."""

from __future__ import annotations

from pathlib import Path

from pytorch_lightning import loggers as lightning
from typing_extensions import override


class TensorBoardLogger(lightning.TensorBoardLogger):
    """Lightning's own, in the folder of that name.

    Lightning's replaces `$NAME` in a folder's name by an environment variable.
    """

    @property
    @override
    def log_dir(self) -> str:
        number = self.version
        version = number if isinstance(number, str) else f"version_{number}"
        return str(Path(self.root_dir, version, self.sub_dir or ""))
