"""The first minute: help, version, completion, what is imported, threads, messages."""

import os
import subprocess
import sys
import warnings
from dataclasses import fields

import pytest
import torch
from test_train import command

import split_lightning
from split_lightning.cli.main import COMMANDS
from split_lightning.cli.threads import set_threads
from split_lightning.quiet import silence_known_messages
from split_lightning.runs.schema import TrainConfig

# Runs the command line; says what of the slow packages it imported.
PROBE = """
import sys
from split_lightning.train import main
try:
    main()
finally:
    slow = {"torch", "pytorch_lightning", "torchmetrics", "matplotlib", "datasets"}
    print("imported:", sorted(slow & set(sys.modules)))
"""


def started(*words, probe=PROBE, **environment):
    """Starts the command line; returns its exit status and its output."""
    done = subprocess.run(
        [sys.executable, "-c", probe, *words],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "status", "shown"),
    [
        (["--version"], 0, f"split_lightning {split_lightning.__version__}\n"),
        (["--cfg", "job"], 0, "num_clients: 10"),
        (["num_client=3"], 2, "Did you mean `num_clients`?"),
        (["clients_per_round=11"], 2, "from 1 to 10"),
        (["optimizer.client.lr=1", "metric=x"], 2, "val/accuracy"),
        (["data=cifar11"], 2, "Options of `data`"),
    ],
)
def test_nothing_slow_is_imported_to_print_text(words, status, shown):
    code, output = started(*words)
    assert code == status, output
    assert shown in output
    assert "imported: []" in output


MAIN = PROBE.replace("split_lightning.train", "split_lightning.cli.main")


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("train protocol=splitfed_",
         "protocol=splitfed_v1 protocol=splitfed_v2 protocol=splitfed_v3\n"),
        ("train seed=1 rou", "rounds=\n"),
        ("", " ".join(COMMANDS) + "\n"),
        ("ex", "export\n"),
        ("evaluate run", ""),
    ],
)  # fmt: skip
def test_completion_imports_nothing_slow(typed, shown):
    """What the line asks for that `split-lightning -sc install=bash` prints."""
    line = f"split-lightning {typed}"
    point = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    code, output = started("-sc", "query=bash", probe=MAIN, **point)
    assert code == 0
    assert output == f"{shown}imported: []\n"


@pytest.mark.parametrize("words", [[], ["train"]])
def test_completion_is_installed_for_the_script(words):
    probe = MAIN.replace("import sys", "import sys; sys.argv[0] = 'split-lightning'")
    code, output = started(*words, "-sc", "install=bash", probe=probe)
    assert code == 0
    assert "-F hydra_bash_completion split-lightning\n" in output
    assert "imported: []" in output


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["nowhere"]])
def test_the_list_of_commands_is_there_at_once(words):
    assert "imported: []" in started(*words, probe=MAIN)[1]


@pytest.mark.parametrize(
    "name",
    [
        "evaluate",
        "export",
        "compare",
        "cuts",
        "plan",
        "certificates",
        "server",
        "client",
    ],
)
def test_the_other_commands_print_their_help_at_once(name):
    probe = PROBE.replace("split_lightning.train", f"split_lightning.{name}")
    code, output = started("--help", probe=probe)
    assert code == 0
    assert "usage:" in output
    assert "imported: []" in output


@pytest.mark.parametrize("name", ["server", "client"])
def test_a_mistake_of_a_site_is_found_before_anything_slow_is_imported(name):
    probe = PROBE.replace("split_lightning.train", f"split_lightning.{name}")
    id_of_client = ["--id", "0"] if name == "client" else []
    code, output = started(*id_of_client, "num_client=3", probe=probe)
    assert code == 2
    assert "Did you mean `num_clients`?" in output
    assert "imported: []" in output


def test_parties_in_one_process_need_no_package_of_the_other_engines(tmp_path):
    """A run with a log, checkpoints and pictures."""
    probe = PROBE.replace('"torch", "pytorch_lightning",', '"grpc", "ray",')
    probe = probe.replace('"torchmetrics", "matplotlib", "datasets"', '"cryptography"')
    short = ["rounds=1", "trainer.limit_train_batches=1", "num_clients=2"]
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    code, output = started(*short, folder, probe=probe)
    assert code == 0, output
    assert (tmp_path / "run" / "server.safetensors").is_file()
    assert "imported: []" in output


def test_help_has_a_line_for_each_key():
    code, output = started("--help")
    assert code == 0
    lines = output.splitlines()
    assert "split learning" in lines[0]
    words = [line.split()[0] for line in lines if line.strip()]
    assert {field.name for field in fields(TrainConfig)} <= set(words)
    assert "protocol: async_round_robin, " in output
    assert "imported: []" in output
    assert max(map(len, lines[:30])) <= 80


def test_every_public_name_is_there_and_others_are_not():
    for name in split_lightning.__all__:
        value = getattr(split_lightning, name)
        assert value.__name__ == name
        assert name in dir(split_lightning)
    with pytest.raises(AttributeError, match="no attribute 'SplitModule'"):
        _ = split_lightning.SplitModule


@pytest.fixture
def _threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_threads_suit_the_network_unless_something_else_is_said(monkeypatch):
    torch.set_num_threads(2)
    assert set_threads(None, flops=1e11).startswith("threads: 2 (all cores")
    assert torch.get_num_threads() == 2
    assert set_threads(None, flops=1e7).startswith("threads: 1 (the network is small")
    assert torch.get_num_threads() == 1
    assert set_threads(2, flops=1e7) == "threads: 2 (as configured)"
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS is set" in set_threads(None, flops=1e7)
    assert torch.get_num_threads() == 2  # as torch read the variable at its start
    assert "overrides" not in set_threads(3, flops=1e7)
    assert "OMP_NUM_THREADS is set, and overrides threads=4" in set_threads(4, 1e7)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("typed", "threads"), [([], 1), (["threads=2"], 2)])
def test_a_run_sets_and_reports_its_threads(
    monkeypatch, tmp_path, caplog, typed, threads
):
    torch.set_num_threads(3)
    short = ["rounds=1", "num_clients=1", "trainer.limit_train_batches=1"]
    (run,) = command(monkeypatch, tmp_path, *short, *typed)
    assert torch.get_num_threads() == threads
    assert f"threads: {threads} (" in caplog.text
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert all(path.stat().st_size for path in run.rglob("*.log"))


def test_known_warnings_are_silent_and_others_are_not():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        silence_known_messages()
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated", stacklevel=1)
        warnings.warn("something to act on", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["something to act on"]
