"""Sweeps: a run fails alone, and one comparison ends them all."""

import csv
import json
import math
import runpy
import statistics
import warnings
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from test_train import CONF, NO_PICTURES

from split_lightning.cli import train as train_module
from split_lightning.cli import training
from split_lightning.module import SplitLightningModule
from split_lightning.train import main

QUIET = ["trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"]
QUICK = [*QUIET, *NO_PICTURES, "rounds=1", "trainer.limit_train_batches=2"]
OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.direction=maximize"]


def sweep(monkeypatch, folder, *overrides):
    """Runs a sweep in this process; returns its exit status and its folder."""
    monkeypatch.chdir(folder)
    typed = ["split-lightning", "-m", *overrides, f"hydra.sweep.dir={folder}/sweep"]
    monkeypatch.setattr("sys.argv", typed)
    status = 0
    try:
        main()
    except SystemExit as stopped:
        status = stopped.code
    return status, folder / "sweep"


def table(folder, name="comparison.csv"):
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A real sweep of four runs on digits, of which two have an impossible client."""
    folder = tmp_path_factory.mktemp("mixed")
    overrides = ["num_clients=-3,3", "data/partitioner=iid,dirichlet", *QUICK]
    overrides += ["data.val_share=0.25"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        return sweep(monkeypatch, folder, *overrides)


def test_a_failing_run_ends_alone(mixed):
    status, folder = mixed
    assert status == 2  # each failed by a user's mistake
    rows = table(folder)
    assert [row["status"] for row in rows] == ["failed"] * 2 + ["finished"] * 2
    assert [row["num_clients"] for row in rows] == ["-3", "-3", "3", "3"]
    assert rows[0]["overrides"].startswith("num_clients=-3 data/partitioner=iid")
    assert "Expected `num_clients` to be an integer of at least 1" in rows[0]["error"]


def test_a_sweep_ends_with_the_figures_of_its_runs(mixed):
    _, folder = mixed
    for row in table(folder)[2:]:
        results = json.loads((folder / row["run"] / "results.json").read_text())
        for name in ("test_accuracy", "test_loss", "val_accuracy", "seconds"):
            assert float(row[name]) == results[name]
        parts = ("uplink_bytes", "downlink_bytes", "handoff_bytes")
        assert int(row["bytes"]) == sum(results[name] for name in parts)
    assert (folder / "comparison.png").stat().st_size > 1000


def test_only_what_was_swept_becomes_columns(mixed):
    _, folder = mixed
    columns = list(table(folder)[0])
    assert columns[:3] == ["run", "status", "overrides"]
    assert set(columns[3 : columns.index("test_accuracy")]) == {
        "num_clients",
        "data/partitioner",
    }


def test_every_run_of_a_sweep_is_complete(mixed):
    _, folder = mixed
    for name in ("2", "3"):
        left = {
            str(p.relative_to(folder / name))
            for p in folder.rglob("*.*")
            if folder / name in p.parents
        }
        assert left >= {
            "client.safetensors",
            "config.yaml",
            "results.json",
            "server.safetensors",
            "checkpoints/best.ckpt",
        }
    for name in ("0", "1"):
        failure = json.loads((folder / name / "failure.json").read_text())
        assert failure["mistake"]
        assert "Traceback" in failure["trace"]


def test_tensorboard_compares_the_runs_of_a_sweep(mixed):
    """Each run's files have its hyperparameters, which differ, and a real metric."""
    _, folder = mixed
    chosen = []
    for name in ("2", "3"):
        for file in (folder / name / "tensorboard").glob("events.*"):
            events = EventAccumulator(str(file)).Reload()
            found = events.summary_metadata.get("_hparams_/session_start_info")
            if found is not None:
                data = HParamsPluginData.FromString(found.plugin_data.content)
                hparams = data.session_start_info.hparams
                chosen.append(hparams["partitioner"].string_value)
                chosen.append(hparams["data.val_share"].number_value)
                assert hparams["num_clients"].number_value == 3
                assert "output_dir" not in hparams
                assert hparams["protocol"].string_value == "round_robin"
    assert chosen == ["iid", 0.25, "dirichlet", 0.25]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """The comparison of protocols, but for all but two tiny runs of two seeds."""
    overrides = ["+experiment=compare", "protocol=round_robin", "data/partitioner=iid"]
    overrides += ["seed=0,1", "rounds=1", "trainer.limit_train_batches=2"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        return sweep(monkeypatch, tmp_path_factory.mktemp("seeds"), *overrides)


def test_seeds_are_one_row_of_means(seeds):
    status, folder = seeds
    assert status == 0
    assert [row["seed"] for row in table(folder)] == ["0", "1"]
    (row,) = table(folder, "comparison_means.csv")
    assert (row["runs"], row["seed"]) == ("0 1", "0,1")
    results = [json.loads((folder / n / "results.json").read_text()) for n in "01"]
    for name in ("test_accuracy", "uplink_bytes", "handoffs"):
        found = [result[name] for result in results]
        assert float(row[name]) == statistics.fmean(found)
        assert float(row[f"{name}_std"]) == pytest.approx(statistics.stdev(found))


def test_runs_of_a_comparison_leave_figures_and_segments(seeds):
    _, folder = seeds
    left = {path.name for path in (folder / "0").iterdir()}
    assert left == {
        *(".hydra", "train.log", "config.yaml", "results.json", "history.csv"),
        *("client.safetensors", "server.safetensors"),
    }
    assert (folder / "comparison.png").stat().st_size > 1000
    assert list((folder / "comparison").glob("events.*"))


def params_of(experiment):
    cfg = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml")
    return {key: text.split(", ") for key, text in cfg.hydra.sweeper.params.items()}


def test_every_protocol_is_compared():
    params = params_of("compare")
    files = (CONF / "protocol").glob("*.yaml")
    assert set(params["protocol"]) == {path.stem for path in files}
    turns = {f"turns/{p.stem}" for p in (CONF / "protocol/turns").glob("*.yaml")}
    assert turns < set(params_of("compare_skewed")["protocol"])


@pytest.mark.parametrize("name", ["compare", "compare_skewed"])
def test_what_is_compared_has_one_budget(monkeypatch, tmp_path, name):
    """Each choice composes and passes the checks."""
    seen = []

    def train(cfg):
        seen.append(HydraConfig.get().runtime.choices.protocol)
        assert (cfg.num_clients, cfg.rounds, cfg.local_epochs) == (10, 5, 1)
        return {}

    monkeypatch.setattr(training, "train", train)
    pinned = ["seed=0", *(["data/partitioner=shards"] if name == "compare" else [])]
    assert sweep(monkeypatch, tmp_path, f"+experiment={name}", *pinned)[0] == 0
    assert seen == params_of(name)["protocol"]


def test_a_bug_is_traced_and_ends_no_sweep(monkeypatch, tmp_path, capsys):
    step = SplitLightningModule.training_step

    def broken(self, batch, batch_idx):
        if self.trainer.datamodule.num_clients == 3:
            raise ValueError("a bug")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SplitLightningModule, "training_step", broken)
    status, folder = sweep(monkeypatch, tmp_path, "num_clients=3,2", *QUICK)
    assert status == 1
    assert [row["status"] for row in table(folder)] == ["failed", "finished"]
    printed = capsys.readouterr()
    assert "Traceback" in printed.err
    end = printed.err[printed.err.index("failed: num_clients=3") :]
    assert f"ValueError: a bug\n  {folder / '0'}\n" in end
    assert "failed: num_clients=2" not in end


@pytest.fixture
def valued(monkeypatch):
    """Runs that train nothing and return what their client's learning rate asks for."""
    begun = []

    def train(cfg):
        begun.append(cfg.optimizer.client.lr)
        folder = Path(cfg.output_dir)
        OmegaConf.save(cfg, folder / "config.yaml")
        value = cfg.optimizer.client.lr
        special = {0.1: math.nan, 0.2: ValueError("a bug"), 0.3: KeyboardInterrupt()}
        value = special.get(value, value)
        if isinstance(value, BaseException):
            raise value
        if math.isfinite(value):
            results = {"val_accuracy": value, "test_accuracy": value}
            (folder / "results.json").write_text(json.dumps(results))
        return {"val_accuracy": value if value != 0.4 else None}

    monkeypatch.setattr(training, "train", train)
    return begun


def test_later_batches_run_though_one_failed(monkeypatch, tmp_path, valued):
    typed = ["optimizer.client.lr=0.2,0.5,0.6", "hydra.sweeper.max_batch_size=1"]
    status, folder = sweep(monkeypatch, tmp_path, *typed)
    assert status == 1
    assert valued == [0.2, 0.5, 0.6]
    statuses = [row["status"] for row in table(folder)]
    assert statuses == ["failed", "finished", "finished"]


def test_optuna_goes_on_past_what_is_no_number(monkeypatch, tmp_path, valued):
    """NaN, which its plugin cannot take; nothing measured; an exception."""
    search = ["optimizer.client.lr=choice(0.1,0.2,0.4,0.5)", "hydra.sweeper.n_jobs=1"]
    some = ["hydra.sweeper.sampler.seed=6", "hydra.sweeper.n_trials=5"]
    status, folder = sweep(monkeypatch, tmp_path, *OPTUNA, *search, *some)
    assert status == 1
    assert len(valued) == 5
    assert set(valued) == {0.1, 0.2, 0.4, 0.5}
    best = OmegaConf.load(folder / "optimization_results.yaml")
    assert best.best_params["optimizer.client.lr"] == best.best_value == 0.5
    errors = {float(r["optimizer.client.lr"]): r["error"] for r in table(folder)}
    assert "`metric=val/accuracy` to be a finite number" in errors[0.1]
    assert "but got nan" in errors[0.1]
    assert errors[0.2] == "ValueError: a bug"
    assert "but got no value" in errors[0.4]


@pytest.mark.parametrize("rate", ["0", "0.5"])
def test_a_failure_rate_that_was_chosen_holds(monkeypatch, tmp_path, valued, rate):
    search = [*OPTUNA, "optimizer.client.lr=choice(0.2)", "hydra.sweeper.n_jobs=1"]
    rate = f"hydra.sweeper.max_failure_rate={rate}"
    with pytest.raises(ValueError, match="a bug"):
        sweep(monkeypatch, tmp_path, *search, rate)
    assert valued == [0.2]  # of 20 trials
    assert [row["status"] for row in table(tmp_path / "sweep")] == ["failed"]


def test_an_interrupt_ends_the_sweep_with_a_table(monkeypatch, tmp_path, valued):
    with pytest.raises(KeyboardInterrupt):
        sweep(monkeypatch, tmp_path, "optimizer.client.lr=0.5,0.3,0.6")
    assert valued == [0.5, 0.3]
    rows = table(tmp_path / "sweep")
    assert [row["status"] for row in rows] == ["finished", "unfinished"]


def test_a_sweep_into_the_same_folder_forgets_failures(monkeypatch, tmp_path, valued):
    assert sweep(monkeypatch, tmp_path, "optimizer.client.lr=0.2,0.5")[0] == 1
    status, folder = sweep(monkeypatch, tmp_path, "optimizer.client.lr=0.6,0.5")
    assert status == 0
    assert [row["status"] for row in table(folder)] == ["finished", "finished"]


@pytest.mark.parametrize("metric", ["val/accuracy", "val/loss"])
def test_the_search_goes_in_the_direction_of_its_metric(
    monkeypatch, tmp_path, capsys, valued, metric
):
    def train(cfg):
        valued.append(cfg.optimizer.client.lr)
        return {metric.replace("/", "_"): cfg.optimizer.client.lr}

    monkeypatch.setattr(training, "train", train)
    search = ["+hparams_search=optuna", f"metric={metric}", "hydra.sweeper.n_trials=3"]
    status, folder = sweep(monkeypatch, tmp_path, *search)
    assert status == 0
    assert len(valued) == 3
    best = OmegaConf.load(folder / "optimization_results.yaml").best_value
    assert best == (max if metric == "val/accuracy" else min)(valued)
    valued.clear()
    wrong = "minimize" if metric == "val/accuracy" else "maximize"
    status, _ = sweep(
        monkeypatch, tmp_path, *search, f"hydra.sweeper.direction={wrong}"
    )
    assert status == 2
    assert not valued
    message = capsys.readouterr().err
    assert f"metric={metric}" in message
    assert f"but got {wrong}" in message


def test_optunas_own_direction_is_no_trap(monkeypatch, tmp_path, capsys, valued):
    """It minimizes unless told otherwise: the accuracy, here."""
    status, _ = sweep(monkeypatch, tmp_path, "hydra/sweeper=optuna", "rounds=choice(1)")
    assert status == 2
    assert "`hydra.sweeper.direction` to be maximize" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["+hparams_search=optuna"], ["hparams_search", "-m"]),
        (["+experiment=compare"], ["experiment", "-m"]),
        (["-m", "hydra/launcher=ray"], ['pip install "hydra-ray-launcher"']),
    ],
)
def test_what_a_search_needs_is_named(monkeypatch, tmp_path, capsys, typed, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["split-lightning", *typed])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert message.count("\n") == 1


def test_a_missing_extra_is_named(monkeypatch, tmp_path, capsys):
    from hydra.core.config_store import ConfigStore

    groups = ConfigStore.instance().repo["hydra"]["sweeper"]
    monkeypatch.delitem(groups, "optuna.yaml")
    monkeypatch.setattr("hydra.core.plugins.Plugins._initialize", lambda self: None)
    status, _ = sweep(monkeypatch, tmp_path, "+hparams_search=optuna")
    assert status == 2
    assert 'pip install "split-lightning[sweep]"' in capsys.readouterr().err


BOTH = "num_clients=-3,2"
LAUNCHERS = {  # as few processes as can be: each imports torch
    "joblib": ["hydra.launcher.n_jobs=2", "hydra.launcher.batch_size=2", BOTH],
    "submitit_local": ["hydra.launcher.timeout_min=5", "num_clients=2"],
    "ray": ["+hydra.launcher.ray.init.num_cpus=1", BOTH],
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_run_in_other_processes(monkeypatch, tmp_path, name):
    """A run that fails there ends alone, too, and one that trains is complete."""
    plugin = name.removesuffix("_local")
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    monkeypatch.setattr(training, "train", None)  # nothing is trained in this one
    typed = [f"hydra/launcher={name}", *LAUNCHERS[name], *QUICK]
    status, folder = sweep(monkeypatch, tmp_path, *typed)
    *failed, finished = table(folder)
    assert status == (2 if failed else 0)
    assert len(failed) == (BOTH in typed)
    for row in failed:
        assert row["status"] == "failed"
        assert "Expected `num_clients` to be an integer" in row["error"]
    assert finished["status"] == "finished"
    assert 0.0 < float(finished["test_accuracy"]) < 1.0
    assert (folder / finished["run"] / "client.safetensors").is_file()


def test_what_launchers_send_to_other_processes_is_found_there_by_name(monkeypatch):
    """With `python -m`, too: nothing of `__main__` can be pickled by name."""
    sent = []
    monkeypatch.setattr(train_module, "run_hydra", lambda main, *_: sent.append(main))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it is imported already
        runpy.run_module("split_lightning.train", run_name="__main__")
    assert [task.__module__ for task in sent] == ["split_lightning.cli.train"]
