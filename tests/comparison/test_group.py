"""Runs that differ in nothing but their seed."""

import statistics

import pytest
from made_up import a_run, config, results

from split_lightning.comparison import differing_settings, find_runs, grouped


def groups_of(folder):
    runs = find_runs([folder])
    groups = grouped(runs, differing_settings([run.settings for run in runs]))
    return {tuple(run.name for run in group.runs): group for group in groups}


def run_of(folder, name, accuracy=None, history=None, failure=None, **changes):
    found = None if accuracy is None else results(accuracy)
    a_run(folder / name, config(folder / name, **changes), found, history, failure)


def test_runs_of_other_seeds_are_one_group_and_of_other_settings_are_not(tmp_path):
    for name, lr, seed in (("a", 0.1, 0), ("b", 0.2, 0), ("c", 0.1, 7), ("d", 0.2, 1)):
        run_of(tmp_path, name, 0.5, lr=lr, seed=seed)
    groups = groups_of(tmp_path)
    assert list(groups) == [("a", "c"), ("b", "d")]
    assert groups["a", "c"].name == "a +1"
    assert groups["a", "c"].shown("seed") == "0,7"
    assert groups["b", "d"].shown("optimizer.client.lr") == "0.2"


def test_what_follows_from_the_seed_parts_no_group(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        run_of(tmp_path, name, 0.5, seed=seed, own={"seed": "${seed}"})
    assert list(groups_of(tmp_path)) == [("a", "b")]


def test_a_seed_of_its_own_does(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        run_of(tmp_path, name, 0.5, seed=seed, own={"seed": 5 * seed})
    assert list(groups_of(tmp_path)) == [("a",), ("b",)]


def test_a_run_that_was_repeated_counts_once_in_each_group(tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("c", 0), ("d", 1), ("e", 1)):
        run_of(tmp_path, name, 0.5, seed=seed)
    assert list(groups_of(tmp_path)) == [("a", "b"), ("c", "d"), ("e",)]


def test_a_run_that_failed_is_no_part_of_a_mean(tmp_path):
    run_of(tmp_path, "a", 0.5, seed=0)
    run_of(tmp_path, "b", 0.7, seed=1)
    run_of(tmp_path, "c", failure={"error": "full", "mistake": False}, seed=2)
    run_of(tmp_path, "d", history=[0.1], seed=3)
    groups = groups_of(tmp_path)
    assert {names: group.status for names, group in groups.items()} == {
        ("a", "b"): "finished",
        ("c",): "failed",
        ("d",): "unfinished",
    }


def test_runs_without_settings_stay_alone(tmp_path):
    for name in ("a", "b"):
        run_of(tmp_path, name, failure={"error": "x"})
        (tmp_path / name / "config.yaml").unlink()
    assert list(groups_of(tmp_path)) == [("a",), ("b",)]


def test_means_and_sample_deviations(tmp_path):
    accuracies = [0.5, 0.6, 0.9]
    for seed, accuracy in enumerate(accuracies):
        run_of(tmp_path, str(seed), accuracy, [0.1, accuracy], seed=seed)
    (group,) = groups_of(tmp_path).values()
    assert group.means()["test_accuracy"] == pytest.approx(2.0 / 3)
    spread = group.deviations()["test_accuracy"]
    assert spread == pytest.approx(statistics.stdev(accuracies))
    assert (group.means()["bytes"], group.deviations()["bytes"]) == (5500, 0)
    means, deviations = group.history()[1]
    assert (means["round"], means["uplink_bytes"]) == (2, 2000)
    assert means["val_accuracy"] == pytest.approx(2.0 / 3)
    assert deviations["val_accuracy"] == pytest.approx(spread)


def test_one_run_has_its_own_figures_and_no_deviation(tmp_path):
    run_of(tmp_path, "a", 0.5, [0.4, 0.5])
    (group,) = groups_of(tmp_path).values()
    assert group.means() == group.runs[0].figures()
    assert set(group.deviations().values()) == {None}
    assert [means["val_accuracy"] for means, _ in group.history()] == [0.4, 0.5]


def test_a_mean_is_of_all_runs_or_there_is_none(tmp_path):
    run_of(tmp_path, "a", history=[0.2, 0.4, 0.6], seed=0)
    run_of(tmp_path, "b", history=[0.4, ""], seed=1)
    (group,) = groups_of(tmp_path).values()
    found = [(means["round"], means["val_accuracy"]) for means, _ in group.history()]
    assert found == [(1, pytest.approx(0.3)), (2, None)]
    assert group.means()["val_accuracy"] is None
