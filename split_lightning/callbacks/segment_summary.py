"""`SegmentSummary`: parameters, work and bytes of each segment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichModelSummary
from rich import filesize
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from typing_extensions import override

from split_lightning.data.datamodule import SplitDataModule
from split_lightning.message import num_bytes
from split_lightning.system.work import crossing_of, work_of


class SegmentRow(NamedTuple):
    """One stage of the network, as a row of the table.

    Attributes:
        name: The party, with a number from its second stage on: `client_2`.
        parameters: Number of parameters. Those of an earlier stage are not counted
            again.
        state_bytes: Bytes of parameters and buffers.
        flops: Floating-point operations for one sample, forward and backward; `None`:
            not known.
        sent_bytes: Bytes that one sample sends to the next stage, without labels;
            `None`: not known, or nothing is sent.
    """

    name: str
    parameters: int
    state_bytes: int
    flops: float | None
    sent_bytes: float | None


class SegmentSummary(RichModelSummary):
    """Prints a table of the segments when training begins.

    It replaces Lightning's summary, which lists a module's internal parts, and follows
    the same switch: `Trainer(enable_model_summary=False)` turns it off.
    """

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        data, example = getattr(trainer, "datamodule", None), None
        if isinstance(data, SplitDataModule):
            example = pl_module.fed(data.example())
        rows = segment_rows(pl_module.stages(), example)
        if trainer.is_global_zero:
            Console().print(segment_table(rows))


def segment_rows(
    stages: Mapping[str, nn.Module], example: Tensor | None
) -> list[SegmentRow]:
    """Measures the stages of a network.

    Args:
        stages: The stages by name, in order.
        example: One sample with a batch axis, `(1, ...)`; `None`: FLOPs and bytes sent
            are not known.
    """
    flops: list[float | None] = [None] * len(stages)
    sent: list[float | None] = [None] * len(stages)
    if example is not None:
        flops = [work.forward + work.backward for work in work_of(stages, example)]
        sent = [up for up, _ in crossing_of(stages, example)] + [None]
    counted: set[int] = set()
    rows = []
    for (name, stage), work, up in zip(stages.items(), flops, sent, strict=True):
        parameters = [p for p in stage.parameters() if id(p) not in counted]
        state = parameters + [b for b in stage.buffers() if id(b) not in counted]
        counted |= {id(tensor) for tensor in state}
        count = sum(parameter.numel() for parameter in parameters)
        rows.append(SegmentRow(name, count, num_bytes(state), work, up))
    return rows


def segment_table(rows: list[SegmentRow]) -> Table:
    """Returns the rows as a table for a terminal."""
    table = Table("segment")
    for title in ("parameters", "state", "FLOPs per sample", "sends per sample"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.parameters:,}" if row.state_bytes else "",
            filesize.decimal(row.state_bytes) if row.state_bytes else "",
            "" if row.flops is None else _with_prefix(row.flops),
            "" if row.sent_bytes is None else filesize.decimal(round(row.sent_bytes)),
        )
    return table


def _with_prefix(number: float) -> str:
    """Returns a large number with a prefix of the SI.

    >>> _with_prefix(999), _with_prefix(1_234_000), _with_prefix(5.6e9)
    ('999', '1.23 M', '5.60 G')
    """
    for exponent, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**exponent:
            return f"{number / 10**exponent:.2f} {prefix}"
    return f"{number:.0f}"
