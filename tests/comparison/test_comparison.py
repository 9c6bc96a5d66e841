"""The tables, the CSV files and the board of a comparison."""

import csv
import io
import math

import pytest
from made_up import a_run, config, results
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from split_lightning.compare import main
from split_lightning.runs.comparison import compare, find_runs

LR = "optimizer.client.lr"


def read(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture
def sweep(tmp_path):
    """Three learning rates: finished, finished better, failed after a round."""
    for name, lr, accuracy in (("0", 0.01, 0.8), ("1", 0.1, 0.9)):
        folder = tmp_path / name
        history = [accuracy - 0.2, accuracy - 0.1, accuracy]
        a_run(folder, config(folder, lr=lr), results(accuracy), history)
    failure = {"error": "loss is not finite", "mistake": False}
    a_run(tmp_path / "2", config(tmp_path / "2", lr=10.0), None, [0.1], failure)
    return tmp_path


def test_the_csv_has_each_run_in_full(sweep):
    compare(find_runs([sweep]), sweep, Console(file=io.StringIO()))
    rows = read(sweep / "comparison.csv")
    assert [row["run"] for row in rows] == ["0", "1", "2"]
    assert [row["status"] for row in rows] == ["finished", "finished", "failed"]
    assert [row[LR] for row in rows] == ["0.01", "0.1", "10.0"]
    assert [row["test_accuracy"] for row in rows] == ["0.8", "0.9", ""]
    assert [row["val_accuracy"] for row in rows] == ["0.8", "0.9", "0.1"]
    assert [row["bytes"] for row in rows] == ["5500", "5500", "1900"]
    assert [row["seconds"] for row in rows] == ["7.5", "7.5", "2.5"]
    assert [row["error"] for row in rows] == ["", "", "loss is not finite"]
    assert rows[0]["folder"] == str(sweep / "0")


def test_the_csv_of_means_has_a_row_for_each_row_of_the_table(tmp_path):
    for lr, seed, accuracy in ((0.1, 0, 0.7), (0.1, 1, 0.9), (0.2, 0, 0.6)):
        run = tmp_path / f"{lr}-{seed}"
        a_run(run, config(run, lr=lr, seed=seed), results(accuracy))
    printed = io.StringIO()
    compare(find_runs([tmp_path]), tmp_path, Console(file=printed))
    assert len(read(tmp_path / "comparison.csv")) == 3
    two, one = read(tmp_path / "comparison_means.csv")
    assert (two["runs"], two["num_runs"], two["seed"]) == ("0.1-0 0.1-1", "2", "0,1")
    assert (one["optimizer.client.lr"], one["num_runs"], one["seed"]) == (
        "0.2",
        "1",
        "0",
    )
    assert float(two["test_accuracy"]) == pytest.approx(0.8)
    assert float(two["test_accuracy_std"]) == pytest.approx(0.02**0.5)
    assert (one["test_accuracy"], one["test_accuracy_std"]) == ("0.6", "")
    assert "0.8000 ±0.1414" in printed.getvalue()


def test_no_two_columns_of_the_csv_have_one_name(sweep):
    """`rounds` is a setting that may differ, and how many there were a figure."""
    folder = sweep / "1"
    a_run(folder, config(folder, lr=0.1, rounds=5))
    compare(find_runs([sweep]), sweep, Console(file=io.StringIO()))
    with (sweep / "comparison.csv").open(newline="") as lines:
        header = next(csv.reader(lines))
    assert len(set(header)) == len(header)
    assert [row["rounds"] for row in read(sweep / "comparison.csv")] == [
        "10",
        "5",
        "10",
    ]
    done = [row["rounds_done"] for row in read(sweep / "comparison.csv")]
    assert done == ["3", "3", "1"]


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_has_differing_settings_and_figures(sweep, width):
    printed = io.StringIO()
    compare(find_runs([sweep]), sweep, Console(file=printed, width=width))
    lines, travelled = map(str.splitlines, printed.getvalue().split("\n\n"))
    assert any(line.split()[:2] == ["run", "lr"] for line in lines)
    shown = {line.split()[0]: line.split() for line in lines if line[:1].isdigit()}
    assert shown["1"][1:5] == ["0.1", "0.9000", "0.1000", "0.9000"]
    assert shown["1"][-4:] == ["5.5", "kB", "8", "finished"]
    assert shown["2"][-1] == "failed"
    figures = ["3.0", "kB", "2.0", "kB", "500", "bytes"]
    assert travelled[4].split()[1:] == ["0.1", *figures, "finished"]


def printed(folder, width):
    """What a terminal shows, and its lines' greatest width."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    compare(find_runs([folder]), folder, console)
    found = file.getvalue().split("table:")[0]
    return found, max(map(len, found.splitlines()))


def test_a_narrow_terminal_has_the_settings_in_a_table_of_their_own(tmp_path):
    """No name and no value is broken."""
    for i, protocol in enumerate(("splitfed_v1", "multi_server")):
        for seed in (0, 1):
            folder = tmp_path / f"{i}-{seed}"
            others = {"protocol": protocol, "model": {"cut_layer": f"layer{i}.conv1"}}
            cfg = config(folder, seed=seed, lr=0.00123456 * (i + 1), **others)
            a_run(folder, cfg, results(0.8 + seed / 9))
    wide, narrow = printed(tmp_path, 140), printed(tmp_path, 80)
    assert (wide[0].count("\n\n"), narrow[0].count("\n\n")) == (1, 2)
    for text, width in (wide, narrow):
        assert width <= (140 if text is wide[0] else 80)
        words = text.split()
        assert {"protocol", "cut_layer", "lr", "seed", "finished"} <= set(words)
        assert {"splitfed_v1", "multi_server", "layer1.conv1", "0.002469"} <= set(words)
        assert text.count("0.8556 ±0.0786") == 4


def test_a_run_that_did_not_end_well_says_so_on_any_terminal(tmp_path):
    for seed, accuracy in ((0, 0.8), (1, 0.9), (2, None)):
        folder = tmp_path / str(seed)
        given = None if accuracy is None else results(accuracy)
        failure = {"error": "x", "mistake": False} if given is None else None
        a_run(folder, config(folder, seed=seed, own="a" * 14), given, None, failure)
    for width in (40, 80, 200):
        assert "failed" in printed(tmp_path, width)[0]


def test_a_plain_file_is_as_wide_as_the_table(sweep):
    """Nothing is cut where no terminal limits the width."""
    for name in ("0", "1", "2"):
        cut = f"a.very.long.path.to.a.layer.{name}" * 4
        a_run(sweep / name, config(sweep / name, model={"cut_layer": cut}))
    printed = io.StringIO()
    compare(find_runs([sweep]), sweep, Console(file=printed, width=80))
    assert cut in printed.getvalue()


def test_nothing_to_plot_gives_no_plot(tmp_path):
    a_run(tmp_path / "0")
    runs = find_runs([tmp_path])
    files = compare(runs, tmp_path, Console(file=io.StringIO()))
    names = ["comparison.csv", "comparison_means.csv"]
    assert [file.name for file in files] == names


def test_tensorboard_has_a_run_for_each_group_and_the_plot(tmp_path):
    for lr, seed, last in ((0.1, 0, 0.7), (0.1, 1, 0.9), (0.2, 0, 0.6)):
        run = tmp_path / f"{lr}-{seed}"
        a_run(run, config(run, lr=lr, seed=seed), results(last), [0.5, last])
    for _ in range(2):  # the second replaces the first
        compare(find_runs([tmp_path]), tmp_path, Console(file=io.StringIO()))
    folder = tmp_path / "comparison"
    found = {
        file.parent.name: EventAccumulator(str(file.parent)).Reload()
        for file in folder.rglob("events.*")
    }
    one, two = (
        "0.2-0,seed=0,optimizer.client.lr=0.2",
        "seed=0,1,optimizer.client.lr=0.1",
    )
    assert set(found) == {"comparison", one, f"0.1-0_+1,{two}"}
    assert found["comparison"].Tags()["images"] == ["comparison"]
    group = found[f"0.1-0_+1,{two}"]
    by_round = group.Scalars("val_accuracy/by_round")
    assert [(e.step, e.value) for e in by_round] == [(1, 0.5), (2, pytest.approx(0.8))]
    by_bytes = group.Scalars("val_accuracy/by_bytes")
    assert [e.step for e in by_bytes] == [1900, 3800]
    # Hyperparameters here would hide those of the runs, in a folder of both.
    assert "_hparams_/session_start_info" not in group.summary_metadata


def test_the_command_line(sweep, tmp_path, monkeypatch, capsys):
    assert main([str(sweep)]) == 0
    assert (sweep / "comparison.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert f"table: {sweep / 'comparison.csv'}" in printed
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main([str(sweep / "0"), str(sweep / "1")]) == 0
    assert len(read(elsewhere / "comparison.csv")) == 2
    assert main([str(sweep / "0"), "--output", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "comparison.csv").is_file()


def test_the_command_line_without_runs(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("split-lightning: error: Expected argument")
    assert message.count("\n") == 1


def test_infinite_losses_are_shown_as_missing(tmp_path):
    run = a_run(tmp_path / "0", results={**results(0.9), "test_loss": math.nan})
    compare(find_runs([run]), tmp_path, Console(file=io.StringIO()))
    assert read(tmp_path / "comparison.csv")[0]["test_loss"] == ""


def test_long_settings_are_no_folder_of_their_length(tmp_path):
    for name in "ab":
        cfg = config(tmp_path / name, own=name * 400)
        a_run(tmp_path / name, cfg, results(0.9), [0.5])
    folder = compare(find_runs([tmp_path]), tmp_path, Console(file=io.StringIO()))[-1]
    assert len(list(folder.glob("*/events.*"))) == 2
