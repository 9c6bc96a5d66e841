"""`ClientPicture`: who had which loss and accuracy, as it was logged."""

import numpy as np
import pytest
import torch
from conftest import Recorder
from watching import make_data, make_module, make_trainer

from split_lightning.callbacks import ClientPicture, ResumeCheckpoint
from split_lightning.callbacks.client_picture import draw_clients


def logged(recorder, name):
    """What was logged of the clients, by round: a list for each client."""
    found = {}
    for _, tag, value in recorder.records:
        if tag.startswith(f"clients/{name}/"):
            found.setdefault(int(tag.rpartition("/")[2]), []).append(value)
    return [found[client] for client in sorted(found)]


def maps_of(rows):
    return [
        axes.images[0].get_array()
        for axes in draw_clients(rows).axes
        if axes.get_title()
    ]


def test_it_draws_what_was_logged(tmp_path):
    picture, recorder = ClientPicture(tmp_path / "new"), Recorder()
    trainer = make_trainer(tmp_path, [picture], logger=recorder, max_epochs=2)
    trainer.fit(make_module(), datamodule=make_data())
    loss, accuracy = maps_of(picture.rows)
    np.testing.assert_allclose(loss, logged(recorder, "loss"), rtol=1e-6)
    np.testing.assert_allclose(accuracy, logged(recorder, "accuracy"), rtol=1e-6)
    assert (tmp_path / "new" / "clients.png").stat().st_size > 1000


def test_a_run_that_goes_on_has_all_rounds(tmp_path):
    rows = []
    for rounds in (1, 2):
        picture, kept = ClientPicture(), ResumeCheckpoint(tmp_path)
        options = {"max_epochs": rounds, "logger": False, "enable_checkpointing": True}
        trainer = make_trainer(tmp_path, [picture, kept], **options)
        last = tmp_path / "last.ckpt" if rounds == 2 else None
        trainer.fit(make_module(), datamodule=make_data(), ckpt_path=last)
        rows.append(picture.rows)
    assert (list(rows[0]), list(rows[1])) == ([1], [1, 2])
    assert torch.equal(rows[0][1]["loss"], rows[1][1]["loss"])


@pytest.mark.parametrize(("clients", "rounds"), [(2, 2), (10, 7), (100, 300)])
def test_a_client_that_took_no_part_has_no_value(clients, rounds):
    full, short = torch.arange(clients) / clients, torch.zeros(clients - 1)
    none = torch.tensor([])
    rows = {r: {"loss": full, "accuracy": none} for r in range(1, rounds)}
    rows[rounds] = {"loss": short, "accuracy": none}
    (loss,) = maps_of(rows)  # nothing was validated
    assert loss.shape == (clients, rounds)
    assert np.ma.masked_invalid(loss).mask[-1, -1]
    figure = draw_clients(rows)
    figure.draw_without_rendering()
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        texts = [text.get_text() for text in axis.get_ticklabels()]
        assert all(text.lstrip("\N{MINUS SIGN}").isdigit() for text in texts), texts


def test_one_round_of_equal_clients_has_true_axes():
    rows = {1: {"loss": torch.ones(3), "accuracy": torch.zeros(3)}}
    figure = draw_clients(rows)
    figure.draw_without_rendering()
    charts = [axes for axes in figure.axes if axes.get_xlabel() == "round"]
    for axes in charts:
        first, last = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if first <= tick <= last]
        assert ticks == [1]
    assert charts[1].images[0].get_clim() == (0, 1)
