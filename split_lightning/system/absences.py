"""`Absences`: which clients were really absent, in a file that can be replayed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


class Absences:
    """Records which clients were absent from which rounds; replays a record.

    Args:
        path: The file, in JSON: for each round, from 0, the absent clients. It is read
            if it exists. `None`: nothing is written.

    Attributes:
        rounds: The absent clients, by round.
        decide: Returns the clients that are absent as a round begins; `None`: those of
            the record alone are.

    Raises:
        ValueError: If the file is no such record.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.rounds: dict[int, list[int]] = {}
        self.decide: Callable[[], Iterable[int]] | None = None
        if self.path is not None and self.path.is_file():
            self.rounds = _read(self.path)

    @property
    def is_trivial(self) -> bool:
        """Whether no client can be absent."""
        return self.decide is None and not any(self.rounds.values())

    def of(self, round_index: int) -> Sequence[int]:
        """Returns the clients that are absent from a round."""
        if self.decide is not None and round_index not in self.rounds:
            self.note(round_index, self.decide())
        return self.rounds.get(round_index, ())

    def latest(self) -> Sequence[int]:
        """Returns the clients that are absent from the latest round of the record."""
        return self.rounds[max(self.rounds)] if self.rounds else ()

    def note(self, round_index: int, clients: Iterable[int]) -> None:
        """Records that clients are absent from a round."""
        before = self.rounds.get(round_index, [])
        self.rounds[round_index] = sorted({*before, *clients})
        self._write()

    def forget(self) -> None:
        """Begins a new record."""
        self.rounds = {}
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        being_written = self.path.with_suffix(".tmp")
        being_written.write_text(json.dumps(self.rounds))
        os.replace(being_written, self.path)


def _read(path: Path) -> dict[int, list[int]]:
    try:
        found = json.loads(path.read_text())
        return {int(number): list(map(int, own)) for number, own in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected {path} to be a record of absences, such as "
            f'{{"2": [0, 3]}} for clients 0 and 3 in round 2, but: {error}.'
        ) from error
