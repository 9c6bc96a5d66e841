"""A finished run, tested again from its folder alone."""

import csv
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from split_lightning import DigitsImages, export, train
from split_lightning.cli.building import build_module
from split_lightning.evaluate import main
from split_lightning.models import DigitsCNN
from split_lightning.runs import load_run
from split_lightning.runs.run_files import read_config, read_results

CONF = Path(__file__).parent.parent / "conf"
QUICK = [
    "rounds=1",
    "num_clients=4",
    "trainer.limit_train_batches=20",
    "logger=none",
    "~callbacks.partition_picture",
]
QUIET = ["trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"]
CENTRALIZED = ["protocol=centralized", "num_clients=1"]


def trained(folder, *overrides):
    """Trains from Python, without a Hydra application; returns the run's folder."""
    words = [f"output_dir={folder}", *QUICK, *QUIET, *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", words)
    train.main(cfg)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "split": trained(folder / "split"),
        "centralized": trained(folder / "centralized", *CENTRALIZED),
    }


@pytest.fixture
def run(runs, tmp_path):
    """Returns a copy, at another place than it was trained at, of the split run."""
    return shutil.copytree(runs["split"], tmp_path / "moved")


@pytest.fixture
def refused(capsys):
    """Evaluates; returns the one message that stops it."""

    def evaluate(*words):
        with pytest.raises(SystemExit) as stopped:
            main(list(words))
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert message.count("split-lightning: error: ") == 1
        assert "Traceback" not in message
        return message

    return evaluate


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", [main, export.main])
def test_an_interruption_ends_with_one_line(
    run, tmp_path, capsys, monkeypatch, command, number
):
    def interrupt(*_):
        os.kill(os.getpid(), number)

    monkeypatch.setattr("split_lightning.SplitDataModule.prepare_data", interrupt)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        command([f"run={run}", f"output_dir={tmp_path / 'out'}"])
    assert stopped.value.code == 128 + number
    assert capsys.readouterr().err.strip() == f"{number.name}: nothing is complete."
    assert not list((tmp_path / "out").rglob("*.json"))
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("kind", ["split", "centralized"])
def test_the_figures_are_those_of_training_bit_for_bit(runs, tmp_path, capsys, kind):
    expected = read_results(runs[kind])
    capsys.readouterr()
    main([f"run={runs[kind]}", f"output_dir={tmp_path}"])
    results = read_results(tmp_path)
    printed = capsys.readouterr().out
    for key in ("test_accuracy", "test_loss"):
        assert results[key] == expected[key]
        assert f"{expected[key]:.4f}" in printed
    assert results["images"] == 360
    assert results["weights"] == "final"


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.precision=64-true", "trainer.limit_test_batches=3", "batch_size=16"],
        [
            "trainer.precision=bf16-mixed",
            "model.channels_last=true",
            "protocol.enabled=false",
            "+model.criterion._target_=torch.nn.MultiMarginLoss",
        ],
    ],
    ids=lambda overrides: overrides[0],
)
def test_runs_that_were_configured_otherwise(tmp_path, overrides):
    trained(tmp_path, *overrides)
    main([f"run={tmp_path}"])
    results, expected = read_results(tmp_path / "evaluation"), read_results(tmp_path)
    assert results["test_loss"] == expected["test_loss"]
    assert results["test_accuracy"] == expected["test_accuracy"]


def test_runs_of_a_sweep_need_nothing_of_hydra(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [
        "-m",
        "seed=1,2",
        "callbacks.best.filename=best_${hydra:job.num}_${now:%Y}",
    ]
    monkeypatch.setattr("sys.argv", ["split-lightning", *words, *QUICK, *QUIET])
    train.main()
    folders = sorted(path.parent for path in tmp_path.rglob("results.json"))
    assert len(folders) == 2
    for number, folder in enumerate(folders):
        written = (folder / "config.yaml").read_text()
        assert "${hydra:" not in written
        assert "${now:" not in written
        cfg = read_config(folder)
        assert cfg.callbacks.best.filename.startswith(f"best_{number}_20")
        assert cfg.datamodule.seed == cfg.seed == number + 1
        assert cfg.output_dir == str(folder)
    main([f"run={folders[1]}"])
    evaluated = read_results(folders[1] / "evaluation")
    assert evaluated["test_loss"] == read_results(folders[1])["test_loss"]


def test_classes_and_confusion_are_those_of_the_unsplit_network(run):
    main([f"run={run}"])
    network, images = DigitsCNN().eval(), DigitsImages().load(train=False)
    parts = [load_file(run / f"{side}.safetensors") for side in ("client", "server")]
    network.load_state_dict(parts[0] | parts[1])
    with torch.no_grad():
        told = network((images.inputs.float() / 255 - 0.5) / 0.5).argmax(1)
    pairs = zip(images.targets.tolist(), told.tolist(), strict=True)
    expected = [[0] * 10 for _ in range(10)]
    for true, predicted in pairs:
        expected[true][predicted] += 1
    with (run / "evaluation" / "confusion.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header[1:] == [row[0] for row in rows] == list("0123456789")
    assert [[int(count) for count in row[1:]] for row in rows] == expected
    with (run / "evaluation" / "classes.csv").open() as file:
        classes = list(csv.DictReader(file))
    for k, row in enumerate(classes):
        right, column = expected[k][k], sum(line[k] for line in expected)
        assert int(row["images"]) == sum(expected[k])
        assert float(row["accuracy"]) == pytest.approx(right / sum(expected[k]))
        assert float(row["precision"]) == pytest.approx(right / column)
        assert float(row["f1"]) == pytest.approx(
            2 * right / (sum(expected[k]) + column)
        )
    assert (run / "evaluation" / "confusion.png").read_bytes()[1:4] == b"PNG"


def test_a_checkpoint_has_a_folder_of_its_own(run):
    main([f"run={run}", "checkpoint=best"])
    results = read_results(run / "evaluation_best")
    assert results["weights"] == "best"
    state = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    module = load_run(run, checkpoint="best")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state["state_dict"][name])
    main([f"run={run}", f"checkpoint={run}/checkpoints/last.ckpt"])
    last = read_results(run / "evaluation_last")
    assert last["test_loss"] == read_results(run)["test_loss"]
    assert not (run / "evaluation").exists()


def test_the_run_is_not_touched_where_another_place_is_named(run, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in [run, *run.rglob("*")]}
    main([f"run={run}", f"output_dir={tmp_path}/elsewhere"])
    assert {p: p.stat().st_mtime_ns for p in [run, *run.rglob("*")]} == before
    assert (tmp_path / "elsewhere" / "confusion.png").exists()


def test_keys_of_the_run_can_be_changed(run):
    main([str(run), "batch_size=7", "trainer.limit_test_batches=3"])
    assert read_results(run / "evaluation")["images"] == 21


def test_the_folder_as_a_library(run):
    module = load_run(run)
    assert not module.training
    images = DigitsImages().load(train=False)
    with torch.no_grad():
        logits = module((images.inputs.float() / 255 - 0.5) / 0.5)
    accuracy = (logits.argmax(1) == images.targets).float().mean().item()
    assert accuracy == pytest.approx(read_results(run)["test_accuracy"])
    with pytest.raises(ValueError, match=r"there is no folder '/nowhere'"):
        read_results("/nowhere")


MISTAKES = {
    "": ["Expected `run`", "got nothing"],
    "/nowhere": ["`run`", "there is no folder '/nowhere'"],
    "RUN run=RUN": ["Expected `run`", "one run"],
    "run=/": ["`run`", "/ has no config.yaml"],
    "run=RUN,/": ["Expected `run`", "one run"],
    "run=RUN checkpoint=bst": ["`checkpoint`", "best, last", "'bst'"],
    "run=RUN checkpoint=RUN/results.json": ["results.json", "without unpickling"],
    "run=RUN seed=3": ["`seed=3` would change nothing", "evaluate does not use"],
    "run=RUN optimizer.client.lr=1": ["optimizer.client.lr=1", "nothing"],
    "run=RUN trainer.max_epochs=1": ["trainer.max_epochs=1", "nothing"],
    "run=RUN model.weights=x": ["model.weights=x", "nothing"],
    "run=RUN hydra.run.dir=x": ["hydra.run.dir=x", "nothing"],
    "run=RUN +foo=1": ["+foo=1", "would change nothing"],
    "run=RUN foo=1": ["`foo=1`", "Keys of a run: name"],
    "run=RUN ckpt_path=x": ["evaluate does not use", "Keys of evaluate: "],
    "run=RUN trainer.acelerator=cpu": ["`trainer.accelerator`"],
    "run=RUN batch_size=abc": ["`batch_size`", "int", "'abc'"],
    "run=RUN batch_size=0": ["batch_size", "positive", "0"],
    "run=RUN data=mnist": ["`data=mnist`", "data.KEY=VALUE"],
    "run=RUN trainer=null": ["`trainer=null`", "trainer.KEY=VALUE"],
    "run=RUN data/partitioner=iid": ["`data/partitioner=iid`"],
    "run=RUN trainer.devices=2": ["one device"],
    "run=RUN trainer.limit_test_batches=0": ["trainer.limit_test_batches", "got 0"],
    "run=RUN model.cut_layer=relu1": ["client.safetensors", "`bn2", "not fit"],
    "run=RUN output_dir=RUN/config.yaml/x": ["output_dir", "config.yaml"],
    "run=RUN batch_size": ["got `batch_size`, which has no `=`"],
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_gets_one_message(refused, runs, typed):
    message = refused(*typed.replace("RUN", str(runs["split"])).split())
    for words in MISTAKES[typed]:
        assert words in message, message


def _tear(run):
    file = run / "server.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _misfit(run):
    save_file({"conv1.weight": torch.zeros(1)}, run / "client.safetensors")


DAMAGES = {
    "torn": (_tear, ["server.safetensors", "torn"]),
    "missing": (lambda run: (run / "client.safetensors").unlink(), ["checkpoint=last"]),
    "misfit": (_misfit, ["`conv1.weight` is (1,), not (16, 1, 3, 3)", "missing"]),
    "no config": (lambda run: (run / "config.yaml").unlink(), ["no config.yaml"]),
    "torn config": (
        lambda run: (run / "config.yaml").write_text("name: [x"),
        ["config.yaml cannot be read"],
    ),
    "another config": (
        lambda run: (run / "config.yaml").write_text("name: x"),
        ["config.yaml", "of a run"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_gets_one_message(refused, run, damage):
    spoil, words = DAMAGES[damage]
    spoil(run)
    message = refused(f"run={run}")
    assert all(word in message for word in words), message


def test_help_names_the_keys(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["split-lightning", "--help"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().out
    assert all(key in printed for key in ("run=FOLDER", "checkpoint=", "output_dir="))


def test_training_starts_from_the_weights_of_a_run(runs, tmp_path):
    """In each protocol; with a learning rate of 0 only BatchNorm's statistics move."""
    split = runs["split"]
    weights = load_file(split / "client.safetensors")
    weights |= load_file(split / "server.safetensors")
    save_file(weights, tmp_path / "network.safetensors")
    still = ["optimizer.server.lr=0", "trainer.limit_train_batches=1"]
    for name, source, overrides in (
        ("split", split, ["optimizer.client.lr=0"]),
        ("centralized", tmp_path / "network.safetensors", CENTRALIZED),
    ):
        words = [f"model.weights={source}", *still, *overrides]
        started = trained(tmp_path / name, *words)
        files = started.glob("*.safetensors")
        saved = {k: v for file in files for k, v in load_file(file).items()}
        for key, tensor in weights.items():
            if "running" not in key and "num_batches" not in key:
                assert torch.equal(saved[key], tensor), key


def test_training_goes_on_from_the_same_logits(runs):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = [f"model.weights={runs['split']}", "output_dir=x"]
        started = build_module(compose("train", words)).eval()
    images = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(started(images), load_run(runs["split"])(images))


def test_weights_that_do_not_fit_stop_training(refused_training, runs, tmp_path):
    words = ["model.network.num_classes=5", f"model.weights={runs['split']}"]
    message = refused_training(*words)
    assert "`fc2.weight` is (10, 64), not (5, 64)" in message
    assert "model.weights_exclude" in message
    assert "`model.weights`" in refused_training("model.weights=/nowhere.pth")
    message = refused_training(
        f"model.weights={runs['split']}", "model.weights_exclude=[x]"
    )
    assert "`model.weights_exclude`" in message
    assert "would change nothing" in refused_training("model.weights_exclude=[fc2]")


@pytest.fixture
def refused_training(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    def start(*words):
        monkeypatch.setattr("sys.argv", ["split-lightning", *words, *QUIET])
        with pytest.raises(SystemExit) as stopped:
            train.main()
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return start
