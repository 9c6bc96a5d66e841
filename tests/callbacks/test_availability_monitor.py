"""`AvailabilityMonitor` against what each round gave out."""

import logging
import re
from collections import Counter

import pytest
from watching import ListLogger, batches_of, fit, make_data

from split_lightning import RoundRobinWeightPassing
from split_lightning.callbacks import AvailabilityMonitor
from split_lightning.protocols import Round
from split_lightning.system import Availability

LOGGER = "split_lightning.callbacks.availability_monitor"
ROUNDS = 6
FOUR = RoundRobinWeightPassing(clients_per_round=4)
BATCHES = 3  # of each of five clients: 10 samples in batches of 4


def made(**options):
    data = make_data(5, batch_size=4, **options)
    data.protocol = FOUR
    return data


def lines_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name == LOGGER]


def told(text):
    """Who is absent and who dropped out, read from a line."""
    absent = re.search(r"absent: clients? ([\d, ]+)", text)
    ids = [int(number) for number in absent[1].split(", ")] if absent else []
    dropped = re.findall(r"client (\d+) after (\d+) of (\d+) batches", text)
    return ids, {int(k): (int(m), int(n)) for k, m, n in dropped}


@pytest.mark.parametrize("limit", [None, 2])
def test_lines_and_numbers_are_what_was_not_given_out(tmp_path, caplog, limit):
    """Each round by itself, and a round that is cut short has the same."""
    options = {"availability": Availability(absent=0.3, dropout=0.4)}
    logger, data = ListLogger(), made(**options)
    with caplog.at_level(logging.INFO, logger=LOGGER):
        fit(
            tmp_path,
            [AvailabilityMonitor()],
            passing=FOUR,
            data=data,
            logger=logger,
            max_epochs=ROUNDS,
            limit_train_batches=limit,
        )
    texts = {int(re.match(r"round (\d+): ", t)[1]): t for t in lines_of(caplog)}
    assert len(texts) == len(lines_of(caplog))
    given = [Counter() for _ in range(ROUNDS)]
    for round_index, batch in batches_of(made(**options), ROUNDS):
        given[round_index][batch.client_id] += 1
    numbers = []
    for round_index, batches in enumerate(given):
        drawn = Round(round_index, [10] * 5, 4, seed=data.seed).clients(4)
        absent, dropped = told(texts.get(round_index + 1, ""))
        short = {k for k in drawn if batches[k] < BATCHES}
        assert set(absent) | set(dropped) == short
        assert dropped == {k: (batches[k], BATCHES) for k in dropped}
        assert all(batches[k] == 0 for k in absent)
        assert absent == sorted(absent)
        numbers.append((len(absent), len(dropped)))
    assert logger.values("system/absent") == [n for n, _ in numbers]
    assert logger.values("system/dropped") == [n for _, n in numbers]
    assert min(map(sum, zip(*numbers, strict=True))) > 0


def test_nothing_is_told_where_all_are_there(tmp_path, caplog):
    logger = ListLogger()
    with caplog.at_level(logging.INFO, logger=LOGGER):
        fit(tmp_path, [AvailabilityMonitor()], data=made(), logger=logger, max_epochs=1)
    assert lines_of(caplog) == []
    assert not [name for name in logger.logged if name.startswith("system/")]
