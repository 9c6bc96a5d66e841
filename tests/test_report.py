"""The table that a run ends with."""

import io

import pytest
from rich.console import Console

from split_lightning.runs.report import print_results

RESULTS = {
    "test_accuracy": 0.95,
    "val_accuracy": 0.9,
    "best_round": 7,
    "best_val_accuracy": 0.97,
    "rounds": 10,
    "uplink_bytes": 26_600_000,
    "downlink_bytes": 26_500_000,
    "handoff_bytes": 2_000_000,
    "handoffs": 99,
    "seconds": 3725.2,
}


def printed(results, folder):
    file = io.StringIO()
    print_results(results, folder, Console(file=file, width=100))
    return file.getvalue()


def test_figures_in_words(tmp_path):
    text = printed(RESULTS, tmp_path)
    for name, value in {
        "test accuracy": "0.9500",
        "validation accuracy": "0.9000",
        "best validation": "0.9700 in round 7",
        "rounds": "10",
        "bytes up": "26.6 MB",
        "hand-offs": "99",
        "time": "1:02:05",
    }.items():
        (line,) = [line for line in text.splitlines() if f"│ {name} " in line]
        assert f"│ {value} " in line
    assert "\x1b" not in text  # a file gets no control characters


def test_what_was_not_measured_has_no_row(tmp_path):
    unsplit = dict.fromkeys(("uplink_bytes", "downlink_bytes", "handoff_bytes"), 0)
    text = printed({"test_accuracy": 0.5, "handoffs": 0} | unsplit, tmp_path)
    for words in ("bytes", "hand-offs", "validation", "time"):
        assert words not in text


@pytest.mark.parametrize(
    ("left", "words"),
    [
        ("tensorboard/events.out.tfevents.1.x.0", "tensorboard --logdir"),
        ("curves.png", "curves.png"),
        ("results.json", None),
    ],
)
def test_what_to_look_at_is_there(tmp_path, left, words):
    path = tmp_path / left
    path.parent.mkdir(exist_ok=True)
    path.touch()
    text = printed(RESULTS, tmp_path)
    assert ("look:" in text) == (words is not None)
    assert words is None or words in text
