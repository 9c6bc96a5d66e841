"""What happens when clients train at the same time: traces worked out by hand.

Each rule below was broken on purpose, and a test failed: the server takes a batch while
it is busy with another; a client's next forward does not wait for its gradient; to take
weights over, or to hand them in, takes no time; a hand-in counts twice for the age of
others; who waits begins in the order in which it came free; turns begin before the
hand-ins of the same time; the bound leaves out the turn that begins, or the ages so
far; one batch is on its way in place of several; a smaller batch overtakes; batches
after a client dropped out are served.
"""

import pytest
import torch

from split_lightning import AsynchronousWeightPassing
from split_lightning.protocols import Begin, Mix, Round, Send, Train
from split_lightning.seeding import generator
from split_lightning.system import Availability
from split_lightning.system.asynchronous_round import (
    AsynchronousRound,
    Began,
    Ended,
    Served,
    Turn,
)
from split_lightning.system.seconds import BatchSeconds, EqualSeconds


class Given:
    """All takes a second, but what is given: a client's forward, the service."""

    def __init__(self, forward, by_sample=False, **others):
        self.forward, self.by_sample, self.others = forward, by_sample, others

    def of_batch(self, client_id, num_samples):
        one = dict.fromkeys(BatchSeconds._fields, 1) | self.others
        one["forward"] = self.forward[client_id]
        return BatchSeconds(*(v * num_samples**self.by_sample for v in one.values()))

    def upload(self, client_id):
        return 1

    def download(self, client_id):
        return 1


def trace(batches, seconds=None, local_steps=None, **options):
    """Returns what happens, one letter each: Begins, Served, Handed in with its age.

    Args:
        batches: For each client its number of batches, of two samples each.
        seconds: How long things take.
        local_steps: Number of batches in a turn.
        options: Those of the simulation.
    """
    length = local_steps or max(batches)
    left, turns = dict(enumerate(batches)), []
    while any(left.values()):
        for client in [k for k, count in left.items() if count]:
            own = min(length, left[client])
            turns.append(Turn(len(turns), client, [2] * own))
            left[client] -= own
    found = []
    simulated = AsynchronousRound(turns, seconds or EqualSeconds(), **options)
    for event in simulated.run():
        if isinstance(event, Ended):
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
    seconds = Given([1], by_sample=True, up=5)
    events = AsynchronousRound([Turn(0, 0, [10, 1])], seconds, in_flight=2).run()
    served = [event for event in events if isinstance(event, Served)]
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

    def upload(self, client_id):
        return self._draw(client_id, 6)[5]

    def download(self, client_id):
        return self._draw(client_id, 7)[6]


SIZES = [4, 8, 12, 16, 20]


def round_of(seed=0, number=0, **options):
    return Round(number, SIZES, 2, seed=seed, seconds=Drawn(seed), **options)


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("bound", [0, 1, 3, None])
def test_no_turn_ends_at_a_greater_age_than_the_bound(bound, in_flight):
    """And it is reached: the rule keeps nobody waiting longer than it must."""
    oldest = 0
    protocol = AsynchronousWeightPassing(
        local_steps=2, max_staleness=bound, in_flight=in_flight
    )
    for seed in range(8):
        events = protocol.events(round_of(seed))
        times = [event.time for event in events]
        assert times == sorted(times)
        begun, ended, batches = {}, 0, dict.fromkeys(range(5), 0)
        for event in events:
            k = event.client_id
            if isinstance(event, Began):
                assert k not in begun
                begun[k] = ended
            elif isinstance(event, Served):
                batches[k] += 1
                assert k in begun
            else:
                assert event.age == ended - begun.pop(k)
                oldest, ended = max(oldest, event.age), ended + 1
        assert batches == {k: size // 2 for k, size in enumerate(SIZES)}
        assert not begun
    assert oldest == bound if bound is not None else oldest > 3


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_bound_0_is_the_order_of_the_round_robin(shuffle):
    protocol = AsynchronousWeightPassing(
        max_staleness=0, local_steps=2, shuffle=shuffle
    )
    turns = round_of().turns(round_of().clients(None, shuffle), 2, shuffle)
    expected = [client for client, own in turns for _ in own]
    found = [step.client_ids[0] for step in protocol.steps(round_of())]
    assert found == expected
    assert len(set(found)) == 5


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_plan_carries_what_happens(in_flight):
    """In its order; forward passes ahead follow the begin, and each step taken."""
    protocol = AsynchronousWeightPassing(2.0, local_steps=3, in_flight=in_flight)
    plan, made = list(protocol.plan(round_of())), dict.fromkeys(range(5), 0)
    kinds = {Began: Begin, Served: Train, Ended: Mix}
    expected = [(kinds[type(e)], e.client_id) for e in protocol.events(round_of())]
    found, ahead = [], {}
    for action in plan:
        if isinstance(action, Send):
            k, number = action.batch.client_id, action.batch.number
            ahead[k].append(number)
            assert len(ahead[k]) <= in_flight
            continue
        if isinstance(action, Train):
            (batch,) = action.batches
            k = batch.client_id
            assert batch.number == made[k]
            made[k] += 1
            assert batch.ends_turn == (made[k] % 3 == 0 or made[k] == SIZES[k] // 2)
            assert batch.ends_round == (made[k] == SIZES[k] // 2)
            assert in_flight == 1 or ahead[k].pop(0) == batch.number
        else:
            k = action.client
            ahead[k] = []
        found.append((type(action), k))
    assert found == expected
    ages = [e.age for e in protocol.events(round_of()) if isinstance(e, Ended)]
    mixes = [action for action in plan if isinstance(action, Mix)]
    assert [(mix.age, mix.exponent) for mix in mixes] == [(age, 2.0) for age in ages]


def test_a_client_that_drops_out_ends_its_turn_with_what_it_has():
    """With its last batch, and others no longer wait for it."""
    availability = Availability(absent=0.3, dropout=0.6)
    protocol = AsynchronousWeightPassing(max_staleness=1)
    for number in range(6):
        round = round_of(number=number, availability=availability)
        running, made = set(), {}
        for action in protocol.plan(round):
            if isinstance(action, Begin):
                running.add(action.client)
            elif isinstance(action, Train):
                (batch,) = action.batches
                assert batch.client_id in running
                made[batch.client_id] = made.get(batch.client_id, 0) + 1
            else:
                running.remove(action.client)
        assert not running
        full = {k: n // 2 for k, n in enumerate(SIZES) if k not in round.absent}
        full |= {k: count for k, (count, _) in round.dropped.items()}
        assert made == {k: count for k, count in full.items() if count}
