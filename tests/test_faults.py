"""Full disks, folders that cannot be written and damaged data: one message each."""

import errno
import os
import resource
import struct
import urllib.request
from urllib.error import URLError

import pytest
import torch

from split_lightning.module import SplitLightningModule
from split_lightning.train import main

QUICK = [
    "num_clients=2",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
]


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs the command line in this process; returns the message that ends it."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides):
        monkeypatch.setattr("sys.argv", ["split-lightning", *overrides])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        errors = printed.err.splitlines()
        (message,) = [line for line in errors if line.startswith("split-lightning: ")]
        assert message == errors[-1]
        return message

    return run


@pytest.fixture
def files_of():
    """Lets the system refuse files above a size, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def at_start_of_round(monkeypatch, number, act):
    """Does something when a round begins."""
    begin = SplitLightningModule.on_train_epoch_start

    def hooked(self):
        begin(self)
        if self.current_epoch == number:
            act()

    monkeypatch.setattr(SplitLightningModule, "on_train_epoch_start", hooked)


def test_a_full_disk_in_mid_run_leaves_the_last_good_checkpoint(
    monkeypatch, tmp_path, command, files_of
):
    at_start_of_round(monkeypatch, 2, lambda: files_of(100_000))
    message = command("rounds=4", "hydra.run.dir=run", *QUICK)
    folder = tmp_path / "run"
    last = folder / "checkpoints" / "last.ckpt"
    for words in ("File too large", str(folder), f"ckpt_path={last}"):
        assert words in message
    assert "typed" not in message
    assert torch.load(last, weights_only=True)["epoch"] == 1
    monkeypatch.undo()
    files_of(resource.RLIM_INFINITY)
    monkeypatch.chdir(tmp_path)
    goes_on = ["rounds=4", "hydra.run.dir=further", f"ckpt_path={last}", *QUICK]
    monkeypatch.setattr("sys.argv", ["split-lightning", *goes_on])
    main()
    assert (tmp_path / "further" / "results.json").is_file()


def test_a_full_disk_before_the_first_checkpoint(
    monkeypatch, tmp_path, command, files_of
):
    at_start_of_round(monkeypatch, 0, lambda: files_of(100_000))
    message = command("rounds=1", "hydra.run.dir=run", *QUICK)
    assert "File too large" in message
    assert str(tmp_path / "run") in message
    assert "ckpt_path" not in message


def test_a_full_disk_when_segments_are_saved(monkeypatch, tmp_path, command, files_of):
    monkeypatch.setattr(
        SplitLightningModule, "on_test_start", lambda self: files_of(100_000)
    )
    message = command("rounds=1", "hydra.run.dir=run", *QUICK)
    assert str(tmp_path / "run" / "server.safetensors") in message


def test_a_bug_in_mid_run_is_no_fault_of_the_system(monkeypatch, tmp_path):
    def bug():
        raise RuntimeError("a bug")

    monkeypatch.chdir(tmp_path)
    at_start_of_round(monkeypatch, 1, bug)
    monkeypatch.setattr("sys.argv", ["split-lightning", "rounds=2", *QUICK])
    with pytest.raises(RuntimeError, match="a bug"):
        main()


@pytest.fixture
def _read_only(monkeypatch, tmp_path):
    """Makes one folder that nothing can be made in, for root neither."""
    make = os.mkdir
    locked = tmp_path / "locked"
    locked.mkdir()

    def refused(path, *args, **kwargs):
        if locked in (tmp_path / path).parents:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        make(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refused)


@pytest.mark.usefixtures("_read_only")
@pytest.mark.parametrize("key", ["hydra.run.dir", "output_dir"])
def test_a_read_only_run_folder(tmp_path, command, key):
    folder = tmp_path / "locked" / "run"
    message = command(f"{key}={folder}", *QUICK)
    for words in ("Read-only", str(folder), "hydra.run.dir=FOLDER"):
        assert words in message


@pytest.fixture
def _no_network(monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)


def check_names_remedies(message, root, name):
    for words in (name, str(root), "data.root=FOLDER", "data=digits"):
        assert words in message
    assert len(message) < 700


@pytest.mark.usefixtures("_read_only", "_no_network")
@pytest.mark.parametrize("data", ["cifar10", "mnist"])
def test_a_read_only_data_root(tmp_path, command, data):
    root = tmp_path / "locked" / "data"
    message = command(f"data={data}", f"data.root={root}")
    check_names_remedies(message, root, data.upper())
    assert "Read-only" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("content", [b"", b"garbage" * 100], ids=["empty", "garbage"])
def test_damaged_files_of_cifar10(tmp_path, command, content):
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"]
    for name in names:
        (folder / name).write_bytes(content)
    message = command("data=cifar10", f"data.root={tmp_path / 'data'}")
    check_names_remedies(message, tmp_path / "data", "CIFAR10")
    assert "damaged" in message


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("data", ["MNIST", "FashionMNIST"])
@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", struct.pack(">IIII", 0x803, 60000, 28, 28) + bytes(1000)],
    ids=["empty", "garbage", "truncated"],
)
def test_damaged_files_of_mnist(tmp_path, command, data, content):
    folder = tmp_path / "data" / data / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            (folder / f"{part}-{kind}").write_bytes(content)
    group = {"MNIST": "mnist", "FashionMNIST": "fashion_mnist"}[data]
    message = command(f"data={group}", f"data.root={tmp_path / 'data'}")
    check_names_remedies(message, tmp_path / "data", data)
    assert "damaged" in message
