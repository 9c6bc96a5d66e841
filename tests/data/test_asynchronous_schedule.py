"""What happens when, where clients train at the same time: traces worked out by hand.

Each rule below was broken on purpose, and a test failed: the server takes a batch while
it is busy with another; a client's next forward does not wait for its gradient; to take
weights over, or to hand them in, takes no time; a hand-in counts twice for the age of
others; who waits begins in the order in which it came free; turns begin before the
hand-ins of the same time; the bound leaves out the turn that begins, or the ages so
far; one batch is on its way in place of several; a smaller batch overtakes; batches
after a client dropped out are served.
"""

from itertools import pairwise

import pytest
import torch
from conftest import RandomImages
from flwr_datasets.partitioner import LinearPartitioner
from split_lightning.data.asynchronous_round import Began, HandedIn, Served
from split_lightning.data.seconds import BatchSeconds
from split_lightning.data.service import TurnEvent

from split_lightning import SplitDataModule
from split_lightning.data import (
    AsynchronousSchedule,
    Availability,
    RoundRobinSchedule,
)
from split_lightning.seeding import generator


class Given:
    """All takes a second, but what is given: a client's forward, the service."""

    def __init__(self, forward, by_sample=False, **others):
        self.forward, self.by_sample, self.others = forward, by_sample, others

    def of_batch(self, client_id, num_samples):
        one = dict.fromkeys(BatchSeconds._fields, 1) | self.others
        one["forward"] = self.forward[client_id]
        return BatchSeconds(*(v * num_samples**self.by_sample for v in one.values()))

    def hand_in(self, client_id):
        return 1

    def take_over(self, client_id):
        return 1


def trace(batches, seconds=None, **options):
    """Returns what happens, one letter each: Begins, Served, Handed in with its age."""
    schedule = AsynchronousSchedule(**options)
    if seconds is not None:
        schedule.seconds = seconds
    in_turn = RoundRobinSchedule(local_steps=options.get("local_steps"))
    sizes = {k: 2 * n for k, n in enumerate(batches)}
    steps = list(in_turn.steps(sizes, 2, 1, torch.Generator()))
    found = []
    for event in schedule.trace(steps):
        if isinstance(event, HandedIn):
            found.append(("H", event.client_id, event.time, event.age))
        else:
            letter = {Began: "B", Served: "S"}[type(event)]
            found.append((letter, event.client_id, event.time))
    return found


def test_three_clients_of_different_speed():
    """Two batches each; forwards take 1, 2 and 4, the service 2.

    Client 0 has the weights at 1, its batch is there at 3, the gradient is back at
    6, applied at 7; the next batch is there at 9. Client 1's is there at 4 and waits
    until 5; client 2's at 6 until 7.
    """
    assert trace([2, 2, 2], Given([1, 2, 4], service=2)) == [
        ("B", 0, 0), ("B", 1, 0), ("B", 2, 0),
        ("S", 0, 3), ("S", 1, 5), ("S", 2, 7),
        ("S", 0, 9), ("S", 1, 12),
        ("H", 0, 14, 0),
        ("S", 2, 16),
        ("H", 1, 17, 1), ("H", 2, 21, 2),
    ]  # fmt: skip


def test_who_would_make_another_too_old_waits_in_the_order_of_turns():
    """Two turns of a batch each. Client 2 waits for both of those that began."""
    seconds = Given([1, 2, 4], service=2)
    assert trace([2, 2, 2], seconds, local_steps=1, max_staleness=1) == [
        ("B", 0, 0), ("B", 1, 0), ("S", 0, 3), ("S", 1, 5),
        ("H", 0, 8, 0), ("H", 1, 10, 1),
        ("B", 2, 10), ("B", 0, 10), ("S", 0, 13), ("S", 2, 16),
        ("H", 0, 18, 0), ("H", 2, 21, 1),
        ("B", 1, 21), ("B", 2, 21), ("S", 1, 25), ("S", 2, 27),
        ("H", 1, 30, 0), ("H", 2, 32, 1),
    ]  # fmt: skip


def test_several_batches_on_their_way():
    """Forwards take 2, backwards 3: forward, forward, backward, forward, backward.

    The second gradient is back at 8, and waits for the third forward (9 to 11).
    """
    seconds = Given([2], backward=3)
    assert trace([3], seconds, in_flight=2) == [
        ("B", 0, 0), ("S", 0, 4), ("S", 0, 6), ("S", 0, 12), ("H", 0, 18, 0),
    ]  # fmt: skip
    one = trace([3], seconds)
    assert [time for _, _, time, *_ in one] == [0, 4, 12, 20, 26]


def test_what_is_sent_first_arrives_first():
    """The last batch is one sample of ten: it takes a tenth of the way up."""
    schedule = AsynchronousSchedule(in_flight=2)
    schedule.seconds = Given([1], by_sample=True, up=5)
    in_turn = RoundRobinSchedule().steps({0: 11}, 10, 1, torch.Generator())
    served = [e for e in schedule.trace(list(in_turn)) if isinstance(e, Served)]
    assert [(e.num_samples, e.time) for e in served] == [(10, 61), (1, 71)]


def test_without_a_system_batches_alternate():
    """A sample takes as long at each client; hand-ins come before services."""
    assert trace([2, 1, 2]) == [
        ("B", 0, 0), ("B", 1, 0), ("B", 2, 0),
        ("S", 0, 2), ("S", 1, 2), ("H", 1, 2, 0), ("S", 2, 2),
        ("S", 0, 4), ("H", 0, 4, 1), ("S", 2, 4), ("H", 2, 4, 2),
    ]  # fmt: skip


def test_a_turn_begins_after_all_that_is_handed_in_by_then():
    found = trace([2, 2], local_steps=1)
    assert [event[:2] for event in found[2:8]] == [
        ("S", 0), ("H", 0), ("S", 1), ("H", 1), ("B", 0), ("B", 1),
    ]  # fmt: skip


class Drawn:
    """Seconds drawn once for each client, and what it does."""

    def __init__(self, seed):
        self.seed = seed

    def _draw(self, client_id, count):
        drawn = generator(self.seed, "seconds", client_id)
        return torch.rand(count, generator=drawn).tolist()

    def of_batch(self, client_id, num_samples):
        return BatchSeconds(*(v * num_samples for v in self._draw(client_id, 5)))

    def hand_in(self, client_id):
        return self._draw(client_id, 6)[5]

    def take_over(self, client_id):
        return self._draw(client_id, 7)[6]


def sampler_of(seed=0, seconds=None, availability=None, **options):
    data = SplitDataModule(
        RandomImages(),
        5,
        partitioner=LinearPartitioner,
        schedule=AsynchronousSchedule(**options),
        batch_size=2,
        val_share=0,
        seed=seed,
        availability=availability,
    )
    data.schedule.seconds = seconds or Drawn(seed)
    data.setup("fit")
    return data.train_dataloader().sampler


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("bound", [0, 1, 3, None])
def test_no_hand_in_is_older_than_the_bound(bound, in_flight):
    """And it is reached: the rule keeps nobody waiting longer than it must."""
    oldest = 0
    for seed in range(8):
        sampler = sampler_of(
            seed, local_steps=2, max_staleness=bound, in_flight=in_flight
        )
        events = sampler.schedule.trace(list(sampler.steps()))
        times = [event.time for event in events]
        assert times == sorted(times)
        begun, hand_ins, batches = {}, 0, dict.fromkeys(range(5), 0)
        for event in events:
            k = event.client_id
            if isinstance(event, Began):
                assert k not in begun
                begun[k] = hand_ins
            elif isinstance(event, Served):
                batches[k] += 1
                assert k in begun
            else:
                assert event.age == hand_ins - begun.pop(k)
                oldest, hand_ins = max(oldest, event.age), hand_ins + 1
        sizes = {k: len(part) for k, part in enumerate(sampler.partition)}
        assert batches == {k: -(-n // 2) for k, n in sizes.items()}
        assert not begun
    assert oldest == bound if bound is not None else oldest > 3


def test_the_bound_0_is_the_order_of_the_round_robin():
    for shuffle in (False, True):
        sampler = sampler_of(max_staleness=0, local_steps=2, shuffle=shuffle)
        order = [step[0].client_id for step in sampler.plans()]
        assert order == [k for ((k, _),) in sampler.steps()]
        assert len(set(order)) == 5


def test_plans_carry_what_happens_between_steps():
    sampler = sampler_of(local_steps=3, in_flight=2)
    steps = list(sampler.plans())
    events = sampler.schedule.trace(list(sampler.steps()))
    expected = [
        (e.client_id, isinstance(e, Began)) for e in events if not isinstance(e, Served)
    ]
    found = [event for (plan,) in steps for event in plan.service.before]
    assert all(not plan.service.after for (plan,) in steps[:-1])
    assert [*found, *steps[-1][0].service.after] == [TurnEvent(*e) for e in expected]
    assert [plan.client_id for (plan,) in steps] == [
        e.client_id for e in events if isinstance(e, Served)
    ]
    assert {plan.service.in_flight for (plan,) in steps} == {2}
    for k in range(5):  # turns of three batches, and what is left
        own = [plan for (plan,) in steps if plan.client_id == k]
        ends = [plan.ends_turn for plan in own]
        count = len(own)
        assert ends == [n % 3 == 0 or n == count for n in range(1, count + 1)]
        assert [plan.ends_round for plan in own] == [False] * (count - 1) + [True]


def test_each_round_and_seed_has_a_trace_of_its_own_and_always_the_same():
    orders = []
    for seed, round_index in ((0, 0), (0, 1), (1, 0), (0, 0)):
        sampler = sampler_of(seed, seconds=Drawn(5), clients_per_round=3)
        sampler.set_epoch(round_index)
        orders.append([p.client_id for p in sampler])
        assert len(set(orders[-1])) == 3
    assert orders[0] == orders[3]
    assert any(one != other for one, other in pairwise(orders))


def test_who_drops_out_hands_in_what_it_has():
    """Its turn ends with its last batch, and others no longer wait for it."""
    availability = Availability(absent=0.3, dropout=0.6)
    for round_index in range(6):
        sampler = sampler_of(availability=availability, max_staleness=1)
        sampler.set_epoch(round_index)
        absent, dropped = sampler.absentees()
        made = {k: 0 for k in range(5) if k not in absent}
        running = set()
        for (plan,) in sampler.plans():
            for client_id, begins in plan.service.before:
                (running.add if begins else running.remove)(client_id)
            made[plan.client_id] += 1
            last = plan.ends_turn
        assert last
        full = {k: -(-len(sampler.partition[k]) // 2) for k in made}
        assert made == full | {k: count for k, (count, _) in dropped.items()}
        ends = {k for k, begins in plan.service.after if not begins}
        assert running == ends


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_staleness": -1}, "`max_staleness` to be a number of hand-ins from 0"),
        ({"in_flight": 0}, "`in_flight` to be a positive number of batches"),
        ({"local_steps": 0}, "`local_steps` to be a positive number"),
        ({"clients_per_round": 0}, "`clients_per_round` to be a positive"),
    ],
)
def test_arguments_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AsynchronousSchedule(**options)
