"""Schedules: who acts in each step, and what is drawn in proportion to what is left."""

from itertools import groupby

import pytest
import torch
from split_lightning.server_map import ServerMap

from split_lightning.data import (
    ClientBatchSampler,
    ParallelSchedule,
    RoundRobinSchedule,
)

SIZES = {4: 5, 0: 2, 2: 8}  # in the order of their turns


def steps_of(schedule, batch_size=3, local_epochs=1, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    steps = schedule.steps(SIZES, batch_size, local_epochs, drawn)
    return [[tuple(draw) for draw in step] for step in steps]


def test_turns_are_one_after_the_other():
    assert steps_of(RoundRobinSchedule()) == [
        [(4, 3)], [(4, 2)], [(0, 2)], [(2, 3)], [(2, 3)], [(2, 2)],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("local_steps", "order"),
    [(1, [4, 0, 2, 4, 2, 2]), (2, [4, 4, 0, 2, 2, 2]), (9, [4, 4, 0, 2, 2, 2])],
)
def test_turns_of_a_few_batches_go_round_until_all_are_done(local_steps, order):
    steps = steps_of(RoundRobinSchedule(local_steps=local_steps))
    assert [client for ((client, _),) in steps] == order
    for client in SIZES:
        own = [count for ((k, count),) in steps if k == client]
        assert own == {4: [3, 2], 0: [2], 2: [3, 3, 2]}[client]


def test_shuffled_turns_are_drawn_in_proportion_to_those_that_are_left():
    """Of the six turns of a batch each, three are of the largest client."""
    schedule = RoundRobinSchedule(shuffle=True, local_steps=1)
    firsts = torch.zeros(5)
    for seed in range(2000):
        order = [client for ((client, _),) in steps_of(schedule, seed=seed)]
        assert sorted(order) == [0, 2, 2, 2, 4, 4]
        firsts[order[0]] += 1 / 2000
    expected = torch.tensor([1 / 6, 0, 3 / 6, 0, 2 / 6])
    torch.testing.assert_close(firsts, expected, atol=0.05, rtol=0)


def test_shuffled_turns_of_two_batches_stay_whole():
    schedule = RoundRobinSchedule(shuffle=True, local_steps=2)
    for seed in range(20):
        steps = steps_of(schedule, local_epochs=3, seed=seed)
        order = [client for ((client, _),) in steps]
        for client, run in groupby(order):
            length = len(list(run))
            assert length % 2 == 0 or client in (0, 2)  # 3 and 9 batches: a last turn


def test_clients_together_bring_a_batch_each_while_they_last():
    assert steps_of(ParallelSchedule()) == [
        [(4, 3), (0, 2), (2, 3)],
        [(4, 2), (2, 3)],
        [(2, 2)],
    ]


@pytest.mark.parametrize(
    "schedule",
    [RoundRobinSchedule(), RoundRobinSchedule(local_steps=2), ParallelSchedule()],
    ids=["in turn", "short turns", "together"],
)
def test_each_client_passes_so_often_over_its_samples(schedule):
    draws = [draw for step in steps_of(schedule, local_epochs=3) for draw in step]
    for client, size in SIZES.items():
        own = [count for k, count in draws if k == client]
        assert sum(own) == 3 * size
        assert own == 3 * own[: len(own) // 3]  # no batch spans two passes


@pytest.mark.parametrize("local_epochs", [1, 2])
def test_batches_are_drawn_from_all_clients_in_proportion(local_epochs):
    schedule = ParallelSchedule(draw="proportional")
    first = torch.zeros(5)
    for seed in range(2000):
        steps = steps_of(schedule, 6, local_epochs, seed)
        totals = [sum(count for _, count in step) for step in steps]
        assert totals == [6, 6, 3] * local_epochs
        for begin in range(0, len(steps), 3):  # each pass by itself is complete
            passed = [draw for step in steps[begin : begin + 3] for draw in step]
            for client, size in SIZES.items():
                assert sum(n for k, n in passed if k == client) == size
        for client, count in steps[0]:
            first[client] += count / 2000
    expected = 6 / 15 * torch.tensor([2.0, 0, 8, 0, 5])
    torch.testing.assert_close(first, expected, atol=0.1, rtol=0)


def test_clients_of_a_server_follow_those_of_another():
    parts = list(torch.arange(24).split(4))
    schedule = RoundRobinSchedule(shuffle=True, local_steps=1)
    servers = ServerMap(2)
    sampler = ClientBatchSampler(parts, schedule, 2, servers=servers)
    for round_index in range(5):
        sampler.set_epoch(round_index)
        served = [servers.server_of(plan.client_id, 6) for plan in sampler]
        assert [server for server, _ in groupby(served)] in ([0, 1], [1, 0])
        assert served.count(0) == served.count(1) == 6
