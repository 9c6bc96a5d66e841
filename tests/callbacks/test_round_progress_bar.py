"""`RoundProgressBar` in a terminal, and without one."""

import io
import logging
import re
import sys

import pytest
import rich
from pytorch_lightning import Callback
from watching import SaveAt, fit, make_data, make_module

from split_lightning.callbacks import RoundProgressBar


@pytest.fixture(autouse=True)
def _own_console():
    yield
    rich.reconfigure()  # Lightning's bar puts its console in the place of rich's


TERMINAL = {"force_terminal": True, "width": 140}


def shown(tmp_path, width, module=None, data=None, **options):
    """Returns the lines that a terminal showed, without control sequences."""
    file = io.StringIO()
    console = {"file": file, "force_terminal": True, "width": width}
    bar = RoundProgressBar(refresh_rate=50, console_kwargs=console)
    fit(tmp_path, [bar], module, data, enable_progress_bar=True, **options)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "\x1b" in file.getvalue()
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize(
    ("width", "figures"),
    [
        (50, r"loss: \d\.\d+ val: 0\.\d+"),
        (60, r"loss: \d\.\d+ val: 0\.\d+ 0:00:00 left"),
        (80, r"loss: \d\.\d+ val: 0\.\d+ [\d,]+ img/s (\d+\.\d kB )?0:00:00 left"),
        (
            140,
            r"9/9 loss: \d\.\d+ val: 0\.\d+ [\d,]+ img/s \d+\.\d kB 0:00:00 left",
        ),
        (200, r"9/9 loss: .+ left"),
    ],
)
def test_one_line_shows_round_client_and_figures(tmp_path, width, figures):
    lines = shown(tmp_path, width)
    assert max(map(len, lines)) <= width
    starts = "Sanity Checking", "Round", "Validation", "`Trainer"
    assert all(line.startswith(starts) for line in lines)
    assert re.fullmatch(rf"Round 2/2 client 2 [━╸╺ ]+{figures}", lines[-1])
    clients = {match[1] for match in re.finditer(r"client (\d)", " ".join(lines))}
    assert "2" in clients
    assert any(line.startswith("Round 1/2") for line in lines)


def test_the_loss_is_the_mean_of_the_last_20_batches(tmp_path):
    losses = []

    class Note(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    bar = RoundProgressBar(console_kwargs=TERMINAL | {"file": io.StringIO()})
    fit(tmp_path, [bar, Note()], enable_progress_bar=True, max_epochs=3)
    assert len(losses) == 27
    assert bar._figures["loss"] == f"loss: {sum(losses[-20:]) / 20:.3f}"


def test_bytes_are_those_that_travelled(tmp_path):
    module = make_module()
    last = shown(tmp_path, 140, module)[-1]
    travelled = sum(
        count for name, count in module.totals().items() if name.endswith("bytes")
    )
    assert f"{travelled / 1000:.1f} kB" in last


@pytest.mark.parametrize(
    ("options", "saved_at"),
    [
        ({"max_steps": 12}, None),
        ({"max_epochs": 3}, None),
        ({"max_epochs": 3}, (0, 2)),
        ({"max_epochs": 3}, (1, 4)),
    ],
)
def test_the_time_left_is_that_of_the_run(tmp_path, monkeypatch, options, saved_at):
    """With a clock that goes on by a second a batch."""
    ckpt, batches = None, options.get("max_steps", 27)
    if saved_at is not None:  # goes on from there, after so many batches
        ckpt = tmp_path / "saved.ckpt"
        fit(tmp_path, [SaveAt(ckpt, *saved_at)])
        batches -= saved_at[0] * 9 + saved_at[1] + 1
    from split_lightning.callbacks import round_progress_bar

    bar, left = RoundProgressBar(console_kwargs={"force_terminal": True}), []
    clock = [0.0]
    monkeypatch.setattr(round_progress_bar.time, "perf_counter", lambda: clock[0])
    figures_of = bar._progress_figures

    def note(trainer, pl_module, batches):
        clock[0] += 1.0
        figures = figures_of(trainer, pl_module, batches)
        left.append(re.fullmatch(r"0:00:(\d\d) left", figures["left"])[1])
        return figures

    bar._progress_figures = note
    bar._console_kwargs["file"] = io.StringIO()
    options = {"max_epochs": 4} | options
    fit(tmp_path, [bar], ckpt_path=ckpt, enable_progress_bar=True, **options)
    assert len(left) == batches
    assert left == [f"{len(left) - 1 - i:02d}" for i in range(len(left))]


def test_rounds_of_unknown_length(tmp_path):
    from flwr_datasets.partitioner import LinearPartitioner

    from split_lightning import RoundRobinWeightPassing

    some = RoundRobinWeightPassing(clients_per_round=2)
    data = make_data(partitioner=LinearPartitioner)
    lines = shown(tmp_path, 140, data=data, passing=some)
    assert lines[-1].startswith("Round 2/2 client ")


def test_what_is_logged_stands_above_the_bar(tmp_path, capsys):
    """On a line of its own: the bar is drawn anew below it."""
    logger, handler = logging.getLogger("of a user"), logging.StreamHandler()
    stream = handler.stream
    assert stream is sys.stderr

    class Log(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                logger.warning("in round %d", trainer.current_epoch)

    file = io.StringIO()
    bar = RoundProgressBar(console_kwargs={"file": file, "force_terminal": True})
    logger.addHandler(handler)
    try:
        fit(tmp_path, [bar, Log()], enable_progress_bar=True)
        assert handler.stream is stream
        logger.warning("afterwards")
    finally:
        logger.removeHandler(handler)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    lines = re.split(r"[\r\n]+", text)
    assert "in round 0" in lines
    assert "in round 1" in lines
    err = capsys.readouterr().err
    assert "in round" not in err
    assert "afterwards" in err


def test_without_a_terminal_nothing_is_written(tmp_path, capfd):
    file = io.StringIO()
    bars = [RoundProgressBar(console_kwargs={"file": file}), RoundProgressBar()]
    for bar in bars:
        fit(tmp_path, [bar], enable_progress_bar=True)
    assert file.getvalue() == ""
    written = "".join(capfd.readouterr())
    assert "\x1b" not in written
    assert "\r" not in written
    assert "Round" not in written
