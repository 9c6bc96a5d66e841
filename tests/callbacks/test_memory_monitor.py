"""`MemoryMonitor` against the system's own figures."""

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback
from watching import ListLogger, fit

from split_lightning.callbacks import MemoryMonitor
from split_lightning.callbacks.memory_monitor import peak_bytes

MIB = 2**20


class Hold(Callback):
    """Takes 96 MiB of the system in the second round, and gives them back after it.

    Not of the allocator, which may have as much left from before.
    """

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.held = mmap.mmap(-1, 96 * MIB)
            for page in range(0, 96 * MIB, mmap.PAGESIZE):
                self.held[page] = 1
        elif trainer.current_epoch == 2:
            self.held.close()


def test_what_is_held_shows_and_the_peak_stays(tmp_path):
    logger = ListLogger()
    fit(tmp_path, [Hold(), MemoryMonitor()], logger=logger, max_epochs=3)
    first, second, third = logger.values("memory/resident_mib")
    assert second - first > 80
    assert second - third > 80
    peaks = logger.values("memory/peak_mib")
    assert peaks[0] <= peaks[1] <= peaks[2]
    assert peaks[2] >= second - 1
    assert "memory/cuda_peak_mib" not in logger.logged


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_the_kernels():
    status = Path("/proc/self/status").read_text()
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    assert peak_bytes() == pytest.approx(kib * 1024, rel=0.02)


def test_a_cuda_device_has_its_own_peak(tmp_path, monkeypatch):
    """The device is pretended: what is shown here is what is asked of it."""
    asked, logger, device = [], ListLogger(), torch.device("cuda", 0)

    class Pretend(Callback):  # on_train_epoch_end of the monitor comes next
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.strategy._root_device = device

    class Undo(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.strategy._root_device = torch.device("cpu")

    def peak(device):
        asked.append(device)
        return 5 * MIB

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    callbacks = [Pretend(), MemoryMonitor(), Undo()]
    fit(tmp_path, callbacks, logger=logger, max_epochs=1)
    assert logger.values("memory/cuda_peak_mib") == [5.0]
    assert asked == [device]
