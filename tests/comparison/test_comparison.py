"""The table, the CSV file and the plot of a comparison."""

import csv
import io
import math
from itertools import pairwise

import pytest
from made_up import a_run, config, results
from rich.console import Console

from split_lightning.compare import main
from split_lightning.comparison import compare, find_runs
from split_lightning.comparison.plot import draw_runs
from split_lightning.comparison.report import labels


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
    assert [row["optimizer.client.lr"] for row in rows] == ["0.01", "0.1", "10.0"]
    assert [row["test_accuracy"] for row in rows] == ["0.8", "0.9", ""]
    assert [row["val_accuracy"] for row in rows] == ["0.8", "0.9", "0.1"]
    assert [row["bytes"] for row in rows] == ["5500", "5500", "1900"]
    assert [row["seconds"] for row in rows] == ["7.5", "7.5", "2.5"]
    assert [row["error"] for row in rows] == ["", "", "loss is not finite"]
    assert rows[0]["folder"] == str(sweep / "0")


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
    lines = printed.getvalue().splitlines()
    assert any(line.split()[:2] == ["run", "lr"] for line in lines)
    shown = {line.split()[0]: line.split() for line in lines if line[:1].isdigit()}
    assert shown["1"][1:5] == ["0.1", "0.9000", "0.1000", "0.9000"]
    assert shown["1"][-4:] == ["5.5", "kB", "8", "finished"]
    assert shown["2"][-1] == "failed"


def test_a_narrow_terminal_has_one_column_of_settings(tmp_path):
    """No name and no value is broken, as it would be in five columns."""
    for i in range(2):
        folder, layer = tmp_path / str(i), f"layer{i}.0.conv1"
        model = {"cut_layer": layer, "channels_last": bool(i)}
        cfg = config(folder, lr=0.00123456 * (i + 1), batch_size=i, model=model, own=i)
        a_run(folder, cfg, results(0.9))
    runs = find_runs([tmp_path])
    printed = {}
    for width in (80, 120):
        file = io.StringIO()
        console = Console(
            file=file, width=width, force_terminal=True, color_system=None
        )
        compare(runs, tmp_path, console)
        printed[width] = file.getvalue().split("table:")[0]
        assert max(map(len, printed[width].splitlines())) <= width
    assert printed[120].split()[:6] == ["test", "test", "val.", "time", "run", "lr"]
    words = printed[80].split()
    assert words[4:6] == ["run", "settings"]
    assert {"lr=0.002469", "batch_size=1", "cut_layer=layer1.0.conv1"} <= set(words)
    assert {"channels_last=true", "own=1", "0.9000", "finished"} <= set(words)


def test_a_plain_file_is_as_wide_as_the_table(sweep):
    """Nothing is cut where no terminal limits the width."""
    for name in ("0", "1", "2"):
        cut = f"a.very.long.path.to.a.layer.{name}" * 4
        a_run(sweep / name, config(sweep / name, model={"cut_layer": cut}))
    printed = io.StringIO()
    compare(find_runs([sweep]), sweep, Console(file=printed, width=80))
    assert cut in printed.getvalue()


def curves(figure):
    """What each panel draws: its title, and the points of its lines by label."""
    return {
        axes.get_title(): {
            line.get_label(): [tuple(point) for point in line.get_xydata()]
            for line in axes.get_lines()
        }
        for axes in figure.axes
    }


def test_the_plot_draws_the_histories(sweep):
    runs = find_runs([sweep])
    drawn = curves(draw_runs(runs, labels(runs, ["optimizer.client.lr"])))
    assert list(drawn) == ["By round", "By bytes"]
    assert list(drawn["By round"]) == ["1: lr=0.1", "0: lr=0.01", "2: lr=10 (failed)"]
    near = pytest.approx
    assert drawn["By round"]["1: lr=0.1"] == [(1, near(0.7)), (2, near(0.8)), (3, 0.9)]
    assert drawn["By bytes"]["2: lr=10 (failed)"] == [(1900, 0.1)]


def test_without_histories_there_are_bars(sweep):
    for file in sweep.glob("*/history.csv"):
        file.unlink()
    runs = find_runs([sweep])
    (axes,) = draw_runs(runs, labels(runs, ["optimizer.client.lr"])).axes
    assert [bar.get_width() for bar in axes.patches] == [0.8, 0.9]
    ticks = [text.get_text() for text in axes.get_yticklabels()]
    assert ticks == ["0: lr=0.01", "1: lr=0.1"]


def test_a_history_that_is_missing_in_one_run_adds_bars(sweep):
    (sweep / "0" / "history.csv").unlink()
    runs = find_runs([sweep])
    titles = [axes.get_title() for axes in draw_runs(runs, ["a", "b", "c"]).axes]
    assert titles == ["By round", "By bytes", "At the end"]


def test_the_unsplit_network_has_no_bytes_to_plot(tmp_path):
    folder = a_run(tmp_path / "0", results=results(0.9), history=[0.5, 0.9])
    file = folder / "history.csv"
    file.write_text(
        file.read_text().replace("1000,900", "0,0").replace("2000,1800", ",")
    )
    runs = find_runs([tmp_path])
    assert list(curves(draw_runs(runs, ["x"]))) == ["By round"]


def test_nothing_to_plot_gives_no_plot(tmp_path):
    a_run(tmp_path / "0")
    runs = find_runs([tmp_path])
    files = compare(runs, tmp_path, Console(file=io.StringIO()))
    assert [file.name for file in files] == ["comparison.csv"]


@pytest.mark.parametrize("num_runs", [2, 6, 30])
def test_the_legend_lies_inside_the_plot_and_beside_the_curves(tmp_path, num_runs):
    for i in range(num_runs):
        folder = tmp_path / str(i)
        cfg = config(folder, lr=0.0012345 * (i + 1), cut="layer2.0.conv1", own=i)
        a_run(folder, cfg, results(0.9), [0.1, 0.5, 0.9 - i / 100])
    runs = find_runs([tmp_path])
    figure = draw_runs(runs, labels(runs, ["optimizer.client.lr", "own", "cut"]))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == num_runs
    box = legend.get_window_extent()
    page = figure.bbox
    assert page.x0 <= box.x0
    assert box.x1 <= page.x1 + 1
    assert box.y0 >= page.y0
    for axes in figure.axes:
        assert not box.overlaps(axes.get_window_extent())
        assert axes.get_window_extent().width > 250
        ticks = [t.get_window_extent() for t in axes.get_xticklabels() if t.get_text()]
        assert not any(a.overlaps(b) for a, b in pairwise(ticks))


def test_runs_that_differ_in_nothing_are_told_apart_by_name(tmp_path):
    for name in ("2026-01-01_10-00", "2026-01-02_10-00"):
        a_run(tmp_path / name, results=results(0.9))
    assert labels(find_runs([tmp_path]), []) == ["2026-01-01_10-00", "2026-01-02_10-00"]


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
    assert message.startswith("split-lightning-compare: error: Expected argument")
    assert message.count("\n") == 1


def test_infinite_losses_are_shown_as_missing(tmp_path):
    run = a_run(tmp_path / "0", results={**results(0.9), "test_loss": math.nan})
    compare(find_runs([run]), tmp_path, Console(file=io.StringIO()))
    assert read(tmp_path / "comparison.csv")[0]["test_loss"] == ""
