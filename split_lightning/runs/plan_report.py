"""The plan of a round as a table on the terminal, totals, and a CSV file."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, get_args

from rich import box, filesize
from rich.console import Console
from rich.table import Table
from rich.text import Text

from split_lightning.message import Computed, Kind, Message, role_of
from split_lightning.observers.clock import Clock
from split_lightning.protocols.actions import Train
from split_lightning.runs.report import print_line, widen

KINDS: tuple[str, ...] = get_args(Kind)
_FIRST, _LAST = 36, 8  # rows of a long plan that are shown


class Row(NamedTuple):
    """An action.

    Attributes:
        action: Its name.
        clients: The clients that it concerns.
        more: Further words about it.
        samples: Number of samples that are trained on.
        num_bytes: What it sends, by kind.
        seconds: Virtual seconds when those that take part are done; `None`: without a
            system.
        times: The number of equal actions.
    """

    action: str
    clients: tuple[int, ...]
    more: str
    samples: int
    num_bytes: Mapping[str, int]
    seconds: float | None = None
    times: int = 1


class Plan(NamedTuple):
    """What happens in a round.

    Attributes:
        title: What is planned.
        number: The round, from 1.
        rows: Its actions.
        of_round: What it sends in all, by the names in `results.json`.
        of_run: What the rounds up to it send.
        seconds: Virtual seconds of the round, and of the rounds up to it.
        is_bound: Whether less may be sent, since holders lack samples.
    """

    title: str
    number: int
    rows: Sequence[Row]
    of_round: Mapping[str, int]
    of_run: Mapping[str, int]
    seconds: tuple[float, float] | None = None
    is_bound: bool = False


def row_of(
    action: Any, events: Iterable[Message | Computed], clock: Clock | None
) -> Row:
    """Returns the row of an action, from what it caused."""
    num_bytes: Counter[str] = Counter()
    there: list[float] = []
    for event in events:
        if isinstance(event, Message):
            num_bytes[event.kind] += event.num_bytes
            parties = [event.sender, event.receiver]
        else:
            parties = [event.party]
        if clock is not None:
            there += [clock.ready.get(name, 0.0) for name in parties]
            there += [
                clock.ready.get(f"{name}/{role_of(other)}", 0.0)  # of an aggregator
                for name, other in zip(parties, reversed(parties), strict=True)
            ]
    seconds = max(there, default=None)
    clients, more, samples = _described(action)
    return Row(type(action).__name__, clients, more, samples, num_bytes, seconds)


def _described(action: Any) -> tuple[tuple[int, ...], str, int]:
    """Returns the clients of an action, what else it says, and its samples."""
    if isinstance(action, Train):
        samples = sum(batch.num_samples for batch in action.batches)
        return tuple(batch.client_id for batch in action.batches), "", samples
    fields: dict[str, Any] = vars(action)
    clients = tuple(fields.get("clients", ()))
    clients += tuple(fields[name] for name in ("client", "to") if name in fields)
    if "batch" in fields:
        clients += (fields["batch"].client_id,)
    more = [f"age {fields['age']}"] if "age" in fields else []
    if not clients:
        more += [f"{role}s" for role in fields.get("roles", ())]
    return clients, ", ".join(more), 0


def folded(rows: Sequence[Row]) -> list[Row]:
    """Returns rows of which equal ones, one after the other, are one.

    First training steps of the same clients are one row; then training steps with the
    same actions until the next one.
    """
    turns = [_sum_of(list(several)) for _, several in groupby(rows, key=_what)]
    steps: list[list[Row]] = []
    for row in turns:
        if row.action == Train.__name__ or not steps:
            steps.append([])
        steps[-1].append(row)
    found: list[Row] = []
    for _, alike in groupby(steps, key=lambda step: list(map(_what, step))):
        found += map(_sum_of, zip(*alike, strict=True))
    return found


def _what(row: Row) -> tuple[str, tuple[int, ...], str]:
    return row.action, row.clients, row.more


def _sum_of(rows: Sequence[Row]) -> Row:
    """Returns equal rows as one, with all that they send."""
    num_bytes = sum((Counter(row.num_bytes) for row in rows), Counter[str]())
    return rows[-1]._replace(
        samples=sum(row.samples for row in rows),
        num_bytes=num_bytes,
        times=sum(row.times for row in rows),
    )


def report_plan(
    plan: Plan, output: str | None = None, console: Console | None = None
) -> None:
    """Prints the plan of a round, and its totals.

    Args:
        plan: The plan.
        output: A file for all actions, one a row; `None`: there is none.
        console: Where to print; `None`: standard output.
    """
    console = console or Console()
    print_line(console, f"round {plan.number}: {plan.title}")
    rows = folded(plan.rows)
    left = len(rows) - _FIRST - _LAST
    shown = rows if left <= 1 else [*rows[:_FIRST], None, *rows[-_LAST:]]
    tables = plan_table(shown, plan.seconds is not None, left), totals_table(plan)
    widen(console, tables)
    console.print(*tables, sep="\n")
    if plan.is_bound:
        console.print("Holders that lack samples send less than this.")
    if output is not None:
        write_rows(plan.rows, output)
        print_line(console, f"table: {output}")


def plan_table(rows: Sequence[Row | None], has_seconds: bool, left: int = 0) -> Table:
    """Returns a table of actions.

    Args:
        rows: The actions; `None` where some are left out.
        has_seconds: Whether there are virtual seconds.
        left: How many are left out.
    """
    there = [row for row in rows if row is not None]
    kinds = [kind for kind in KINDS if any(row.num_bytes.get(kind) for row in there)]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("action", overflow="fold")
    for name in ("samples", *kinds, *(["seconds"] if has_seconds else [])):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        if row is None:
            table.add_row(f"... {left:,} more")
            continue
        sizes = (row.num_bytes.get(kind, 0) for kind in kinds)
        seconds = "" if row.seconds is None else f"{row.seconds:,.4f}"
        table.add_row(
            Text(words(row)),
            f"{row.samples:,}" if row.samples else "",
            *(_short(size) if size else "" for size in sizes),
            *([seconds] if has_seconds else []),
        )
    return table


def _short(num_bytes: int) -> str:
    return filesize.decimal(num_bytes).replace("bytes", "B")


def words(row: Row) -> str:
    """Returns an action in words.

    >>> words(Row("Train", (3,), "", 384, {}, times=12))
    'Train client 3 x 12'
    >>> words(Row("Synchronize", (0, 1, 2, 3, 4), "", 0, {}))
    'Synchronize clients 0-4'
    """
    clients = sorted(row.clients)
    who = f"{len(clients):,} clients" if clients else ""
    if len(clients) == 1:
        who = f"client {clients[0]}"
    elif clients and clients[-1] - clients[0] == len(clients) - 1:
        who = f"clients {clients[0]}-{clients[-1]}"
    text = " ".join(filter(None, (row.action, who)))
    text += f"{',' if who else ''} {row.more}" if row.more else ""
    return f"{text} x {row.times}" if row.times > 1 else text


def totals_table(plan: Plan) -> Table:
    """Returns the totals of a round, and of the rounds up to it, by `results.json`."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("total", overflow="fold")
    table.add_column(f"round {plan.number}", justify="right", overflow="fold")
    if plan.number > 1:
        rounds = f"rounds 1 to {plan.number}"
        table.add_column(rounds, justify="right", overflow="fold")
    for name, of_run in plan.of_run.items():
        if of_run:
            table.add_row(name, *_both(plan, f"{plan.of_round[name]:,}", f"{of_run:,}"))
    if plan.seconds is not None:
        table.add_row(
            "virtual_seconds", *_both(plan, *map("{:,.4f}".format, plan.seconds))
        )
    return table


def _both(plan: Plan, *values: str) -> Sequence[str]:
    return values if plan.number > 1 else values[:1]


def write_rows(rows: Sequence[Row], output: str) -> None:
    """Writes a row for each action.

    Args:
        rows: The actions.
        output: The file.
    """
    has_seconds = any(row.seconds is not None for row in rows)
    names = ["action", "clients", "more", "samples", *KINDS]
    with open(output, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*names, *(["seconds"] if has_seconds else [])])
        for row in rows:
            clients = " ".join(map(str, row.clients))
            sizes = [row.num_bytes.get(kind, 0) for kind in KINDS]
            seconds = ["" if row.seconds is None else row.seconds]
            table.writerow(
                [row.action, clients, row.more, row.samples, *sizes]
                + (seconds if has_seconds else [])
            )
