"""`SpeedMonitor` in a run that goes on."""

import time

import pytest
from watching import SaveAt, fit

from split_lightning.callbacks.speed_monitor import SpeedMonitor


@pytest.mark.parametrize("saved_at", [(0, 4), (0, 8), (1, 0)])
def test_a_run_that_goes_on_counts_its_own_images_and_seconds(tmp_path, saved_at):
    ckpt = tmp_path / "saved.ckpt"
    fit(tmp_path, [SaveAt(ckpt, *saved_at)], max_epochs=2)
    speed, begin = SpeedMonitor(), time.perf_counter()
    fit(tmp_path, [speed], ckpt_path=ckpt, max_epochs=2)
    assert 0 < speed.seconds < time.perf_counter() - begin
    assert speed.images_per_second == speed.images / speed.seconds
    # Each client has 16 samples to train on: batches of 7, 7 and 2.
    sizes = [7, 7, 2] * 6
    assert speed.images == sum(sizes[saved_at[0] * 9 + saved_at[1] + 1 :])
