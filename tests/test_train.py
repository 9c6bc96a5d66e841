"""The command line: what a run leaves, and every experiment file."""

import csv
import json
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import RandomImages
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from split_lightning.cli import training
from split_lightning.data import TorchvisionImages
from split_lightning.models import DigitsCNN
from split_lightning.train import main

CONF = Path(__file__).parent.parent / "conf"
# In `test_sweep.py` and `test_vertical.py`.
OTHERS = {"compare", "compare_skewed", "vertical", "vertical_table"}
EXPERIMENTS = sorted(
    {path.stem for path in (CONF / "experiment").glob("*.yaml")} - OTHERS
)
BYTES_UP = 32 * 4 * 4 * 4 + 8  # DigitsCNN, cut after `maxpool`: 32 x 4 x 4, a label


NO_PICTURES = [
    "~callbacks.partition_picture",
    "~callbacks.client_picture",
    "~callbacks.confusion_picture",
]


def command(monkeypatch, folder, *overrides, pictures=False):
    """Runs the command line in this process, in a folder; returns the runs' folders."""
    monkeypatch.chdir(folder)
    quiet = ["trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"]
    quiet += [] if pictures else NO_PICTURES
    monkeypatch.setattr("sys.argv", ["split-lightning", *overrides, *quiet])
    main()
    return sorted(path.parent for path in folder.glob("runs/**/results.json"))


def events(run):
    accumulator = EventAccumulator(
        str(run / "tensorboard"), {"scalars": 0, "images": 0}
    )
    accumulator.Reload()
    return accumulator


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run that a newcomer starts first, with nothing chosen."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as monkeypatch:
        (run,) = command(monkeypatch, folder, pictures=True)
    return run


def test_the_first_run_learns_digits(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["test_accuracy"] > 0.9
    assert results["val_accuracy"] > 0.9
    assert results["rounds"] == 10
    assert results["seconds"] < 60
    images = 10 * (1437 - 10 * 14)  # less a tenth of each client's 144 or 143
    assert results["uplink_bytes"] == images * BYTES_UP
    assert results["downlink_bytes"] == images * (BYTES_UP - 8)
    # conv1, bn1, conv2, bn2: parameters, then running statistics and counters.
    segment = 4 * (16 * 9 + 16 + 32 + 32 * 16 * 9 + 32 + 64) + 4 * 96 + 2 * 8
    assert results["handoff_bytes"] == 99 * segment
    assert results["handoffs"] == 99
    assert results["images_per_second"] > 0


def test_the_first_run_leaves_everything_to_look_at(finished):
    left = {str(path.relative_to(finished)) for path in finished.rglob("*.*")}
    assert left >= {
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "client.safetensors",
        "clients.png",
        "config.yaml",
        "confusion.png",
        "curves.png",
        "history.csv",
        "partition.png",
        "results.json",
        "server.safetensors",
    }
    with safe_open(finished / "client.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["network"] == "split_lightning.models.DigitsCNN"
    assert metadata["cut_layer"] == "maxpool"
    assert metadata["classes"] == "0,1,2,3,4,5,6,7,8,9"
    assert metadata["split_lightning"]
    assert "num_clients: 10" in (finished / "config.yaml").read_text()
    config = OmegaConf.load(finished / "config.yaml")
    assert config.output_dir == str(finished)
    assert "batch_size: ${batch_size}" in (finished / "config.yaml").read_text()
    OmegaConf.resolve(config)  # needs nothing of Hydra
    assert config.datamodule.batch_size == 32


def test_saved_segments_are_the_tested_network(finished):
    """The unsplit network, from the files alone, has the accuracy that was printed."""
    from split_lightning.data import DigitsImages

    network = DigitsCNN()
    parts = [
        load_file(finished / f"{side}.safetensors") for side in ("client", "server")
    ]
    network.load_state_dict(parts[0] | parts[1])
    network.eval()
    images = DigitsImages().load(train=False)
    with torch.no_grad():
        logits = network((images.inputs.float() / 255 - 0.5) / 0.5)
    results = json.loads((finished / "results.json").read_text())
    accuracy = (logits.argmax(1) == images.targets).float().mean().item()
    assert results["test_accuracy"] == pytest.approx(accuracy)
    loss = torch.nn.functional.cross_entropy(logits, images.targets).item()
    assert results["test_loss"] == pytest.approx(loss, rel=1e-4)
    last = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    for name, tensor in parts[0].items():
        assert torch.equal(last["state_dict"][f"first_copies.0.{name}"], tensor)


def test_tensorboard_shows_the_run(finished):
    written = events(finished)
    scalars = set(written.Tags()["scalars"])
    comm = {
        f"comm/{total}{name}"
        for total in ("", "total_")
        for name in ("uplink_bytes", "downlink_bytes", "handoff_bytes", "handoffs")
    }
    assert scalars >= comm | {f"clients/loss/{k}" for k in range(10)} | {
        "train/loss",
        "train/batch_loss",
        "train/images_per_second",
        "val/loss",
        "val/accuracy",
        "test/loss",
        "test/accuracy",
        "lr/client",
        "lr/server",
        "cut/smashed_norm",
        "cut/gradient_norm",
        "drift/client",
        "memory/peak_mib",
    }
    images = {"data/partition", "clients/by_round", "val/confusion", "test/confusion"}
    assert images <= set(written.Tags()["images"])
    assert written.Tags()["histograms"] == []  # on request alone
    values = {tag: [event.value for event in written.Scalars(tag)] for tag in scalars}
    assert len(values["val/accuracy"]) == len(values["train/loss"]) == 10
    assert values["comm/uplink_bytes"] == [1297 * BYTES_UP] * 10
    assert values["comm/total_uplink_bytes"][-1] == 10 * 1297 * BYTES_UP
    assert values["comm/handoffs"] == [9] + [10] * 9
    assert values["lr/client"] == pytest.approx([0.01] * 10)
    results = json.loads((finished / "results.json").read_text())
    assert values["test/accuracy"] == pytest.approx([results["test_accuracy"]])
    steps = [event.step for event in written.Scalars("val/accuracy")]
    assert steps == [50 * (r + 1) - 1 for r in range(10)]  # batches, on the x-axis


def test_the_history_is_that_of_tensorboard(finished):
    with (finished / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    written, results = (
        events(finished),
        json.loads((finished / "results.json").read_text()),
    )
    assert [int(row["round"]) for row in rows] == list(range(1, 11))
    for column, tag in {
        "train_loss": "train/loss",
        "val_accuracy": "val/accuracy",
        "uplink_bytes": "comm/total_uplink_bytes",
        "handoffs": "comm/total_handoffs",
    }.items():
        values = [event.value for event in written.Scalars(tag)]
        assert [float(row[column]) for row in rows] == pytest.approx(values), column
    best = max(float(row["val_accuracy"]) for row in rows)
    assert results["best_val_accuracy"] == best
    assert float(rows[results["best_round"] - 1]["val_accuracy"]) == best


def test_client_losses_are_means_over_turns(monkeypatch, tmp_path):
    """The mean of the clients' losses, by samples, is the round's."""
    (run,) = command(monkeypatch, tmp_path, "rounds=2", "data/partitioner=linear")
    written = events(run)
    value = {
        tag: [event.value for event in written.Scalars(tag)]
        for tag in written.Tags()["scalars"]
    }
    from flwr_datasets.partitioner import LinearPartitioner

    from split_lightning.data import DigitsImages, SplitDataModule

    data = SplitDataModule(DigitsImages(), 10, LinearPartitioner, batch_size=32)
    data.setup("fit")
    sizes = [len(part) for part in data.parts]
    for round_index in range(2):
        losses = [value[f"clients/loss/{k}"][round_index] for k in range(10)]
        mean = sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / sum(sizes)
        assert value["train/loss"][round_index] == pytest.approx(mean, rel=1e-4)


def test_the_same_seed_gives_the_same_run(monkeypatch, tmp_path):
    ends, short = [], ["rounds=1", "trainer.limit_train_batches=8"]
    for seed in (1, 1, 2):
        folder = tmp_path / str(len(ends))
        folder.mkdir()
        (run,) = command(monkeypatch, folder, *short, f"seed={seed}")
        ends.append(load_file(run / "server.safetensors")["fc2.weight"])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def compose_test(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides)


def test_main_returns_the_monitored_metric(tmp_path):
    overrides = [
        f"output_dir={tmp_path}",
        "rounds=1",
        "trainer.limit_train_batches=8",
        "trainer.enable_progress_bar=false",
        *NO_PICTURES,
    ]
    value = main(compose_test(*overrides))
    results = json.loads((tmp_path / "results.json").read_text())
    assert value == results["val_accuracy"]
    value = main(compose_test(*overrides, "metric=val/loss"))
    assert value == json.loads((tmp_path / "results.json").read_text())["val_loss"]
    assert main(compose_test(*overrides, "data.val_share=0")) is None


def test_a_sweep_has_a_folder_for_each_run(monkeypatch, tmp_path):
    runs = command(
        monkeypatch,
        tmp_path,
        "-m",
        "rounds=1",
        "num_clients=3",
        "batch_size=128",
        "logger=none",
        "data/partitioner=iid,dirichlet",
        "data.val_share=0",
        "model.cut_layer=relu1,maxpool",
    )
    assert [run.name for run in runs] == ["0", "1", "2", "3"]
    up = [
        json.loads((run / "results.json").read_text())["uplink_bytes"] for run in runs
    ]
    assert up == [1437 * (16 * 64 * 4 + 8), 1437 * BYTES_UP] * 2


def test_the_hparams_search_is_a_grid(monkeypatch, tmp_path):
    begun = []

    def train(cfg):
        begun.append((cfg.optimizer.client.lr, cfg.optimizer.server.lr))
        return {}

    monkeypatch.setattr(training, "train", train)
    command(monkeypatch, tmp_path, "-m", "+hparams_search=learning_rates")
    assert begun == list(product([0.003, 0.01, 0.03], repeat=2))


@pytest.fixture
def _fake_torchvision(monkeypatch):
    """Random images in the place of torchvision's: nothing is downloaded."""
    shapes = {"CIFAR10": (3, 32, 32), "CIFAR100": (3, 32, 32)}

    def load(self, train):
        num_classes = 100 if self.name == "CIFAR100" else 10
        shape = shapes.get(self.name, (1, 28, 28))
        images = RandomImages(2000, 200, num_classes, shape)
        self.classes = images.classes
        return images.load(train)

    monkeypatch.setattr(TorchvisionImages, "load", load)


@pytest.mark.usefixtures("_fake_torchvision")
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs(monkeypatch, tmp_path, experiment):
    (run,) = command(
        monkeypatch, tmp_path, f"+experiment={experiment}", "trainer.fast_dev_run=true"
    )
    results = json.loads((run / "results.json").read_text())
    assert run.parent.name == experiment
    assert results["test_loss"] > 0
    if experiment == "centralized":
        assert results["uplink_bytes"] == results["handoff_bytes"] == 0
    if experiment != "centralized":  # ResNet-18 at `maxpool`: 64 x 8 x 8
        images = 128 if experiment != "rr10_dirichlet" else None
        expected = (64 * 8 * 8 * 4 + 8) * (images or results["uplink_bytes"] // 16_392)
        assert results["uplink_bytes"] == expected


def test_experiments_are_what_they_say():
    chosen = {
        name: compose_test(f"+experiment={name}", "output_dir=x")
        for name in EXPERIMENTS
    }
    assert set(EXPERIMENTS) == {
        "centralized",
        "notebook",
        "rr10",
        "rr10_dirichlet",
        "rr10_no_passing",
        "rr10_shards",
        "single",
    }
    for name, cfg in chosen.items():
        assert cfg.data.source.name == "CIFAR10"
        assert cfg.batch_size == 128
        assert cfg.optimizer.client.lr == cfg.optimizer.server.lr == 0.01
        assert cfg.model.network["_target_"] == "torchvision.models.resnet18"
        assert cfg.num_clients == (10 if name.startswith("rr10") else 1)
        assert cfg.rounds == (50 if name in ("single", "notebook") else 5)
    assert "DoubleSoftmax" in chosen["notebook"].model.criterion["_target_"]
    assert chosen["single"].model.criterion is None
    assert not chosen["rr10_no_passing"].protocol.enabled
    assert chosen["rr10"].protocol.enabled


def test_short_turns_are_a_round_robin_of_other_options():
    options = {
        "whole_shuffled": ["protocol.shuffle=true"],
        "five": ["local_steps=5"],
        "five_shuffled": ["local_steps=5", "protocol.shuffle=true"],
        "one": ["local_steps=1"],
        "one_shuffled": ["local_steps=1", "protocol.shuffle=true"],
    }
    folder = CONF / "protocol" / "turns"
    assert {path.stem for path in folder.glob("*.yaml")} == set(options)
    for name, typed in options.items():
        short, long = (
            OmegaConf.to_container(compose_test("output_dir=x", *words).protocol)
            for words in ([f"protocol=turns/{name}"], ["protocol=round_robin", *typed])
        )
        steps = compose_test("output_dir=x", *typed).local_steps
        long["local_steps"] = steps
        assert short == long


@pytest.mark.usefixtures("_fake_torchvision")
@pytest.mark.parametrize(
    ("data", "augmentation"),
    [
        ("cifar10", "none"),
        ("cifar10", "crop_flip"),
        ("cifar100", "crop"),
        ("mnist", "crop"),
        ("mnist", "crop_flip"),
        ("fashion_mnist", "none"),
    ],
)
def test_every_data_set_and_augmentation_runs(
    monkeypatch, tmp_path, data, augmentation
):
    (run,) = command(
        monkeypatch,
        tmp_path,
        f"data={data}",
        f"data/augmentation={augmentation}",
        "trainer.fast_dev_run=true",
    )
    assert json.loads((run / "results.json").read_text())["test_loss"] > 0


@pytest.mark.usefixtures("_fake_torchvision")
@pytest.mark.parametrize(
    "model", ["resnet18", "cifar_resnet18", "vgg11_bn", "mobilenet_v2"]
)
def test_every_model_runs(monkeypatch, tmp_path, model):
    (run,) = command(
        monkeypatch,
        tmp_path,
        "data=cifar10",
        f"model={model}",
        "batch_size=4",
        "trainer.fast_dev_run=true",
    )
    assert json.loads((run / "results.json").read_text())["uplink_bytes"] > 0


@pytest.mark.parametrize(
    ("partitioner", "num_clients"),
    [
        ("iid", 10),
        ("dirichlet", 10),
        ("shards", 10),
        ("pathological", 10),
        ("linear", 10),
        ("square", 10),
        ("exponential", 6),
    ],
)
def test_every_partitioner_runs(monkeypatch, tmp_path, partitioner, num_clients):
    (run,) = command(
        monkeypatch,
        tmp_path,
        f"data/partitioner={partitioner}",
        f"num_clients={num_clients}",
        "trainer.fast_dev_run=true",
    )
    assert json.loads((run / "results.json").read_text())["uplink_bytes"] > 0


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=adam"],
        ["optimizer=sgd_cosine"],
        ["optimizer_state=travel", "protocol.shuffle=true"],
        ["optimizer_state=reset", "clients_per_round=4"],
        ["data/partitioner=dirichlet", "clients_per_round=3", "local_epochs=2"],
        ["model.cut_layer=3"],
        ["model.gradient_clip_val=1.0", "model.accumulate_grad_batches=2"],
        ["trainer.precision=bf16-mixed"],
        ["protocol=centralized", "num_clients=1"],
        ["logger=none", "data.val_share=0"],
        [
            "~logger",
            "+logger.mine._target_=pytorch_lightning.loggers.CSVLogger",
            "+logger.mine.save_dir=csv",
        ],
        ["trainer.limit_val_batches=0"],
        ["callbacks=histograms", "callbacks.drift.server=true"],
    ],
    ids=lambda overrides: ",".join(overrides),
)
def test_what_can_be_chosen_runs_two_rounds(monkeypatch, tmp_path, overrides):
    few = ["rounds=2", "num_clients=5", "batch_size=64"]
    (run,) = command(monkeypatch, tmp_path, *few, *overrides)
    results = json.loads((run / "results.json").read_text())
    assert results["rounds"] == 2
    assert results["test_accuracy"] > 0.1


def test_the_table_names_what_to_look_at(monkeypatch, tmp_path, capsys):
    short = ["rounds=1", "trainer.limit_train_batches=2"]
    (run,) = command(monkeypatch, tmp_path, *short)
    printed = capsys.readouterr().out
    for words in (
        "test accuracy",
        "bytes up",
        "bytes of hand-offs",
        "images per second",
    ):
        assert words in printed
    assert f"tensorboard --logdir {run}" in printed


def test_a_missing_data_set_names_the_remedies(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.CIFAR10.download", refused)
    source = TorchvisionImages("CIFAR10", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data\.root=FOLDER.*data=digits"):
        source.load(train=True)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=resnet18"], ["samples of shape (1, 8, 8)", "model"]),
        (["model.network.num_classes=5"], ["10 logits", "(5,)"]),
        (["+hparams_search=learning_rates"], ["hparams_search", "-m"]),
        (["data.val_share=0.0001"], ["data.val_share", "0.0001"]),
        (["output_dir=/dev/null/x"], ["/dev/null/x"]),
    ],
    ids=lambda value: value[0],
)
def test_what_does_not_fit_together_gets_one_message(
    monkeypatch, tmp_path, capsys, overrides, words
):
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, *overrides)
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert all(word in message for word in words), message


def test_a_checkpoint_of_another_cut_is_refused(
    monkeypatch, tmp_path, capsys, finished
):
    path = finished / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, f"ckpt_path={path}", "model.cut_layer=relu1")
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "'relu1'" in message


def test_a_run_goes_on_from_last(monkeypatch, tmp_path):
    few = ["num_clients=3", "batch_size=128"]
    (run,) = command(monkeypatch, tmp_path, *few, "rounds=1", "name=half")
    goes_on = f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    command(monkeypatch, tmp_path, *few, "rounds=2", "name=whole")
    command(monkeypatch, tmp_path, *few, "rounds=2", "name=resumed", goes_on)
    whole, resumed = (
        next(tmp_path.glob(f"runs/{name}/*/server.safetensors"))
        for name in ("whole", "resumed")
    )
    for name, tensor in load_file(whole).items():
        assert torch.equal(load_file(resumed)[name], tensor), name


def test_best_is_the_best_by_validation(finished):
    accuracies = [event.value for event in events(finished).Scalars("val/accuracy")]
    best = torch.load(finished / "checkpoints" / "best.ckpt", weights_only=True)
    assert accuracies[best["epoch"]] == max(accuracies)
    last = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] == 9


def test_a_callback_that_is_null_is_left_out(monkeypatch, tmp_path):
    words = ["rounds=1", "trainer.limit_train_batches=2", "callbacks.history=null"]
    (folder,) = command(monkeypatch, tmp_path, *words)
    assert (folder / "results.json").exists()
    assert not (folder / "history.csv").exists()
