"""`SegmentSummary`: known answers, in a Trainer with nothing configured."""

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import RichModelSummary
from torch import nn
from watching import SGD, make_centralized, make_data, make_module

from split_lightning import (
    Centralized,
    RoundRobinWeightPassing,
    SplitLightningModule,
)


def printed(capsys, module, data, **options):
    """Returns the rows of the table that the start of a fit prints, as words."""
    callbacks = list(options.pop("callbacks", []))
    is_split = module.topology.is_split
    callbacks.append(RoundRobinWeightPassing() if is_split else Centralized())
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=callbacks,
        **options,
    )
    trainer.fit(module, datamodule=data)
    lines = capsys.readouterr().out.splitlines()
    return [
        [word.strip() for word in line.strip("│").split("│")]
        for line in lines
        if line.startswith("│")
    ]


def test_the_table_of_a_cut_network(capsys):
    """Conv2d(1, 4, 3), BatchNorm2d(4) | ReLU, MaxPool2d, Flatten, Linear(36, 3)."""
    client = 4 * 9 + 4 + 2 * 4
    state = 4 * (client + 2 * 4) + 8  # running statistics, a counter
    # Products and sums: forward, and backward to the weights alone (images need none).
    convolution = 2 * 36 * 4 * 9
    linear = 2 * 36 * 3
    rows = printed(capsys, make_module(), make_data())
    flops = f"{2 * convolution / 1000:.2f} k"
    sent = f"{4 * 36 * 4} bytes"
    server = 36 * 3 + 3
    assert rows == [
        ["client", f"{client}", f"{state} bytes", flops, sent],
        ["server", f"{server}", f"{4 * server} bytes", f"{3 * linear}", ""],
    ]


def test_layers_of_a_second_stage_are_counted_once(capsys):
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 4), nn.Linear(4, 3)
    )
    module = SplitLightningModule(net, ["1", "2"], SGD, SGD, 3, labels="client")
    rows = printed(capsys, module, make_data())
    counts = [36 * 5 + 5, 5 * 4 + 4, 4 * 3 + 3]
    names = ["client", "server", "client_2"]
    assert [row[:2] for row in rows] == [
        [name, f"{count}"] for name, count in zip(names, counts, strict=True)
    ]


def test_an_unsplit_network_is_one_row(capsys):
    module = make_centralized()
    count = sum(parameter.numel() for parameter in module.parameters())
    rows = printed(capsys, module, make_data(1))
    assert [row[:2] for row in rows] == [["network", f"{count}"]]


def test_the_switch_of_lightning_turns_it_off(capsys):
    assert printed(capsys, make_module(), make_data(), enable_model_summary=False) == []


def test_a_summary_that_a_user_asks_for_stays(capsys):
    deep = RichModelSummary(max_depth=2)
    rows = printed(capsys, make_module(), make_data(), callbacks=[deep])
    assert any("first_copies.0" in word for row in rows for word in row)
    assert len(rows) > 2


def test_it_changes_no_weights_statistics_or_gradients(capsys):
    trained = []
    for enabled in (True, False):
        torch.manual_seed(0)
        module = make_module()
        printed(capsys, module, make_data(), enable_model_summary=enabled)
        trained.append(module.state_dict())
    for name, tensor in trained[0].items():
        assert torch.equal(tensor, trained[1][name]), name


def test_the_table_fits_a_terminal_in_any_precision(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for precision in ("64-true", "bf16-mixed"):
        rows = printed(capsys, make_module(), make_data(), precision=precision)
        assert len(rows) == 2
