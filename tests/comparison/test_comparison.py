"""The table, the CSV file and the plot of a comparison."""

import csv
import io
import math
from dataclasses import replace
from itertools import pairwise

import pytest
from made_up import a_run, config, results
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from split_lightning.compare import main
from split_lightning.comparison import compare, differing_settings, find_runs, grouped
from split_lightning.comparison.plot import draw_groups, row_setting
from split_lightning.comparison.report import labels

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


@pytest.mark.parametrize("width", [80, 60])
def test_a_narrow_terminal_breaks_no_word(tmp_path, width):
    """With deviations there is room for values alone, or for a table of their own."""
    chosen = {"splitfed_v1": "dirichlet_01", "multi_server": "pathological"}
    for protocol, partitioner in chosen.items():
        for seed in (0, 1):
            folder = tmp_path / f"{protocol}-{seed}"
            choices = {"protocol": protocol, "partitioner": partitioner}
            a_run(folder, config(folder, seed=seed, **choices), results(0.8 + seed / 9))
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    runs = find_runs([tmp_path])
    runs = [replace(run, name=str(i)) for i, run in enumerate(runs)]
    compare(runs, tmp_path, console)
    printed = file.getvalue().split("table:")[0]
    assert max(map(len, printed.splitlines())) <= width
    words = printed.split()
    assert {"protocol", "partitioner", "seed", *chosen, *chosen.values()} <= set(words)
    assert words.count("0.8556") == 2 * len(chosen)
    assert printed.count("0.8556 ±0.0786") == 2 * len(chosen)
    assert printed.count("\n\n") == (1 if width == 80 else 2)


def test_a_run_that_did_not_end_well_says_so_on_any_terminal(tmp_path):
    for seed, accuracy in ((0, 0.8), (1, 0.9), (2, None)):
        folder = tmp_path / str(seed)
        given = None if accuracy is None else results(accuracy)
        failure = {"error": "x", "mistake": False} if given is None else None
        a_run(folder, config(folder, seed=seed, own="a" * 14), given, None, failure)
    for width in (40, 60, 80, 200):
        file = io.StringIO()
        console = Console(
            file=file, width=width, force_terminal=True, color_system=None
        )
        compare(find_runs([tmp_path]), tmp_path, console)
        assert "failed" in file.getvalue()


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
    runs = grouped(find_runs([sweep]), [LR])
    drawn = curves(draw_groups(runs, labels(runs, [LR])))
    assert list(drawn) == ["By round", "By bytes"]
    assert list(drawn["By round"]) == ["1: lr=0.1", "0: lr=0.01", "2: lr=10 (failed)"]
    near = pytest.approx
    assert drawn["By round"]["1: lr=0.1"] == [(1, near(0.7)), (2, near(0.8)), (3, 0.9)]
    assert drawn["By bytes"]["2: lr=10 (failed)"] == [(1900, 0.1)]


def test_without_histories_there_are_bars(sweep):
    for file in sweep.glob("*/history.csv"):
        file.unlink()
    runs = grouped(find_runs([sweep]), [LR])
    (axes,) = draw_groups(runs, labels(runs, [LR])).axes
    assert [bar.get_width() for bar in axes.patches] == [0.8, 0.9]
    ticks = [text.get_text() for text in axes.get_yticklabels()]
    assert ticks == ["0: lr=0.01", "1: lr=0.1"]


def test_a_history_that_is_missing_in_one_run_adds_bars(sweep):
    (sweep / "0" / "history.csv").unlink()
    runs = grouped(find_runs([sweep]), [LR])
    titles = [axes.get_title() for axes in draw_groups(runs, ["a", "b", "c"]).axes]
    assert titles == ["By round", "By bytes", "At the end"]


@pytest.mark.parametrize(
    ("times", "rounds", "scale"), [(40, 2, "log"), (20, 2, "linear"), (1, 60, "linear")]
)
def test_bytes_far_apart_share_a_logarithmic_axis(tmp_path, times, rounds, scale):
    """Of two runs, not of one run's first and last round."""
    for name, factor in (("0", 1), ("1", times)):
        folder = tmp_path / name
        history = [0.5 + i / 200 for i in range(rounds)]
        a_run(folder, config(folder, own=name), results(0.9), history)
        file = folder / "history.csv"
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        for row in rows:
            row["uplink_bytes"] = factor * 1000 * int(row["round"])
            row["downlink_bytes"] = ""
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    groups = grouped(find_runs([tmp_path]), ["own"])
    figure = draw_groups(groups, labels(groups, ["own"]))
    scales = {axes.get_title(): axes.get_xscale() for axes in figure.axes}
    assert scales == {"By round": "linear", "By bytes": scale}
    drawn = curves(figure)["By bytes"]
    assert max(x for x, _ in drawn["1: own=1"]) == times * rounds * 1000


def test_the_unsplit_network_has_no_bytes_to_plot(tmp_path):
    folder = a_run(tmp_path / "0", results=results(0.9), history=[0.5, 0.9])
    file = folder / "history.csv"
    file.write_text(
        file.read_text().replace("1000,900", "0,0").replace("2000,1800", ",")
    )
    runs = grouped(find_runs([tmp_path]), [])
    assert list(curves(draw_groups(runs, ["x"]))) == ["By round"]


def test_nothing_to_plot_gives_no_plot(tmp_path):
    a_run(tmp_path / "0")
    runs = find_runs([tmp_path])
    files = compare(runs, tmp_path, Console(file=io.StringIO()))
    names = ["comparison.csv", "comparison_means.csv"]
    assert [file.name for file in files] == names


@pytest.mark.parametrize("num_runs", [2, 6, 30])
def test_the_legend_lies_inside_the_plot_and_beside_the_curves(tmp_path, num_runs):
    for i in range(num_runs):
        folder = tmp_path / str(i)
        cfg = config(folder, lr=0.0012345 * (i + 1), cut="layer2.0.conv1", own=i)
        a_run(folder, cfg, results(0.9), [0.1, 0.5, 0.9 - i / 100])
    keys = [LR, "own", "cut"]
    runs = grouped(find_runs([tmp_path]), keys)
    figure = draw_groups(runs, labels(runs, keys))
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


def seeds_of_twelve(folder, seeds=(0, 1)):
    """Six learning rates by two options, some seeds each."""
    for i, lr in enumerate((1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)):
        for own in ("few", "many"):
            for seed in seeds:
                run = folder / f"{i}{own}{seed}"
                last = 0.9 - i / 100 + 0.02 * seed
                a_run(
                    run,
                    config(run, lr=lr, own=own, seed=seed),
                    results(last),
                    [last / 2, last],
                )
    runs = find_runs([folder])
    keys = differing_settings([run.settings for run in runs])
    return grouped(runs, keys), keys


def test_a_curve_is_the_mean_over_seeds_in_a_band_of_one_deviation(tmp_path):
    for seed, last in ((0, 0.7), (1, 0.8), (2, 0.9)):
        run = tmp_path / str(seed)
        a_run(run, config(run, seed=seed), results(last), [0.8, last])
    groups = grouped(find_runs([tmp_path]), ["seed"])
    axes = draw_groups(groups, labels(groups, ["seed"])).axes[0]
    (line,) = axes.get_lines()
    assert line.get_label() == "0 +2"
    assert line.get_ydata() == pytest.approx([0.8, 0.8])
    (band,) = axes.collections
    assert band.get_paths()[0].get_extents().extents == pytest.approx([1, 0.7, 2, 0.9])


def test_many_curves_get_a_row_for_each_value_of_a_setting(tmp_path):
    groups, keys = seeds_of_twelve(tmp_path)
    assert row_setting(groups, keys) == "own"
    assert row_setting(groups[:10], keys) is None
    figure = draw_groups(groups, labels(groups, keys, "own"), "own")
    drawn = curves(figure)
    assert list(drawn) == [
        *("few: by round", "few: by bytes", "many: by round", "many: by bytes")
    ]
    rates = ["1e-05", "0.0001", "0.001", "0.01", "0.1", "1"]  # the best first
    assert list(drawn["few: by round"]) == [f"lr={rate}" for rate in rates]
    few, many = (figure.axes[i].get_lines()[0].get_color() for i in (0, 2))
    assert few == many
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == list(drawn["few: by round"])


def test_curves_by_samples(tmp_path):
    run = a_run(tmp_path / "0", results=results(0.9), history=[0.5, 0.9])
    file = run / "history.csv"
    lines = file.read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    for row, images in zip(rows, ("300", "600"), strict=True):
        row[lines[0].split(",").index("images")] = images
    file.write_text("\n".join([lines[0], *map(",".join, rows)]))
    drawn = curves(draw_groups(grouped(find_runs([tmp_path]), []), ["x"]))
    assert list(drawn) == ["By round", "By samples", "By bytes"]
    assert drawn["By samples"]["x"] == [(300, 0.5), (600, 0.9)]


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
    assert set(found) == {"comparison", "seed=0,1,_lr=0.1", "0.2-0_seed=0,_lr=0.2"}
    assert found["comparison"].Tags()["images"] == ["comparison"]
    group = found["seed=0,1,_lr=0.1"]
    by_round = group.Scalars("val_accuracy/by_round")
    assert [(e.step, e.value) for e in by_round] == [(1, 0.5), (2, pytest.approx(0.8))]
    by_bytes = group.Scalars("val_accuracy/by_bytes")
    assert [e.step for e in by_bytes] == [1900, 3800]
    assert group.Scalars("test_accuracy")[-1].value == pytest.approx(0.8)


def test_runs_that_differ_in_nothing_are_told_apart_by_name(tmp_path):
    for name in ("2026-01-01_10-00", "2026-01-02_10-00"):
        a_run(tmp_path / name, results=results(0.9))
    runs = grouped(find_runs([tmp_path]), [])
    assert labels(runs, []) == ["2026-01-01_10-00", "2026-01-02_10-00"]


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
