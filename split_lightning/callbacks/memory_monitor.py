"""`MemoryMonitor`: the memory that a run takes."""

from __future__ import annotations

import sys
from typing import Any

import psutil
import pytorch_lightning as pl
import torch
from typing_extensions import override

_MIB = 2**20


class MemoryMonitor(pl.Callback):
    """Logs the memory of the process at the end of each round, in MiB.

    `memory/resident_mib` is the memory of the process now, `memory/peak_mib` the most
    since it began, and `memory/cuda_peak_mib`, on a CUDA device, the most that
    tensors took there. Clients are simulated in one process: it is the memory of all.
    """

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.log("memory/resident_mib", psutil.Process().memory_info().rss / _MIB)
        pl_module.log("memory/peak_mib", peak_bytes() / _MIB)
        device = trainer.strategy.root_device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            pl_module.log("memory/cuda_peak_mib", peak / _MIB)


def peak_bytes() -> int:
    """Returns the peak memory of this process, in bytes."""
    if sys.platform == "win32":
        peak: int = psutil.Process().memory_info().peak_wset
        return peak
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024  # Linux: KiB
