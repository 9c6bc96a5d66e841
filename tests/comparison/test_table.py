"""Runs as tables: groups that differ in nothing but their seed, their means."""

import math
import statistics

import pytest
from made_up import a_run, config, results

from split_lightning.runs.comparison import compared, find_runs


def run_of(folder, name, accuracy=None, history=None, failure=None, **changes):
    found = None if accuracy is None else results(accuracy)
    a_run(folder / name, config(folder / name, **changes), found, history, failure)


def table_of(folder):
    return compared(find_runs([folder]))


def groups_of(folder):
    return [names.split() for names in table_of(folder).groups["runs"]]


def test_runs_of_other_seeds_are_one_group_and_of_other_settings_are_not(tmp_path):
    for name, lr, seed in (("a", 0.1, 0), ("b", 0.2, 0), ("c", 0.1, 7), ("d", 0.2, 1)):
        run_of(tmp_path, name, 0.5, lr=lr, seed=seed)
    found = table_of(tmp_path)
    assert groups_of(tmp_path) == [["a", "c"], ["b", "d"]]
    assert list(found.names()) == ["a +1", "b +1"]
    assert list(found.shown["seed"]) == ["0,7", "0,1"]
    assert list(found.shown["optimizer.client.lr"]) == ["0.1", "0.2"]


@pytest.mark.parametrize(("own", "alone"), [("${seed}", False), (None, True)])
def test_what_follows_from_the_seed_parts_no_group(tmp_path, own, alone):
    for name, seed in (("a", 0), ("b", 1)):
        run_of(tmp_path, name, 0.5, seed=seed, own={"seed": own or 5 * seed})
    assert groups_of(tmp_path) == ([["a"], ["b"]] if alone else [["a", "b"]])


def test_a_run_that_was_repeated_counts_once_in_each_group(tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("c", 0), ("d", 1), ("e", 1)):
        run_of(tmp_path, name, 0.5, seed=seed)
    assert groups_of(tmp_path) == [["a", "b"], ["c", "d"], ["e"]]


def test_a_run_that_failed_is_no_part_of_a_mean(tmp_path):
    run_of(tmp_path, "a", 0.5, seed=0)
    run_of(tmp_path, "b", 0.7, seed=1)
    run_of(tmp_path, "c", failure={"error": "full", "mistake": False}, seed=2)
    run_of(tmp_path, "d", history=[0.1], seed=3)
    groups = table_of(tmp_path).groups
    assert dict(zip(groups["runs"], groups["status"], strict=True)) == {
        "a b": "finished",
        "c": "failed",
        "d": "unfinished",
    }


def test_runs_without_settings_stay_alone(tmp_path):
    for name in ("a", "b"):
        run_of(tmp_path, name, failure={"error": "x"})
        (tmp_path / name / "config.yaml").unlink()
    assert groups_of(tmp_path) == [["a"], ["b"]]


def test_means_and_sample_deviations(tmp_path):
    accuracies = [0.5, 0.6, 0.9]
    for seed, accuracy in enumerate(accuracies):
        run_of(tmp_path, str(seed), accuracy, [0.1, accuracy], seed=seed)
    (row,) = table_of(tmp_path).groups.to_dict("records")
    assert row["test_accuracy"] == pytest.approx(2.0 / 3)
    assert row["test_accuracy_std"] == pytest.approx(statistics.stdev(accuracies))
    assert (row["bytes"], row["bytes_std"]) == (5500, 0)


def test_one_run_has_its_own_figures_and_no_deviation(tmp_path):
    run_of(tmp_path, "a", 0.5, [0.4, 0.5])
    (row,) = table_of(tmp_path).groups.to_dict("records")
    for name, value in find_runs([tmp_path])[0].figures().items():
        assert row[name] == value or (value is None and math.isnan(row[name]))
        assert math.isnan(row[f"{name}_std"])


def test_a_mean_is_of_all_runs_or_there_is_none(tmp_path):
    run_of(tmp_path, "a", history=[0.2, 0.4, 0.6], seed=0)
    run_of(tmp_path, "b", history=[0.4, ""], seed=1)
    assert table_of(tmp_path).groups["val_accuracy"].isna().all()
