"""The plot of a comparison: which curves there are, and what they hold."""

import csv
from itertools import pairwise

import pytest
from made_up import a_run, config, results
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_hex

from split_lightning.runs.comparison import compared, find_runs
from split_lightning.runs.comparison.plot import draw


def a_protocol(
    folder, protocol, partitioner="iid", seed=0, history=None, last=0.9, **o
):
    """A run of a protocol; keys of its results are given as in `networks=5`."""
    name = f"{protocol}-{partitioner}-{seed}"
    options = {"protocol": protocol, "data": {"partitioner": partitioner}}
    cfg = config(folder / name, seed=seed, **options)
    a_run(folder / name, cfg, results(last, **o), history or [last / 2, last])


def figure_of(folder):
    return draw(compared(find_runs([folder])))


def lines(axes):
    """The curves of a panel, by colour."""
    return {
        to_hex(line.get_color()): [tuple(point) for point in line.get_xydata()]
        for line in axes.get_lines()
        if len(line.get_xdata())
    }


def stars(axes):
    found = [c for c in axes.collections if isinstance(c, PathCollection)]
    return [tuple(point) for c in found for point in c.get_offsets().tolist()]


def legend_of(figure):
    (legend,) = figure.legends
    return {
        text.get_text(): to_hex(handle.get_color())
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }


def test_colour_is_the_protocol_and_a_row_the_partition(tmp_path):
    for partitioner in ("iid", "shards"):
        for protocol, last in (("gpsl", 0.7), ("fedavg", 0.9)):
            a_protocol(tmp_path, protocol, partitioner, last=last)
    figure = figure_of(tmp_path)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        f"{name}, n = 1 run each" for name in ("iid", "iid", "shards", "shards")
    ]
    color = legend_of(figure)
    assert list(color) == ["fedavg", "gpsl"]  # the best first
    by_round, by_bytes = lines(figure.axes[0]), lines(figure.axes[1])
    assert by_round[color["gpsl"]] == [(1, 0.35), (2, 0.7)]
    assert by_bytes[color["gpsl"]] == [(1900, 0.35), (3800, 0.7)]
    assert lines(figure.axes[2]) == by_round  # the same colours
    assert set(stars(figure.axes[0])) == {(3, 0.7), (3, 0.9)}


def test_a_curve_is_the_mean_over_seeds_in_a_band_within_0_and_1(tmp_path):
    for seed, last in enumerate((0.8, 1.0, 1.0)):
        a_protocol(tmp_path, "gpsl", seed=seed, history=[0.1 * seed, last])
    axes = figure_of(tmp_path).axes[0]
    assert axes.get_title() == "n = 3 runs each"
    (curve,) = lines(axes).values()
    assert curve == [(1, pytest.approx(0.1)), (2, pytest.approx(14 / 15))]
    (band,) = [c for c in axes.collections if isinstance(c, PolyCollection)]
    bounds = band.get_paths()[0].get_extents().extents
    # 14 / 15 and 0.1, with sample deviations of 0.1155 and 0.1.
    assert bounds == pytest.approx([1, 0, 2, 1])


def test_clients_with_networks_of_their_own_have_their_test_alone(tmp_path):
    """Their validation is on labels as skewed as those that they trained on."""
    a_protocol(tmp_path, "gpsl", last=0.7)
    a_protocol(tmp_path, "local", last=0.3, history=[0.9, 0.99], networks=10)
    figure = figure_of(tmp_path)
    assert list(legend_of(figure)) == ["gpsl", "local"]
    (curve,) = lines(figure.axes[0]).values()
    assert curve[-1] == (2, 0.7)
    assert (3, 0.3) in stars(figure.axes[0])


def test_without_histories_there_are_stars_alone(tmp_path):
    for protocol in ("gpsl", "local"):
        a_protocol(tmp_path, protocol)
    for file in tmp_path.glob("*/history.csv"):
        file.unlink()
    figure = figure_of(tmp_path)
    assert not any(map(lines, figure.axes))
    assert stars(figure.axes[0]) == [(3, 0.9), (3, 0.9)]


def test_a_run_that_failed_has_a_curve_and_says_so(tmp_path):
    a_protocol(tmp_path, "gpsl")
    folder = tmp_path / "failed"
    cfg = config(folder, protocol="local", data={"partitioner": "iid"})
    a_run(folder, cfg, None, [0.1, 0.2], {"error": "x"})
    a_run(tmp_path / "new", config(tmp_path / "new", protocol="fedavg"))
    figure = figure_of(tmp_path)
    assert len(lines(figure.axes[0])) == 2
    assert "(failed)" in legend_of(figure)
    assert "fedavg" not in legend_of(figure)


@pytest.mark.parametrize(("factor", "scale"), [(40, "log"), (20, "linear")])
def test_bytes_far_apart_share_a_logarithmic_axis(tmp_path, factor, scale):
    for name, times in (("gpsl", 1), ("local", factor)):
        a_protocol(tmp_path, name)
        file = tmp_path / f"{name}-iid-0" / "history.csv"
        with file.open(newline="") as text:
            rows = list(csv.DictReader(text))
        for row in rows:
            row["uplink_bytes"] = 1000 * times
            row["downlink_bytes"] = ""
        with file.open("w", newline="") as text:
            writer = csv.DictWriter(text, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        (file.parent / "results.json").write_text("{}")
    figure = figure_of(tmp_path)
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", scale]


def test_the_unsplit_network_has_no_bytes_to_plot(tmp_path):
    none = dict.fromkeys(("uplink_bytes", "downlink_bytes", "handoff_bytes"), 0)
    a_protocol(tmp_path, "centralized", **none)
    file = tmp_path / "centralized-iid-0" / "history.csv"
    text = file.read_text().replace("1000,900", "0,0").replace("2000,1800", "0,0")
    file.write_text(text)
    assert [axes.get_xlabel() for axes in figure_of(tmp_path).axes] == ["round"]


def test_other_settings_have_line_styles_and_twins_their_names(tmp_path):
    for name, lr in (("a", 0.1), ("b", 0.1), ("c", 0.2)):
        for protocol in ("gpsl", "local"):
            folder = tmp_path / f"{protocol}-{name}"
            cfg = config(folder, lr=lr, protocol=protocol)
            a_run(folder, cfg, results(0.9), [0.5, 0.9])
    figure = figure_of(tmp_path)
    entries = list(legend_of(figure))
    assert entries[:3] == ["protocol", "gpsl", "local"]
    assert {"other settings", "lr=0.2", "gpsl-a: lr=0.1"} <= set(entries)
    assert len(figure.axes[0].get_lines()) >= 6


@pytest.mark.parametrize("num_runs", [1, 2, 30])
def test_the_legend_lies_inside_the_plot_and_beside_the_curves(tmp_path, num_runs):
    for i in range(num_runs):
        folder = tmp_path / str(i)
        cfg = config(folder, lr=0.0012345 * (i + 1), cut="layer2.0.conv1" * 3, own=i)
        a_run(folder, cfg, results(0.9), [0.1, 0.5, 0.9 - i / 100])
    figure = figure_of(tmp_path)
    figure.draw_without_rendering()
    page, boxes = figure.bbox, [x.get_window_extent() for x in figure.legends]
    assert len(boxes) == (num_runs > 1)
    for axes in figure.axes:
        assert axes.get_window_extent().width > 250
        ticks = [t.get_window_extent() for t in axes.get_xticklabels() if t.get_text()]
        assert not any(a.overlaps(b) for a, b in pairwise(ticks))
        for box in boxes:
            assert page.x0 <= box.x0
            assert box.x1 <= page.x1 + 1
            assert box.y0 >= page.y0
            assert not box.overlaps(axes.get_window_extent())
