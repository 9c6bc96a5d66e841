"""What runs' folders tell, complete or not."""

import pytest
from made_up import a_run, config, results
from omegaconf import OmegaConf

from split_lightning.runs.comparison import find_runs, read_run


def test_runs_are_found_at_any_depth_in_order_and_once(tmp_path):
    for name in ("10", "2", "deep/er/0"):
        a_run(tmp_path / "sweep" / name)
    runs = find_runs([tmp_path, tmp_path / "sweep" / "2"])
    assert [run.name for run in runs] == ["2", "10", "deep/er/0"]
    (single,) = find_runs([tmp_path / "sweep" / "10"])
    assert single.name == "10"


def test_a_run_inside_a_run(tmp_path):
    a_run(tmp_path / "a")
    a_run(tmp_path / "a" / "b")
    assert [run.name for run in find_runs([tmp_path])] == ["a", "a/b"]


def test_how_a_run_ended(tmp_path):
    a_run(tmp_path / "finished", results=results(0.9), history=[0.5, 0.7, 0.9])
    a_run(tmp_path / "killed", history=[0.5, 0.7])
    a_run(tmp_path / "new")
    a_run(tmp_path / "failed", failure={"error": "too large", "mistake": True})
    runs = {run.name: run for run in find_runs([tmp_path])}
    assert {name: run.status for name, run in runs.items()} == {
        "failed": "failed",
        "finished": "finished",
        "killed": "unfinished",
        "new": "unfinished",
    }
    assert (runs["failed"].error, runs["failed"].mistake) == ("too large", True)
    finished = runs["finished"].figures()
    assert finished["test_accuracy"] == 0.9
    assert finished["bytes"] == 5500
    killed = runs["killed"].figures()  # those of its last round
    assert (killed["val_accuracy"], killed["rounds_done"]) == (0.7, 2)
    assert (killed["bytes"], killed["seconds"]) == (2 * 1900, 5.0)
    assert killed["test_accuracy"] is None
    assert set(runs["new"].figures().values()) == {None}


def test_what_was_not_measured_is_none(tmp_path):
    a_run(tmp_path, results={**results(0.9), "val_accuracy": None}, history=["", 0.5])
    run = read_run(tmp_path)
    assert run.figures()["val_accuracy"] is None
    assert run.history["val_accuracy"].isna().tolist() == [True, False]
    assert run.history["handoff_bytes"].isna().all()


def test_a_half_written_history_is_read_as_far_as_it_goes(tmp_path):
    a_run(tmp_path, history=[0.5, 0.7])
    file = tmp_path / "history.csv"
    file.write_text(file.read_text() + "3,0.1")
    assert list(read_run(tmp_path).history["round"]) == [1, 2, 3]
    assert read_run(tmp_path).history["val_accuracy"].isna().tolist() == [0, 0, 1]
    file.write_text("")
    assert read_run(tmp_path).history.empty


@pytest.mark.parametrize("name", ["config.yaml", "results.json", "failure.json"])
def test_a_broken_file_is_shown_and_ends_nothing(tmp_path, name):
    a_run(tmp_path / "good", results=results(0.9))
    a_run(tmp_path / "bad", results=results(0.9))
    (tmp_path / "bad" / name).write_text("{ [")
    runs = {run.name: run for run in find_runs([tmp_path])}
    assert runs["good"].status == "finished"
    assert runs["bad"].status == "unreadable"
    assert str(tmp_path / "bad") in runs["bad"].error


def test_the_file_with_interpolations_is_read(tmp_path):
    """A configuration that was saved resolved repeats each value where it is used."""
    cfg = OmegaConf.create(config(tmp_path, lr=0.3))
    a_run(tmp_path, cfg=OmegaConf.to_container(cfg, resolve=True))
    assert "module.client_optimizer.lr" in read_run(tmp_path).settings
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(cfg, tmp_path / ".hydra" / "config.yaml")
    assert "module.client_optimizer.lr" not in read_run(tmp_path).settings
    assert read_run(tmp_path).settings["optimizer.client.lr"].value == 0.3


def test_other_configurations_are_no_runs(tmp_path):
    a_run(tmp_path / "other", cfg={"some": "tool"})
    with pytest.raises(ValueError, match=r"`folders` to hold runs .* found none in"):
        find_runs([tmp_path])


def test_what_is_no_folder_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"`folders` to be folders, but got '.*nowhere'"
    ):
        find_runs([tmp_path / "nowhere"])
