"""`Availability`: who is there in a round, how far they come, what is given out.

Each rule below was broken on purpose, in the library's code, and a test failed:

- someone takes an absent client's place, or all may be absent: test_absent_...,
  test_where_all_are_absent_...
- a client that drops out may make all batches, or never none, or others stop too:
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
from conftest import RandomImages
from protocols import fit, make_unsplit
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from split_lightning import (
    GPSL,
    AsynchronousWeightPassing,
    Centralized,
    MultiServer,
    ParallelSplitLearning,
    RoundRobinWeightPassing,
    SplitDataModule,
)
from split_lightning.protocols import Round
from split_lightning.system import Availability

SIZES = [12, 7, 20, 3, 15, 9]  # with batches of 4: 3, 2, 5, 1, 4 and 3 of them
BATCHES = [3, 2, 5, 1, 4, 3]
SOME = Availability(absent=0.3, dropout=0.4)
PROTOCOLS = {
    "in turn": RoundRobinWeightPassing(),
    "shuffled": RoundRobinWeightPassing(shuffle=True, clients_per_round=4),
    "short turns": RoundRobinWeightPassing(local_steps=1),
    "two servers": MultiServer(2, shuffle=True, local_steps=2),
    "together": ParallelSplitLearning(),
    "proportional": GPSL(clients_per_round=5),
    "at the same time": AsynchronousWeightPassing(local_steps=2),
}
each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


class Planned:
    """A round, the steps of its plan, and who is away in it."""

    def __init__(
        self, number, availability=None, protocol=None, epochs=1, seed=0, sizes=SIZES
    ):
        round = Round(number, sizes, 4, epochs, seed, availability)
        self.steps = list((protocol or PROTOCOLS["in turn"]).steps(round))
        self.batches = [batch for step in self.steps for batch in step.parts]
        self.acts = [batch.client_id for batch in self.batches]
        self.absent, self.dropped = round.absent, round.dropped
        self.present = [k for k in range(len(sizes)) if k not in self.absent]


def close_to(probability, times):
    """Four standard deviations of a binomial's share."""
    deviation = (probability * (1 - probability) / times) ** 0.5
    return pytest.approx(probability, abs=4 * deviation)


@pytest.mark.parametrize("absent", [0.2, [0.0, 0.1, 0.3, 0.5, 0.7, 0.9]])
def test_absent_clients_are_skipped_at_their_rates(absent):
    times, counts = 600, Counter()
    for number in range(times):
        plan = Planned(number, Availability(absent))
        assert plan.dropped == {}
        assert plan.acts == [k for k in plan.present for _ in range(BATCHES[k])]
        counts.update(plan.absent)
    for client_id in range(6):
        rate = absent[client_id] if isinstance(absent, list) else absent
        assert counts[client_id] / times == close_to(rate, times)


def test_nobody_takes_the_place_of_an_absent_client():
    for number in range(100):
        drawn = Round(number, SIZES, 4).clients(3, shuffle=True)
        some_away = Round(number, SIZES, 4, availability=Availability(absent=0.5))
        present = some_away.clients(3, shuffle=True)
        assert present == [k for k in drawn if k not in some_away.absent]
        assert set(some_away.absent) < set(drawn)


def test_where_all_are_absent_the_luckiest_is_there():
    """Of six equal clients each is it as often; the probability changes nobody's luck.

    A client that is there at a higher probability of absence is there at a lower one.
    """
    times, counts = 1000, Counter()
    for number in range(times):
        nearly = Planned(number, Availability(absent=0.999)).present
        often = Planned(number, Availability(absent=0.6)).present
        assert nearly
        assert set(nearly) <= set(often)
        counts.update(nearly[:1])
    for client_id in range(6):
        assert counts[client_id] / times == close_to(1 / 6, times)


def test_who_drops_out_makes_none_to_all_but_one_of_its_batches():
    times, made, dropped_out = 1000, [Counter() for _ in SIZES], Counter()
    for round_index in range(times):
        plan = Planned(round_index, Availability(dropout=0.4), epochs=2)
        assert plan.absent == []
        batches = Counter(plan.acts)
        for client_id, (number, planned) in plan.dropped.items():
            assert planned == 2 * BATCHES[client_id]
            assert batches[client_id] == number
            made[client_id][number] += 1
        for client_id in set(range(6)) - set(plan.dropped):  # the others go on
            assert batches[client_id] == 2 * BATCHES[client_id]
        dropped_out.update(list(plan.dropped))
    for client_id, numbers in enumerate(made):
        assert dropped_out[client_id] / times == close_to(0.4, times)
        planned, total = 2 * BATCHES[client_id], sum(numbers.values())
        assert set(numbers) == set(range(planned))
        for count in numbers.values():
            assert count / total == close_to(1 / planned, total)


def test_dropout_has_a_probability_for_each_client():
    availability, times, counts = (
        Availability(dropout=[0, 0.9, 0, 0.5, 0, 0]),
        600,
        Counter(),
    )
    for number in range(times):
        counts.update(list(Planned(number, availability).dropped))
    assert set(counts) == {1, 3}
    assert counts[1] / times == close_to(0.9, times)
    assert counts[3] / times == close_to(0.5, times)


def test_who_is_there_drops_out_at_the_same_rate():
    """Whether a client drops out has nothing to do with how nearly it was absent."""
    plans = [Planned(number, SOME) for number in range(300)]
    there = sum(len(plan.present) for plan in plans)
    out = sum(len(plan.dropped) for plan in plans)
    assert out / there == close_to(0.4, there)


@pytest.mark.parametrize("name", ["in turn", "together"])
def test_where_nobody_would_make_a_step_the_luckiest_makes_all(name):
    """Two clients of a batch each: a client that drops out makes none."""
    times, counts = 1000, Counter()
    for number in range(times):
        availability = Availability(dropout=0.9)
        plan = Planned(number, availability, PROTOCOLS[name], sizes=[3, 3])
        acts = tuple(sorted(plan.acts))
        assert acts
        assert plan.dropped == {k: (0, 1) for k in (0, 1) if k not in acts}
        counts[acts] += 1
    assert counts[0, 1] / times == close_to(0.01, times)
    assert counts[0,] / times == close_to(0.495, times)


@each_protocol
def test_given_out_are_the_planned_batches_minus_those_dropped(protocol):
    """Held against a run in which the clients that are there all come to the end.

    Clients that are drawn are replaced by those that are there: as if the absent had
    not been drawn. Where all train at the same time, the order is another.
    """
    in_order = not isinstance(protocol, AsynchronousWeightPassing)
    for number in range(20):
        plan = Planned(number, SOME, protocol, epochs=2)
        whole = Planned(number, Availability(absent=0.3), protocol, epochs=2)
        assert (whole.absent, whole.dropped) == (plan.absent, {})
        expected, begun = [], Counter(whole.acts)
        assert {k: begun[k] for k in plan.dropped} == {
            k: planned for k, (_, planned) in plan.dropped.items()
        }
        for step in whole.steps:
            rest = [
                batch[:5]
                for batch in step.parts
                if batch.number < plan.dropped.get(batch.client_id, (99, 0))[0]
            ]
            expected += [rest] if rest else []
        given = [[batch[:5] for batch in step.parts] for step in plan.steps]
        assert given
        assert (given if in_order else sorted(given)) == (
            expected if in_order else sorted(expected)
        )
        for client_id in set(begun) - set(plan.dropped):  # two whole passes
            own = [b.num_samples for b in plan.batches if b.client_id == client_id]
            assert sum(own) == 2 * SIZES[client_id]
        assert not set(plan.absent) & set(plan.acts)


@each_protocol
def test_ends_are_those_of_the_steps_that_follow(protocol):
    """A turn ends where others train next; at the same time, with its last batch."""
    for number in range(20):
        plan = Planned(number, SOME, protocol)
        for place, (step, following) in enumerate(pairwise([*plan.steps, None])):
            later = {b.client_id for s in plan.steps[place + 1 :] for b in s.parts}
            for batch in step.parts:
                assert batch.ends_round == (batch.client_id not in later)
            if isinstance(protocol, AsynchronousWeightPassing):
                (batch,) = step.parts
                last = batch.number % 2 == 1 or batch.ends_round
                assert batch.ends_turn == last
            else:
                others = set(following.client_ids) if following else set()
                assert step.ends_turn == (set(step.client_ids) != others)


@each_protocol
def test_the_plan_is_the_same_in_whatever_order_it_is_asked_for(protocol):
    plans = [Planned(number, SOME, protocol).steps for number in range(10)]
    assert len({str(one) for one in plans}) > 5
    order = list(range(10)) * 2
    random.Random(0).shuffle(order)
    for number in order:
        assert Planned(number, SOME, protocol).steps == plans[number]


def test_a_client_is_drawn_by_itself_and_by_the_seed():
    """Other clients of a round are nothing to a client; the seed is."""
    some, differs = RoundRobinWeightPassing(clients_per_round=3), 0
    for number in range(100):
        few, one = Planned(number, SOME, some), Planned(number, SOME)
        other = Planned(number, SOME, seed=1)
        drawn = set(Round(number, SIZES, 4).clients(3))
        present = drawn - set(few.absent)
        if len(present) > 1:  # else it may be there since all others are not
            assert set(few.absent) == set(one.absent) & drawn
            there = {k: one.dropped[k] for k in sorted(drawn & set(one.dropped))}
            missing = set(there) - set(few.dropped)
            assert few.dropped == {k: there[k] for k in there if k not in missing}
            nobody_would = all(made == 0 for made, _ in there.values())
            assert len(missing) <= (set(there) == present and nobody_would)
        differs += (one.absent, one.dropped) != (other.absent, other.dropped)
    assert differs > 90


@each_protocol
def test_probabilities_of_zero_change_nothing(protocol):
    zeros = Availability([0.0] * 6, [0] * 6)
    for number in range(3):
        usual = Planned(number, None, protocol)
        assert (usual.absent, usual.dropped) == ([], {})
        for availability in (Availability(), zeros):
            assert Planned(number, availability, protocol).steps == usual.steps


@pytest.mark.parametrize("option", ["absent", "dropout"])
@pytest.mark.parametrize("value", [0.1, [0, 0.1, 0]])
def test_rounds_have_no_length_where_anything_may_be_missing(option, value):
    usual, some = (
        make_data(availability=a) for a in (None, Availability(**{option: value}))
    )
    for data in (usual, some):
        data.setup("fit")
    assert len(usual.train_dataloader()) > 0
    with pytest.raises(TypeError, match="differs from round to round"):
        len(some.train_dataloader())


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


@pytest.mark.parametrize("protocol", [RoundRobinWeightPassing, GPSL])
def test_the_data_module_passes_it_on(protocol):
    data = make_data(availability=SOME)
    data.protocol = protocol()
    data.setup("fit")
    sizes = [len(part) for part in data.parts]
    expected = list(protocol().steps(Round(0, sizes, 6, availability=SOME)))
    found = [
        [(batch.client_id, batch.num_samples) for batch in step.parts]
        for step in data.train_dataloader()
    ]
    assert found == [
        [(batch.client_id, batch.num_samples) for batch in step.parts]
        for step in expected
    ]


def test_pooled_samples_cannot_be_absent(tmp_path):
    data = make_data(availability=Availability(dropout=0.1))
    with pytest.raises(MisconfigurationException, match="one party has all samples"):
        fit(tmp_path, make_unsplit(), data, [Centralized()])
    data = make_data(availability=Availability([0, 0, 0]))
    fit(tmp_path, make_unsplit(), data, [Centralized()], rounds=1)
