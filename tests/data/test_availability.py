"""`Availability`: who is there in a round, how far they come, what is given out.

Each rule below was broken on purpose, in the library's code, and a test failed:

- someone takes an absent client's place, or all may be absent: test_absent_...,
  test_where_all_are_absent_...
- who drops out may make all batches, or never none, or others stop too:
  test_who_drops_out_...
- a round without a step: test_where_nobody_would_make_a_step_...
- whether a client drops out depends on how nearly it was absent: test_who_is_there_...
- a draw depends on the clients asked before, or on the order of asking:
  test_the_plan_is_the_same_...
- other batches are left out than the last ones: test_given_out_...
- `ends_turn` of the step that was planned, `ends_round` of the samples that were:
  test_ends_are_those_...
"""

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from conftest import RandomImages
from split_lightning.server_map import ServerMap

from split_lightning import SplitDataModule
from split_lightning.data import (
    Availability,
    ClientBatchSampler,
    ClientLoader,
    ParallelSchedule,
    PooledSchedule,
    RoundRobinSchedule,
)

SIZES = [12, 7, 20, 3, 15, 9]  # with batches of 4: 3, 2, 5, 1, 4 and 3 of them
BATCHES = [3, 2, 5, 1, 4, 3]
SOME = Availability(absent=0.3, dropout=0.4)
SCHEDULES = {
    "in turn": RoundRobinSchedule(),
    "shuffled": RoundRobinSchedule(shuffle=True, clients_per_round=4),
    "short turns": RoundRobinSchedule(local_steps=1),
    "short, shuffled": RoundRobinSchedule(shuffle=True, local_steps=2),
    "together": ParallelSchedule(),
    "proportional": ParallelSchedule(draw="proportional", clients_per_round=5),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
each_servers = pytest.mark.parametrize("num_servers", [1, 2, None])


def make_sampler(availability=None, schedule=None, epochs=1, servers=1, seed=0):
    parts = list(torch.arange(sum(SIZES)).split(SIZES))
    return ClientBatchSampler(
        parts,
        schedule or RoundRobinSchedule(),
        batch_size=4,
        local_epochs=epochs,
        seed=seed,
        servers=ServerMap(servers),
        availability=availability,
    )


def rounds_of(sampler, count):
    for round_index in range(count):
        sampler.set_epoch(round_index)
        yield round_index


def plan(sampler):
    """The steps of a round as plain values."""
    return [
        [(p.client_id, p.indices.tolist(), *p[2:]) for p in step]
        for step in sampler.plans()
    ]


def close_to(probability, times):
    """Four standard deviations of a binomial's share."""
    deviation = (probability * (1 - probability) / times) ** 0.5
    return pytest.approx(probability, abs=4 * deviation)


@pytest.mark.parametrize("absent", [0.2, [0.0, 0.1, 0.3, 0.5, 0.7, 0.9]])
def test_absent_clients_are_skipped_at_their_rates(absent):
    sampler, times, counts = make_sampler(Availability(absent)), 600, Counter()
    for _ in rounds_of(sampler, times):
        away, dropped = sampler.absentees()
        assert sampler.turns() == [k for k in range(6) if k not in away]
        assert dropped == {}
        acts = [p.client_id for p in sampler]
        assert acts == [k for k in sampler.turns() for _ in range(BATCHES[k])]
        counts.update(away)
    for client_id in range(6):
        rate = absent[client_id] if isinstance(absent, list) else absent
        assert counts[client_id] / times == close_to(rate, times)


def test_nobody_takes_the_place_of_an_absent_client():
    schedule = RoundRobinSchedule(shuffle=True, clients_per_round=3)
    all_there = make_sampler(schedule=schedule)
    some_away = make_sampler(Availability(absent=0.5), schedule)
    for round_index in rounds_of(some_away, 100):
        all_there.set_epoch(round_index)
        away, _ = some_away.absentees()
        assert some_away.turns() == [k for k in all_there.turns() if k not in away]
        assert set(away) < set(all_there.turns())


def test_where_all_are_absent_the_luckiest_is_there():
    """Of six equal clients each is it as often; the probability changes nobody's luck.

    Whoever is there at a higher probability of absence is there at a lower one.
    """
    nearly = make_sampler(Availability(absent=0.999))
    often = make_sampler(Availability(absent=0.6))
    times, counts = 1000, Counter()
    for round_index in rounds_of(nearly, times):
        often.set_epoch(round_index)
        there = nearly.turns()
        assert there
        assert set(there) <= set(often.turns())
        counts.update(there[:1])
    for client_id in range(6):
        assert counts[client_id] / times == close_to(1 / 6, times)


def test_who_drops_out_makes_none_to_all_but_one_of_its_batches():
    sampler = make_sampler(Availability(dropout=0.4), epochs=2)
    times, made, dropped_out = 1000, [Counter() for _ in SIZES], Counter()
    for _ in rounds_of(sampler, times):
        away, dropped = sampler.absentees()
        assert away == []
        assert sampler.turns() == list(range(6))
        batches = Counter(p.client_id for p in sampler)
        for client_id, (number, planned) in dropped.items():
            assert planned == 2 * BATCHES[client_id]
            assert batches[client_id] == number
            made[client_id][number] += 1
        for client_id in set(range(6)) - set(dropped):  # the others go on
            assert batches[client_id] == 2 * BATCHES[client_id]
        dropped_out.update(list(dropped))
    for client_id, numbers in enumerate(made):
        assert dropped_out[client_id] / times == close_to(0.4, times)
        planned, total = 2 * BATCHES[client_id], sum(numbers.values())
        assert set(numbers) == set(range(planned))
        for count in numbers.values():
            assert count / total == close_to(1 / planned, total)


def test_dropout_has_a_probability_for_each_client():
    sampler = make_sampler(Availability(dropout=[0, 0.9, 0, 0.5, 0, 0]))
    times, counts = 600, Counter()
    for _ in rounds_of(sampler, times):
        counts.update(list(sampler.absentees()[1]))
    assert set(counts) == {1, 3}
    assert counts[1] / times == close_to(0.9, times)
    assert counts[3] / times == close_to(0.5, times)


def test_who_is_there_drops_out_at_the_same_rate():
    """Whether a client drops out has nothing to do with how nearly it was absent."""
    sampler, there, out = make_sampler(SOME), 0, 0
    for _ in rounds_of(sampler, 300):
        there += len(sampler.turns())
        out += len(sampler.absentees()[1])
    assert out / there == close_to(0.4, there)


@pytest.mark.parametrize("schedule", [RoundRobinSchedule(), ParallelSchedule()])
def test_where_nobody_would_make_a_step_the_luckiest_makes_all(schedule):
    """Two clients of a batch each: who drops out makes none."""
    parts = list(torch.arange(6).split(3))
    availability = Availability(dropout=0.9)
    sampler = ClientBatchSampler(parts, schedule, 4, availability=availability)
    times, counts = 1000, Counter()
    for _ in rounds_of(sampler, times):
        acts = tuple(sorted(p.client_id for p in sampler))
        assert acts
        _, dropped = sampler.absentees()
        assert dropped == {k: (0, 1) for k in (0, 1) if k not in acts}
        counts[acts] += 1
    assert counts[0, 1] / times == close_to(0.01, times)
    assert counts[0,] / times == close_to(0.495, times)


@each_schedule
@each_servers
def test_given_out_are_the_planned_batches_minus_those_dropped(schedule, num_servers):
    """Held against a run in which the clients that are there all come to the end.

    Whom the schedule draws is replaced by those that are there: as if the absent had
    not been drawn.
    """
    sampler = make_sampler(SOME, schedule, epochs=2, servers=num_servers)
    planned = make_sampler(Availability(absent=0.3), schedule, 2, num_servers)
    for round_index in rounds_of(sampler, 20):
        planned.set_epoch(round_index)
        away, dropped = sampler.absentees()
        assert planned.absentees() == (away, {})
        expected, begun = [], Counter()
        for step in planned.plans():
            rest = []
            for p in step:
                begun[p.client_id] += 1
                made, _ = dropped.get(p.client_id, (begun[p.client_id], 0))
                if begun[p.client_id] <= made:
                    rest.append((p.client_id, p.indices.tolist(), p.seed))
            expected += [rest] if rest else []
        assert {k: begun[k] for k in dropped} == {k: n for k, (_, n) in dropped.items()}
        given = [
            [(p.client_id, p.indices.tolist(), p.seed) for p in step]
            for step in sampler.plans()
        ]
        assert given == expected
        assert len(sampler) == len(expected) > 0
        for client_id in set(begun) - set(dropped):  # two whole passes
            own = [
                i for step in given for k, ids, _ in step if k == client_id for i in ids
            ]
            assert sorted(own) == sorted(2 * sampler.partition[client_id].tolist())
        assert not set(away) & {k for step in given for k, *_ in step}


@each_schedule
@each_servers
def test_ends_are_those_of_the_steps_that_follow(schedule, num_servers):
    sampler = make_sampler(SOME, schedule, servers=num_servers)
    for _ in rounds_of(sampler, 20):
        steps = list(sampler.plans())
        for number, (step, following) in enumerate(pairwise([*steps, []])):
            acting = {p.client_id for p in step}
            changes = acting != {p.client_id for p in following}
            later = {p.client_id for rest in steps[number + 1 :] for p in rest}
            for p in step:
                assert p.ends_turn == changes
                assert p.ends_round == (p.client_id not in later)


@each_schedule
def test_the_plan_is_the_same_in_whatever_order_it_is_asked_for(schedule):
    first = make_sampler(SOME, schedule, servers=2)
    plans = [plan(first) for _ in rounds_of(first, 10)]
    assert len({str(one) for one in plans}) == 10
    other, order = make_sampler(SOME, schedule, servers=2), list(range(10)) * 2
    random.Random(0).shuffle(order)
    for round_index in order:
        other.set_epoch(round_index)
        other.absentees(), len(other), other.turns()
        assert plan(other) == plans[round_index]


def test_a_client_is_drawn_by_itself_and_by_the_seed():
    """Who else was drawn for a round is nothing to a client; the seed is."""
    some = RoundRobinSchedule(clients_per_round=3)
    one, few = make_sampler(SOME), make_sampler(SOME, some)
    other = make_sampler(SOME, seed=1)
    differs = 0
    for round_index in rounds_of(few, 100):
        one.set_epoch(round_index)
        other.set_epoch(round_index)
        away, dropped = few.absentees()
        all_away, all_dropped = one.absentees()
        drawn = set(few.turns()) | set(away)
        if len(few.turns()) > 1:  # else it may be there since all others are not
            assert set(away) == set(all_away) & drawn
            there = {k: all_dropped[k] for k in sorted(drawn & set(all_dropped))}
            missing = set(there) - set(dropped)
            assert dropped == {k: there[k] for k in there if k not in missing}
            nobody_would = all(made == 0 for made, _ in there.values())
            assert len(missing) <= (set(there) == set(few.turns()) and nobody_would)
        differs += one.absentees() != other.absentees()
    assert differs > 90


@each_schedule
def test_from_any_position_the_rest_of_the_round_follows(schedule):
    def loader():
        sampler = make_sampler(SOME, schedule)
        sampler.set_epoch(3)
        return ClientLoader(RandomImages(75).load(True), sampler, torch.Tensor.float)

    def told(batches):
        return [
            [
                (p.client_id, p.inputs.tolist(), p.ends_turn, p.ends_round)
                for p in b.parts
            ]
            for b in batches
        ]

    whole = told(loader())
    for position in range(1, len(whole)):
        stopped = loader()
        batches = iter(stopped)
        for _ in range(position):
            next(batches)
        resumed = loader()
        resumed.load_state_dict(stopped.state_dict())
        assert told(resumed) == whole[position:]


@each_schedule
def test_probabilities_of_zero_change_nothing(schedule):
    usual, zero = make_sampler(None, schedule), make_sampler(Availability(), schedule)
    zeros = make_sampler(Availability([0.0] * 6, [0] * 6), schedule)
    for round_index in rounds_of(usual, 3):
        zero.set_epoch(round_index)
        zeros.set_epoch(round_index)
        assert plan(usual) == plan(zero) == plan(zeros)
        assert usual.absentees() == ([], {})


@pytest.mark.parametrize("option", ["absent", "dropout"])
def test_rounds_are_not_equal_where_anything_may_be_missing(option):
    assert make_sampler(Availability(**{option: 0.0})).rounds_are_equal
    assert not make_sampler(Availability(**{option: 0.1})).rounds_are_equal
    assert not make_sampler(
        Availability(**{option: [0, 0.1, *[0] * 4]})
    ).rounds_are_equal


@pytest.mark.parametrize("option", ["absent", "dropout"])
@pytest.mark.parametrize(
    "value", [1, -0.1, float("nan"), "0.5", None, True, [], [0, 1]]
)
def test_what_is_no_probability_is_refused(option, value):
    with pytest.raises(ValueError, match=f"`{option}` to be a probability in"):
        Availability(**{option: value})


def make_data(num_clients=3, **options):
    return SplitDataModule(RandomImages(), num_clients, batch_size=6, **options)


@pytest.mark.parametrize("option", ["absent", "dropout"])
def test_a_list_is_of_one_for_each_client(option):
    availability = Availability(**{option: [0.1, 0.2]})
    message = rf"`{option}` .* \(`num_clients` is 3\), but got 2"
    with pytest.raises(ValueError, match=message):
        make_data(availability=availability)
    make_data(2, availability=availability)
    with pytest.raises(ValueError, match=r"`num_clients` is 6"):
        make_sampler(availability)


def test_pooled_samples_cannot_be_absent():
    pooled = {"schedule": PooledSchedule()}
    with pytest.raises(ValueError, match="one party holds all clients' samples"):
        make_data(**pooled, availability=Availability(dropout=0.1))
    data = make_data(**pooled, availability=Availability([0, 0, 0]))
    data.setup("fit")
    assert sum(len(batch.targets) for batch in data.train_dataloader()) == sum(
        map(len, data.parts)
    )


def test_the_data_module_passes_it_on():
    data = make_data(availability=SOME)
    data.setup("fit")
    loader = data.train_dataloader()
    assert loader.sampler.availability is SOME
    with pytest.raises(TypeError):
        len(loader)
