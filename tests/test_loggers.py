"""Loggers: one, several or none; each gets figures, choices and pictures."""

import csv
import json
import time

import pytest
import yaml
from test_train import command, events

from split_lightning.train import main

SHORT = [
    "rounds=1",
    "num_clients=2",
    "batch_size=512",  # four batches
    "trainer.limit_test_batches=1",
    "trainer.enable_checkpointing=false",
]
PICTURES = {"data/partition", "clients/by_round", "val/confusion", "test/confusion"}


def run_with(monkeypatch, folder, *overrides, pictures=False):
    (run,) = command(monkeypatch, folder, *SHORT, *overrides, pictures=pictures)
    return run


def measured(run):
    results = json.loads((run / "results.json").read_text())
    names = ("test/accuracy", "test/loss", "val/accuracy", "val/loss")
    return {name: pytest.approx(results[name.replace("/", "_")]) for name in names}


def csv_figures(file):
    """The last value of each column."""
    found = {}
    with file.open(newline="") as text:
        for row in csv.DictReader(text):
            found |= {name: float(value) for name, value in row.items() if value}
    return found


def until_written(file, names):
    """The names in a file that another process, W&B's, writes; waits for them."""
    for _ in range(200):
        content = file.read_bytes()
        found = {name for name in names if name.encode() in content}
        if found == set(names):
            break
        time.sleep(0.1)
    return found


@pytest.mark.parametrize(
    ("logger", "left"),
    [
        ("logger=none", set()),
        ("logger=[]", set()),
        ("~logger", set()),
        ("logger.tensorboard=null", set()),
        ("logger=csv", {"csv"}),
        ("logger=tensorboard", {"tensorboard"}),
        ("logger=[tensorboard,csv]", {"tensorboard", "csv"}),
        ("logger=[none,csv]", {"csv"}),
    ],
)
def test_a_run_has_the_loggers_that_were_chosen(monkeypatch, tmp_path, logger, left):
    run = run_with(monkeypatch, tmp_path, logger)
    assert {"tensorboard", "csv"} & {path.name for path in run.iterdir()} == left


def test_several_loggers_get_the_same(monkeypatch, tmp_path):
    typed = ["logger=[tensorboard,csv]", "logger.csv.name=table", "data.val_share=0.2"]
    run = run_with(monkeypatch, tmp_path, *typed, "topology=u_shaped")
    written = events(run)
    table = csv_figures(run / "table" / "version_0" / "metrics.csv")
    scalars = {tag: written.Scalars(tag)[-1].value for tag in written.Tags()["scalars"]}
    assert set(scalars) == set(table) - {"step"}
    for name, value in scalars.items():
        assert table[name] == pytest.approx(value, rel=1e-4), name
    figures = measured(run)
    assert {name: table[name] for name in figures} == figures
    choices = yaml.safe_load((run / "table/version_0/hparams.yaml").read_text())
    assert choices == yaml.safe_load((run / "tensorboard/hparams.yaml").read_text())
    assert (choices["protocol"], choices["topology"]) == ("round_robin", "u_shaped")
    assert choices["data.val_share"] == 0.2
    assert "logger" not in choices


def test_an_experiment_without_loggers_can_be_given_some(monkeypatch, tmp_path):
    sweep = ["protocol=gpsl", "data/partitioner=iid", "seed=0", "logger=[csv]"]
    typed = ["-m", "+experiment=compare", *sweep, *SHORT]
    (run,) = command(monkeypatch, tmp_path, *typed, pictures=True)
    assert (run / "csv" / "version_0" / "metrics.csv").is_file()


def test_wandb_offline(monkeypatch, tmp_path):
    """Each run is one of its own, though one process does both."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        run = run_with(monkeypatch, folder, "logger=wandb", f"seed={seed}", pictures=1)
        (record,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
        names = ("val/accuracy", "test/loss", "clients/loss/1", "round_robin")
        assert set(names) == until_written(record, names)
        media = record.parent / "files" / "media" / "images"
        found = {str(file.relative_to(media)) for file in media.rglob("*.png")}
        assert {
            name.rpartition("_")[0].rpartition("_")[0] for name in found
        } == PICTURES


def test_mlflow_offline(monkeypatch, tmp_path):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    typed = ["logger=[csv,mlflow]", "logger.mlflow.run_name=first"]
    run = run_with(monkeypatch, tmp_path, *typed, pictures=True)
    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    table = csv_figures(run / "csv" / "version_0" / "metrics.csv")
    del table["step"]
    assert found.data.metrics == pytest.approx(table)
    assert found.data.params["protocol"] == "round_robin"
    kept = run / "mlflow" / found.info.run_id / "artifacts"
    files = {str(path.relative_to(kept)) for path in kept.rglob("*.png")}
    assert files == {f"{name}.png" for name in PICTURES}
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named(monkeypatch, tmp_path, capsys, name):
    monkeypatch.setattr(
        f"pytorch_lightning.loggers.{name}._{name.upper()}_AVAILABLE", 0
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["split-lightning", *SHORT, f"logger=[csv,{name}]"])
    with pytest.raises(SystemExit) as stopped:
        main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert f'pip install "split-lightning[{name}]"' in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_tensorboard_shows_the_choices_once_and_with_real_metrics(
    monkeypatch, tmp_path
):
    """No tag twice, no metric without a value, and the protocol among the choices."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run = run_with(monkeypatch, tmp_path, "protocol=centralized")
    written = events(run)
    scalars = written.Tags()["scalars"]
    assert not [tag for tag in scalars if tag.startswith(("test_", "val_", "hp_"))]
    assert len(written.Scalars("test/accuracy")) == 1

    def plugin_data(name):
        metadata = written.summary_metadata[f"_hparams_/{name}"]
        return HParamsPluginData.FromString(metadata.plugin_data.content)

    infos = plugin_data("experiment").experiment.metric_infos
    shown = {info.name.tag for info in infos}
    assert shown == {f"{p}/{n}" for p in ("test", "val") for n in ("accuracy", "loss")}
    assert shown <= set(scalars)
    choices = plugin_data("session_start_info").session_start_info.hparams
    assert choices["protocol"].string_value == "centralized"
    assert choices["topology"].string_value == "unsplit"


def test_a_run_that_goes_on_keeps_what_loggers_had(monkeypatch, tmp_path, recwarn):
    here = [f"hydra.run.dir={tmp_path}/runs/a", "logger=[tensorboard,csv]"]
    here += ["trainer.enable_checkpointing=null"]
    run = run_with(monkeypatch, tmp_path, *here)
    run_with(monkeypatch, tmp_path, *here, "rounds=2", "ckpt_path=last")
    for part in ("version_0", "version_1"):
        assert csv_figures(run / "csv" / part / "metrics.csv")["val/accuracy"]
    steps = [event.step for event in events(run).Scalars("val/accuracy")]
    assert steps == [3, 7]
    assert not [w for w in recwarn if "Checkpoint directory" in str(w.message)]
