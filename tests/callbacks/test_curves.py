"""The curves of a run: which there are, and what they hold."""

import pytest

from split_lightning.callbacks import draw_curves


def rows(rounds, validates=True, split=True):
    return [
        {
            "round": r,
            "train_loss": 1 / r,
            "val_loss": 2 / r if validates else None,
            "val_accuracy": 1 - 1 / r if validates and r % 2 else None,
            "uplink_bytes": 30_000_000 * r * split,
            "downlink_bytes": 20_000_000 * r * split,
            "handoff_bytes": 1_000 * r * split,
        }
        for r in range(1, rounds + 1)
    ]


def lines(axes):
    return [line.get_xydata().tolist() for line in axes.get_lines()]


@pytest.mark.parametrize("rounds", [1, 7, 200])
def test_losses_accuracy_and_bytes(rounds):
    loss, accuracy, traffic = draw_curves(rows(rounds)).axes
    every = list(range(1, rounds + 1))
    assert lines(loss)[0] == [[r, 1 / r] for r in every]
    assert lines(loss)[1] == [[r, 2 / r] for r in every]
    validated = [[r, 1 - 1 / r] for r in every if r % 2]
    assert lines(accuracy) == [validated, validated[-1:]]  # and the best
    assert f"in round {validated[-1][0]}" in accuracy.get_title()
    unit = 1e9 if rounds == 200 else 1e6
    assert ("GB" if rounds == 200 else "MB") in traffic.get_title()
    assert lines(traffic)[0] == [[r, pytest.approx(3e7 * r / unit)] for r in every]
    assert lines(traffic)[1] == [[r, pytest.approx(2e7 * r / unit)] for r in every]
    for axes in (loss, accuracy, traffic):
        axes.figure.draw_without_rendering()
        ticks = [tick.get_text() for tick in axes.get_xticklabels()]
        assert all(tick.lstrip("\N{MINUS SIGN}").isdigit() for tick in ticks), ticks
    marked = loss.get_lines()[0].get_marker() == "o"
    assert marked == (rounds < 200)  # one round alone would not be seen else


def test_what_was_not_measured_has_no_chart():
    titles = [axes.get_title() for axes in draw_curves(rows(3, validates=False)).axes]
    assert titles == ["loss", "bytes since the start (MB)"]
    _, accuracy = draw_curves(rows(3, split=False)).axes
    assert accuracy.get_title().startswith("validation accuracy")
    assert len(draw_curves(rows(3, validates=False)).axes[0].get_lines()) == 1


def test_the_title_stands_above_and_fits(tmp_path):
    title = "splitfed_v1 (u_shaped), mobilenet_v2 on cifar100, 100 clients, dirichlet"
    figure = draw_curves(
        rows(1, validates=False, split=False), f"{title} (0.1)\ntest 1"
    )
    figure.draw_without_rendering()
    text = figure._suptitle
    assert " ".join(text.get_text().split()) == f"{title} (0.1) test 1"
    assert text.get_window_extent().width <= figure.bbox.width
    assert figure.axes[0].get_window_extent().y1 < text.get_window_extent().y0
