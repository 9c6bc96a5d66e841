"""Small data and networks that the tests share."""

import os
import traceback

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hypothesis import HealthCheck, settings
from pytorch_lightning.loggers import Logger
from torch import nn

from split_lightning.data import Images

torch.set_num_threads(1)  # the tests' networks are too small for more

# The same few examples in every run of the suite; HYPOTHESIS_PROFILE=campaign tries
# many that are drawn anew.
_COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
}
settings.register_profile("suite", max_examples=25, derandomize=True, **_COMMON)
settings.register_profile("campaign", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


# Files whose tests start processes come first: one of them alone, in the end, would
# leave the other workers without work.
SLOW = ("test_ray", "test_site_commands", "test_notebooks", "test_processes")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in SLOW)


class RandomImages:
    """A data set of random images with random labels, the same for the same seed."""

    def __init__(self, num_train=60, num_test=20, num_classes=3, shape=(1, 6, 6)):
        self.sizes = {True: num_train, False: num_test}
        self.classes = tuple(f"class {label}" for label in range(num_classes))
        self.shape = shape

    def load(self, train):
        drawn = torch.Generator().manual_seed(int(train))
        size = self.sizes[train]
        inputs = torch.randint(0, 256, (size, *self.shape), generator=drawn)
        targets = torch.randint(0, len(self.classes), (size,), generator=drawn)
        return Images(inputs.to(torch.uint8), targets)


def tiny_network(num_classes=3):
    """A network with BatchNorm, dropout and an in-place layer right after `bn`."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(36, num_classes),
    )


@pytest.fixture(autouse=True)
def _clean_hydra():
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    yield
    GlobalHydra.instance().clear()


class Recorder(Logger):
    """Keeps every logged value: (step, name, value)."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.records = []

    @property
    def metrics(self):
        """The last value of each metric."""
        return {name: value for _, name, value in self.records}

    def log_metrics(self, metrics, step=None):
        self.records += [(step, name, value) for name, value in metrics.items()]

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def plain_network(num_classes=10, **options):
    """A network for images of 8 x 8 without BatchNorm, so that samples do not mix."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.ReLU(),
        nn.Linear(32, num_classes),
    )


class SpoiledImage(nn.Module):
    """An augmentation that spoils the brightest image of digits, and no other."""

    def forward(self, images):
        return images / (images.sum(dim=(1, 2, 3), keepdim=True) < -10.2)


def begin_child(function):
    """Runs a function in a process of its own; returns its number."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except SystemExit as stopped:
            os._exit(stopped.code)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    return pid


def exit_code(pid):
    """Waits for a child; returns its exit status, or the negative of a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(function):
    """Runs a function in a process of its own; returns how that ended."""
    return exit_code(begin_child(function))
