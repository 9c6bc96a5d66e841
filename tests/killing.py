"""Stands for SIGKILL of the process with the Trainer."""

from pytorch_lightning import Callback


class Killed(BaseException):
    """Nothing runs any more."""


class Kill(Callback):
    """Kills the process with the Trainer before a batch, counted from its start."""

    def __init__(self, after):
        self.left = after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.left == 0:
            raise Killed
        self.left -= 1
