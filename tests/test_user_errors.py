"""A user's mistake gets one message, with key, value and what is allowed."""

import logging
import urllib.request
from importlib import import_module
from urllib.error import URLError

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger

from split_lightning.cli import user_errors
from split_lightning.module import SplitLightningModule
from split_lightning.quiet import silence_known_messages
from split_lightning.train import main

DATA_REMEDIES = ["data.root=FOLDER", "data=digits"]
DIRICHLET = "data/partitioner=dirichlet"
PATHOLOGICAL = "data/partitioner=pathological"
CLIP = "model.gradient_clip_val"
ACCUMULATE = "model.accumulate_grad_batches"
CUTS = "Nearest valid cut layers"
INTEGER = "an integer of at least 1"

# What was typed, and words that the message must have.
MISTAKES = {
    # A key that does not exist
    "num_client=3": ["num_client=3", "`num_clients`"],
    "lr=0.1": ["lr=0.1", "optimizer.client.lr", "optimizer.server.lr"],
    "data.vall_share=0.1": ["data.vall_share=0.1", "`data.val_share`"],
    "model.cutlayer=x": ["model.cutlayer=x", "`model.cut_layer`"],
    "optimizer.client.lrr=1": ["optimizer.client.lrr=1", "`optimizer.client.lr`"],
    "trainer.max_epoch=3": ["trainer.max_epoch=3", "`trainer.max_epochs`"],
    "protocol.shufle=true": ["protocol.shufle=true", "`protocol.shuffle`"],
    "data.partitioner.alpha=0.3": ["key: data/partitioner=dirichlet"],
    "hydra.unknwon=1": ["hydra.unknwon=1", "sweeper"],
    "~trainer.foo": ["trainer.foo", "does not exist"],
    "~callbacks.histry": ["callbacks.histry", "does not exist"],
    # A key that was added, and that nothing uses
    "+unknown=1": ["+unknown=1", "Keys of a run: name"],
    "+data.unknown=1": ["+data.unknown=1", "val_share"],
    "+model.unknown=1": ["+model.unknown=1", "cut_layer"],
    "+trainer.unknown=1": ["trainer.unknown=1", "max_epochs"],
    "+optimizer.client.unknown=1": ["optimizer.client.unknown=1", "momentum"],
    "+protocol.unknown=1": ["protocol.unknown=1", "clients_per_round"],
    # A key of options that were not chosen
    "system.clock.system.uplink=3": ["`system.clock.system.uplink=3`", "system=lan"],
    "protocol=fedavg protocol.shuffle=true": ["multi_server, protocol=round_robin"],
    "topology.parts.rows=2": ["Keys of `topology`: cut_layers, labels"],
    # A key of an earlier version leads to where it is now
    "protocol.schedule.shuffle=true": ["schedule.shuffle", "`protocol.shuffle`"],
    "protocol.schedule.local_steps=2": ["schedule.local_steps", "mean `local_steps`"],
    "protocol.callbacks.drift.server=true": ["mean `callbacks.drift.server`"],
    "protocol.module.criterion=0": ["mean `model.criterion`"],
    "protocol=multi_server protocol.servers.num_servers=3": ["`protocol.num_servers`"],
    "+callbacks.best.unknown=1": ["callbacks.best.unknown=1", "monitor"],
    "+callbacks.history.unknown=1": ["callbacks.history.unknown=1", "folder"],
    # An option of a group that does not exist
    "data=cifar11": ["data=cifar11", "cifar10, cifar100, custom, digits"],
    "model=resnet81": ["model=resnet81", "resnet18"],
    "protocol=robin": ["protocol=robin", "round_robin"],
    "optimizer=sgdd": ["optimizer=sgdd", "adam, sgd"],
    "logger=x": ["logger=x", "none, tensorboard"],
    "logger=[csv,x]": ["logger=x", "csv, mlflow, none, tensorboard, wandb"],
    "logger=[csv,null]": ["logger=null", "csv, mlflow, none"],
    "+logger.mine=5": ["Expected `logger.mine` to be an object", "but got 5"],
    "callbacks=histogram": ["callbacks=histogram", "default, figures, histograms"],
    "+experiment=rr11": ["experiment=rr11", "rr10, rr10_dirichlet"],
    "experiment=rr10": ["experiment", "+experiment=rr10"],
    "data/partitioner=dirichlett": [
        "data/partitioner=dirichlett",
        "dirichlet, dirichlet_01, distribution, expo",
    ],
    "data.partitioner=dirichlet": ["'dirichlet'", "data/partitioner=OPTION"],
    "trainer=null": ["trainer", "null", "default"],
    "data=null": ["data", "null", "cifar10, cifar100, custom, digits"],
    # A value that an option of a group asks for
    "data/partitioner=natural_id": ["data.partitioner.partition_by=VALUE"],
    "data/partitioner=id_to_size": ["partition_id_to_size_fn.path=VALUE"],
    "model=custom": ["model.cut_layer=VALUE"],
    "model=custom model.cut_layer=x": ["model.network._target_=VALUE"],
    # A value of the wrong type
    "num_clients=ten": ["num_clients", "'ten'", "int"],
    "num_clients=2.5": ["num_clients", "2.5", "int"],
    "num_clients=": ["num_clients", "''", "int"],
    "rounds=null": ["rounds", "null", "int"],
    "data.val_share=abc": ["data.val_share", "'abc'", "float"],
    "data.mean=0.5": ["data.mean", "0.5", "list[float]"],
    "model.cut_layer=null": ["model.cut_layer", "null", "have a value"],
    "model.channels_last=maybe": ["model.channels_last", "'maybe'", "bool"],
    "model.network=null": ["model.network", "null"],
    "model.criterion=abc": ["model.criterion", "'abc'", "_target_"],
    "data.source=null": ["data.source", "null"],
    "data.source=abc": ["data.source", "'abc'", "_target_"],
    "optimizer.client=null": ["optimizer.client", "null"],
    "optimizer.client.lr=abc": ["optimizer.client", "'lr': 'abc'", "float"],
    "~num_clients": ["num_clients"],
    "num_clients=${nowhere}": ["num_clients", "nowhere"],
    "trainer.deterministic=maybe": ["deterministic", "'maybe'", "bool or 'warn'"],
    "trainer.min_steps=x": ["trainer.min_steps", "'x'", "int or null"],
    "trainer.max_epochs=true": ["trainer.max_epochs", "True", "int or null"],
    "callbacks.best.mode=[1]": ["callbacks.best.mode", "[1]", "str"],
    "protocol.enabled=no": ["protocol.enabled", "'no'", "bool"],
    "module.criterion=0": ["module.criterion", "0", "Module or null"],
    "module.criterion=x": ["module.criterion", "'x'", "Module"],
    # A value out of range
    "data.image_size=-8": ["data.image_size", "-8", INTEGER],
    "num_clients=-3": ["num_clients", "-3", INTEGER],
    "num_clients=0": ["num_clients", "0", INTEGER],
    "num_clients=100000": ["num_clients", "100000", "1437"],
    "rounds=0": ["rounds", "0", INTEGER],
    "rounds=-1": ["rounds", "-1", INTEGER],
    "local_epochs=0": ["local_epochs", "0", INTEGER],
    "clients_per_round=0": ["clients_per_round", "0", "from 1 to 10"],
    "clients_per_round=11": ["clients_per_round", "11", "from 1 to 10"],
    "clients_per_round=-1": ["clients_per_round", "-1", "from 1 to 10"],
    "batch_size=0": ["batch_size", "0", INTEGER],
    "batch_size=-4": ["batch_size", "-4", INTEGER],
    "seed=-1": ["seed", "-1", "from 0"],
    "data.val_share=1.0": ["data.val_share", "1.0", "[0, 1)"],
    "data.val_share=-0.1": ["data.val_share", "-0.1", "[0, 1)"],
    "data.val_share=1.5": ["data.val_share", "1.5", "[0, 1)"],
    "callbacks.drift.server=ture": ["drift.server", "'ture'", "bool"],
    "optimizer_state=kept": ["optimizer_state", "'kept'", "keep", "travel", "reset"],
    "optimizer.client.lr=-1": ["optimizer.client", "learning rate", "-1"],
    "optimizer.server.momentum=-0.5": ["optimizer.server", "momentum", "-0.5"],
    "optimizer=sgd_cosine optimizer.scheduler_interval=epoch": [
        "optimizer.scheduler_interval",
        "'epoch'",
        "batch",
        "round",
    ],
    f"{DIRICHLET} data.partitioner.alpha=0": [
        "data.partitioner",
        "'alpha': 0",
        "greater than zero",
    ],
    f"{DIRICHLET} data.partitioner.alpha=-1": ["'alpha': -1", "greater than zero"],
    f"{PATHOLOGICAL} data.partitioner.num_classes_per_partition=11": [
        "num_classes_per_partition",
        "11",
        "10",
    ],
    f"{PATHOLOGICAL} data.partitioner.num_classes_per_partition=0": [
        "data.partitioner.num_classes_per_partition",
        "0",
        "positive",
    ],
    "data/partitioner=shards data.partitioner.num_shards_per_partition=0": [
        "num_shards_per_partition",
        "0",
        "positive",
    ],
    "model.cut_layer=fc2": ["model.cut_layer", "fc2", CUTS, "relu3"],
    "model.cut_layer=nowhere": ["model.cut_layer", "nowhere", CUTS, "conv1"],
    "model.cut_layer=99": ["model.cut_layer", "99", "0 to 10"],
    "model.cut_layer=-1": ["model.cut_layer", "-1", "0 to 10"],
    "model.network._target_=torchvision.models.resnet99": [
        "model.network._target_",
        "torchvision.models.resnet99",
    ],
    "model.network._target_=builtins.map": ["network", "builtins.map"],
    "model.gradient_clip_val=-1": [CLIP, "-1", "positive"],
    f"model.gradient_clip_algorithm=x {CLIP}=1": ["algorithm", "'x'", "norm", "value"],
    "model.accumulate_grad_batches=0": [ACCUMULATE, "0", "positive"],
    "metric=val/acc": ["metric", "'val/acc'", "val/accuracy"],
    "ckpt_path=": ["Expected `ckpt_path` to name a path, or null, but got ''"],
    "model.weights=": ["Expected `model.weights` to name a path", "but got ''"],
    "ckpt_path=/nowhere.ckpt": ["ckpt_path", "/nowhere.ckpt", "checkpoints/last.ckpt"],
    # What Lightning refuses, or we on its behalf
    "trainer.gradient_clip_val=1": ["trainer.gradient_clip_val=1", CLIP],
    "trainer.gradient_clip_val=1 protocol=fedavg": ["gradient_clip_val=1", CLIP],
    "trainer.accumulate_grad_batches=2": ["accumulate_grad_batches=2", ACCUMULATE],
    "trainer.precision=16-true": ["trainer.precision=16-true", "bf16-mixed"],
    "trainer.precision=16-mixed": ["trainer.precision", "16-mixed", "bf16-mixed"],
    "trainer.limit_train_batches=0": ["trainer.limit_train_batches", "0"],
    "trainer.max_steps=0": ["trainer.max_steps", "0"],
    "trainer.precision=nonsense": ["trainer.precision", "'nonsense'", "bf16-mixed"],
    "trainer.accelerator=warp": ["trainer.accelerator=warp", "cpu"],
    "trainer.devices=2": ["trainer.devices", "(2)", "trainer.strategy", "ddp", "sweep"],
    "trainer.strategy=ddp_spawn": ["start_method='spawn'", "strategy='ddp'"],
    "trainer.check_val_every_n_epoch=0": ["check_val_every_n_epoch", "0", INTEGER],
    # What would be ignored
    "data.root=/tmp": ["data.root=/tmp", "would change nothing"],
    "data.in_channels=3 model=resnet18": ["`data.in_channels`", "to be 1", "got 3"],
    "model.gradient_clip_algorithm=value": ["would change nothing", CLIP],
    "protocol=centralized num_clients=1 model.cut_layer=conv1": [
        "model.cut_layer=conv1",
        "would change nothing",
    ],
    "protocol=cyclesl local_steps=2": ["local_steps=2", "nothing: protocol=cyclesl"],
    "protocol=fedavg optimizer.client.lr=1": [
        "topology=unsplit",
        "optimizer.server.lr",
    ],
    "protocol=turns/five local_steps=2": [
        "turns/five does not",
        "protocol.local_steps",
    ],
    "optimizer_state=travel protocol=gpsl": ["protocol=gpsl does not use"],
    "server_optimizer_state=reset": ["protocol=round_robin", "mean `optimizer_state`"],
    "buffers=keep": [
        "protocol=round_robin does not use `buffers`. Keys of protocol=round_robin: c",
    ],
    "protocol=gpsl spill_to=waiting": ["`spill_to` to be null", "GPSL"],
    "topology=u_shaped protocol=centralized": ["Centralized", "leave `topology` out"],
    "protocol=gpsl callbacks.drift.server=true": ["callbacks.drift.server", "GPSL"],
    "topology=unsplit": ["RoundRobin", "leave `topology=unsplit` out"],
    # What cannot be read at all
    "num_clients==": ["num_clients=="],
    "num_clients": ["Expected KEY=VALUE, but got `num_clients`, which has no `=`."],
    "trainer.devices=[0,1": ["trainer.devices=[0,1"],
    "data=digits,mnist": ["data=digits,mnist", "--multirun"],
}
# Found when training is set up: the logger has opened its file by then.
LATE_MISTAKES = {
    "protocol=multi_server num_clients=1": ["num_servers", "from 1", "(1)", "got 2"],
    "protocol.enabled=false optimizer_state=travel": ["'travel'", "enabled=False"],
    "callbacks=histograms logger=none": ["Histograms", "logger=tensorboard"],
    "trainer.val_check_interval=1000": ["val_check_interval", "1000", "50"],
}


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """Runs the command line in this process; returns the message that stops it."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides):
        monkeypatch.setattr("sys.argv", ["split-lightning", *overrides])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("split-lightning: error: ")
        assert message.count("split-lightning: error:") == 1
        assert "Traceback" not in message
        assert "Error executing job" not in message
        assert len(message) < 1200
        return message

    return run


def trained(folder):
    """What training leaves in a folder: checkpoints, segments, results, a log."""
    left = [path for path in folder.rglob("*") if path.is_file()]
    kinds = (".ckpt", ".safetensors", ".json")
    return [p for p in left if p.suffix in kinds or p.name.startswith("events.")]


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_gets_one_message(refused, tmp_path, typed):
    message = refused(*typed.split(" "))
    for words in MISTAKES[typed]:
        assert words in message
    assert not trained(tmp_path)


@pytest.mark.parametrize("typed", LATE_MISTAKES)
def test_a_late_mistake_gets_one_message(refused, tmp_path, typed):
    message = refused(*typed.split(" "), "logger=none")
    for words in LATE_MISTAKES[typed]:
        assert words in message
    assert not trained(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(refused):
    assert "trainer.accelerator=gpu" in refused("trainer.accelerator=gpu")


@pytest.mark.parametrize("data", ["cifar10", "mnist"])
def test_without_data_or_network_the_remedies_are_named(
    refused, monkeypatch, tmp_path, data
):
    def unreachable(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    root = tmp_path / "empty"
    message = refused(f"data={data}", f"data.root={root}")
    for words in [str(root), *DATA_REMEDIES]:
        assert words in message
    assert len(message) < 600
    assert not trained(tmp_path)


@pytest.mark.parametrize("data", ["cifar10", "mnist"])
def test_a_file_in_place_of_the_data_folder(refused, tmp_path, data):
    file = tmp_path / "file"
    file.touch()
    message = refused(f"data={data}", f"data.root={file}")
    for words in [str(file), *DATA_REMEDIES]:
        assert words in message


def test_a_file_in_place_of_the_run_folder(refused, tmp_path):
    (tmp_path / "file").touch()
    typed = f"hydra.run.dir={tmp_path}/file/run"
    assert typed in refused(typed)


def test_a_file_that_is_no_checkpoint(refused, tmp_path):
    file = tmp_path / "notes.ckpt"
    file.write_text("no checkpoint")
    assert str(file) in refused(f"ckpt_path={file}")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("num_client: 3", ["experiment/own", "num_client", "`num_clients`"]),
        ("num_clients: ten", ["experiment/own", "num_clients", "'ten'", "int"]),
        ("num_clients: -3", ["num_clients", "-3", INTEGER, "+experiment=own"]),
        ("trainer: {max_epoch: 3}", ["trainer.max_epoch=3", "trainer.max_epochs"]),
        ("data: {vall_share: 0.5}", ["data.vall_share", "data.val_share"]),
        ("defaults: [{override /data: x}]", ["data=x", "digits", "+experiment=own"]),
        ("num_clients: [3", ["own.yaml", "line"]),
    ],
)
def test_a_mistake_in_an_experiment_file(refused, tmp_path, lines, words):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "own.yaml"
    file.write_text(f"# @package _global_\n{lines}\n")
    message = refused(f"--config-dir={tmp_path}", "+experiment=own")
    for word in words:
        assert word in message


def test_what_no_run_of_a_sweep_could_take_stops_the_sweep(refused, tmp_path):
    assert "`num_client=5,3`" in refused("-m", "num_client=5,3")
    message = refused("-m", "model=digits_cnn,resnet81", "rounds=1")
    assert "`model=resnet81`" in message
    assert not trained(tmp_path)


def test_a_mistake_late_in_a_sweep_has_no_stack_trace(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    overrides = ["num_clients=5,-3", "trainer.fast_dev_run=true", "logger=none"]
    monkeypatch.setattr("sys.argv", ["split-lightning", "-m", *overrides])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.count("split-lightning: error:") == 1
    assert "Expected `num_clients` to be" in printed


def test_values_may_refer_to_other_keys(monkeypatch, tmp_path):
    """What `${...}` refers to is used, though nothing else of the run names it."""
    monkeypatch.chdir(tmp_path)
    overrides = ["+own=0.1", "optimizer.client.lr=${own}", "num_clients=${rounds}"]
    quick = ["rounds=1", "trainer.fast_dev_run=true", "logger=none"]
    monkeypatch.setattr("sys.argv", ["split-lightning", *overrides, *quick])
    main()
    written = next(tmp_path.glob("runs/*/*/config.yaml")).read_text()
    assert "lr: ${own}" in written
    assert "own: 0.1" in written


def test_a_bug_keeps_its_stack_trace(monkeypatch, tmp_path):
    def broken(self, batch, batch_idx):
        raise ValueError("a bug")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SplitLightningModule, "training_step", broken)
    monkeypatch.setattr("sys.argv", ["split-lightning", "trainer.fast_dev_run=true"])
    with pytest.raises(ValueError, match="a bug"):
        main()


@pytest.mark.parametrize("typed", ["num_clients=-3", "num_client=3"])
def test_hydra_full_error_shows_where(monkeypatch, tmp_path, typed):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr("sys.argv", ["split-lightning", typed])
    with pytest.raises(Exception, match="num_client"):
        main()


def test_tips_of_products_are_left_out_and_nothing_else(tmp_path):
    told = []

    class Keep(logging.Handler):
        def emit(self, record):
            told.append(record.getMessage())

    logger, handler = logging.getLogger("pytorch_lightning"), Keep()
    logger.addHandler(handler)
    try:
        silence_known_messages()
        Trainer(accelerator="cpu", logger=CSVLogger(tmp_path))
    finally:
        logger.removeHandler(handler)
    assert not [message for message in told if "litlogger" in message]
    assert [message for message in told if message.startswith("GPU available")]


def test_numbers_that_are_not_finite_end_a_run_with_one_message(refused):
    """The run had begun."""
    rates = ["optimizer.client.lr=1e30", "optimizer.server.lr=1e30"]
    message = refused(*rates, "rounds=1", "num_clients=2", "logger=none")
    assert "Not finite in round 1, client 0, batch" in message
    assert "Lower the learning rate" in message


@pytest.mark.parametrize("name", user_errors._OF_RUNS)
def test_what_ends_a_run_with_one_message_is_a_class(name):
    assert issubclass(getattr(import_module(name[0]), name[1]), Exception)
