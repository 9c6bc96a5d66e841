"""`Round`: who takes part, and which batches each turn and each step has."""

from collections import Counter
from itertools import groupby, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from split_lightning.placement import group_of
from split_lightning.protocols import Round

SIZES = [2, 1, 8, 1, 5]
CLIENTS = [4, 0, 2]  # in the order of their turns
SEEDS = st.integers(0, 2**32 - 1)


def make(batch_size=3, local_epochs=1, seed=0, number=0):
    return Round(number, SIZES, batch_size, local_epochs, seed)


def batches_in_turn(round, **options):
    """The client and the number of samples of each batch."""
    turns = round.turns(CLIENTS, **options)
    return [(k, batch.num_samples) for k, own in turns for batch in own]


def batches_together(round, draw="equal"):
    return [[(b.client_id, b.num_samples) for b in step]
            for step in round.together(CLIENTS, draw)]  # fmt: skip


def test_turns_are_one_after_the_other():
    assert batches_in_turn(make()) == [
        (4, 3), (4, 2), (0, 2), (2, 3), (2, 3), (2, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("local_steps", "order"),
    [(1, [4, 0, 2, 4, 2, 2]), (2, [4, 4, 0, 2, 2, 2]), (9, [4, 4, 0, 2, 2, 2])],
)
def test_turns_of_a_few_batches_go_round_until_all_are_done(local_steps, order):
    found = batches_in_turn(make(), local_steps=local_steps)
    assert [client for client, _ in found] == order
    for client in CLIENTS:
        own = [count for k, count in found if k == client]
        assert own == {4: [3, 2], 0: [2], 2: [3, 3, 2]}[client]


def test_shuffled_turns_are_drawn_in_proportion_to_those_that_are_left():
    """Of the six turns of a batch each, three are of the largest client."""
    firsts = torch.zeros(5)
    for seed in range(2000):
        found = batches_in_turn(make(seed=seed), local_steps=1, shuffle=True)
        order = [client for client, _ in found]
        assert sorted(order) == [0, 2, 2, 2, 4, 4]
        firsts[order[0]] += 1 / 2000
    expected = torch.tensor([1 / 6, 0, 3 / 6, 0, 2 / 6])
    torch.testing.assert_close(firsts, expected, atol=0.05, rtol=0)


def test_shuffled_turns_of_two_batches_stay_whole():
    for seed in range(20):
        round = make(local_epochs=3, seed=seed)
        found = batches_in_turn(round, local_steps=2, shuffle=True)
        for client, run in groupby(client for client, _ in found):
            length = len(list(run))
            assert length % 2 == 0 or client in (0, 2)  # 3 and 9 batches: a last turn


def test_clients_together_bring_a_batch_each_while_they_last():
    assert batches_together(make()) == [
        [(4, 3), (0, 2), (2, 3)],
        [(4, 2), (2, 3)],
        [(2, 2)],
    ]


@pytest.mark.parametrize("local_epochs", [1, 2])
def test_batches_are_drawn_from_all_clients_in_proportion(local_epochs):
    first = torch.zeros(5)
    for seed in range(2000):
        steps = batches_together(make(6, local_epochs, seed), "proportional")
        totals = [sum(count for _, count in step) for step in steps]
        assert totals == [6, 6, 3] * local_epochs
        for begin in range(0, len(steps), 3):  # each pass by itself is complete
            passed = Counter()
            for step in steps[begin : begin + 3]:
                passed.update(dict(step))
            assert passed == {k: SIZES[k] for k in CLIENTS}
        for client, count in steps[0]:
            first[client] += count / 2000
    expected = 6 / 15 * torch.tensor([2.0, 0, 8, 0, 5])
    torch.testing.assert_close(first, expected, atol=0.1, rtol=0)


def test_clients_of_a_server_follow_those_of_another():
    groups = {k: group_of(k, 6, 2) for k in range(6)}
    for number in range(5):
        round = Round(number, [4] * 6, batch_size=2)
        turns = round.turns(round.clients(shuffle=True), 1, shuffle=True, groups=groups)
        served = [groups[client] for client, own in turns for _ in own]
        assert [server for server, _ in groupby(served)] in ([0, 1], [1, 0])
        assert served.count(0) == served.count(1) == 6


@given(
    num_clients=st.integers(1, 50),
    some=st.none() | st.integers(1, 50),
    shuffle=st.booleans(),
    seed=SEEDS,
    numbers=st.lists(st.integers(0, 10_000), min_size=1, max_size=5),
)
def test_clients_are_a_function_of_seed_and_round(
    num_clients, some, shuffle, seed, numbers
):
    rounds = {n: Round(n, [1] * num_clients, 1, seed=seed) for n in numbers}
    if some is not None and some > num_clients:
        with pytest.raises(ValueError, match="clients_per_round"):
            rounds[numbers[0]].clients(some)
        return
    drawn = {n: round.clients(some, shuffle) for n, round in rounds.items()}
    for number, clients in drawn.items():
        assert len(clients) == len(set(clients)) == (some or num_clients)
        assert set(clients) <= set(range(num_clients))
        if not shuffle:
            assert clients == sorted(clients)
        torch.manual_seed(number)  # the global state does not matter
        again = Round(number, [1] * num_clients, 1, seed=seed)
        assert again.clients(some, shuffle) == clients


@given(seed=SEEDS)
def test_shuffled_clients_differ(seed):
    """Fifty clients in the same order twice: once in 10^64 draws."""
    rounds = [Round(n, [1] * 50, 1, seed=s) for n in range(3) for s in (seed, seed + 1)]
    assert len({tuple(round.clients(shuffle=True)) for round in rounds}) == 6


@given(
    sizes=st.lists(st.integers(1, 15), min_size=1, max_size=5),
    batch_size=st.integers(1, 8),
    local_epochs=st.integers(1, 3),
    local_steps=st.none() | st.integers(1, 4),
    shuffle=st.booleans(),
    seed=SEEDS,
)
def test_passes_cover_each_sample_once(
    sizes, batch_size, local_epochs, local_steps, shuffle, seed
):
    """In turns and together, and the ends of turns and rounds are where they are."""
    round = Round(0, sizes, batch_size, local_epochs, seed)
    turns = round.turns(round.clients(shuffle=shuffle), local_steps, shuffle)
    in_turn = [(batch,) for _, own in turns for batch in own]
    for steps in (
        in_turn,
        list(round.together(round.clients())),
        list(round.together(round.clients(), "proportional")),
    ):
        for client, size in enumerate(sizes):
            own = [b for step in steps for b in step if b.client_id == client]
            assert [b.number for b in own] == list(range(len(own)))
            seen = [
                (b.pass_number, sample)
                for b in own
                for sample in range(b.start, b.start + b.num_samples)
            ]
            whole = [(p, sample) for p in range(local_epochs) for sample in range(size)]
            assert seen == whole
            assert [b.ends_round for b in own] == [False] * (len(own) - 1) + [True]
        for step, following in pairwise([*steps, ()]):
            changes = {b.client_id for b in step} != {b.client_id for b in following}
            assert {b.ends_turn for b in step} == {changes}
