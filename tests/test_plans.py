"""Plans are pure functions, cover every sample, and leave no states behind."""

import subprocess
import sys
from itertools import chain

import pytest
import torch
from protocols import ROUNDS, fit, make_data, make_split, make_unsplit
from test_protocols import SKEWED
from test_resume_protocols import PROTOCOLS, UNSPLIT

from split_lightning import (
    AsynchronousWeightPassing,
    FedAvg,
    MultiServer,
    RoundRobinWeightPassing,
    SplitFedV1,
    SplitFedV2,
)
from split_lightning.protocols import (
    Action,
    Average,
    Begin,
    Contribute,
    Mix,
    PassWeights,
    Protocol,
    Round,
    Train,
)

ALL = PROTOCOLS | UNSPLIT
SIZES = [5, 2, 8]


def plan(name, number=1, seed=0, sizes=SIZES, epochs=2):
    return list(ALL[name]().plan(Round(number, sizes, 3, epochs, seed)))


def in_words(protocol, number=1):
    """A plan, as pairs of a letter and a client."""
    letters = {PassWeights: "to", Contribute: "client", Begin: "client", Mix: "client"}
    found = []
    for action in protocol.plan(Round(number, SIZES, 3)):
        if isinstance(action, Train):
            found.append(("Train", *(batch.client_id for batch in action.batches)))
        else:
            owner = letters.get(type(action))
            who = () if owner is None else (getattr(action, owner),)
            found.append((type(action).__name__, *who))
    return found


def test_plans_read_as_the_protocols_do():
    turns = [[("Train", 0)] * 2, [("Train", 1)], [("Train", 2)] * 3]
    passed = [[("PassWeights", k), *turn] for k, turn in enumerate(turns)]
    assert in_words(RoundRobinWeightPassing()) == list(chain(*passed))
    contributed = list(chain(*([*t, ("Contribute", k)] for k, t in enumerate(turns))))
    for protocol in (FedAvg(), SplitFedV1(), SplitFedV2(shuffle=False)):
        assert in_words(protocol) == [*contributed, ("Average",)]
    assert in_words(FedAvg(every=2), number=0) == list(chain(*turns))
    several = MultiServer(2, servers_every=None)
    assert in_words(several) == [*chain(*passed), ("Average",)]
    begins = [("Begin", k) for k in range(3)]
    assert in_words(AsynchronousWeightPassing())[:3] == begins


@pytest.mark.parametrize("name", ALL)
def test_a_plan_is_a_function_of_round_and_seed(name):
    first = plan(name)
    torch.manual_seed(7)  # the global state does not matter
    protocol = ALL[name]()
    for number in (3, 0):  # nor what was planned before
        list(protocol.plan(Round(number, SIZES, 3, 2)))
    assert list(protocol.plan(Round(1, SIZES, 3, 2))) == first


def test_another_process_makes_the_same_plans():
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; from test_plans import ALL, plan\n"
        "print([plan(name) for name in ALL])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str([plan(name) for name in ALL])


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("name", ALL)
def test_a_plan_covers_each_sample_as_often_as_clients_pass_over_them(name, epochs):
    """Of each client that takes part; `clients_per_round` says how many do."""
    seen = {}
    for action in plan(name, epochs=epochs):
        for batch in action.batches if isinstance(action, Train) else ():
            own = range(batch.start, batch.start + batch.num_samples)
            seen.setdefault(batch.client_id, []).extend(own)
    assert len(seen) == (ALL[name]().clients_per_round or len(SIZES))
    for client, samples in seen.items():
        assert sorted(samples) == sorted(list(range(SIZES[client])) * epochs)


def remembered(module):
    """The parties that have parts of their own, by part and segment."""
    return [
        {part: store.parties_with(part, store.roles) for part in store.own}
        for store in module.engine.stores
    ]


GIVES_UP = {
    "fedavg": (make_unsplit, FedAvg),
    "splitfed_v1": (
        make_split,
        lambda optimizer_state: SplitFedV1(
            optimizer_state=optimizer_state, server_optimizer_state=optimizer_state
        ),
    ),
    "several servers": (
        make_split,
        lambda optimizer_state: MultiServer(
            optimizer_state=optimizer_state, server_optimizer_state=optimizer_state
        ),
    ),
}


@pytest.mark.parametrize("policy", ["travel", "reset"])
@pytest.mark.parametrize("name", GIVES_UP)
def test_no_party_has_a_state_of_its_own_after_a_mean(tmp_path, name, policy):
    make, protocol = GIVES_UP[name]
    module = make()
    fit(tmp_path, module, make_data(3, protocol(optimizer_state=policy), **SKEWED))
    for parts in remembered(module):
        assert not any(parts.values())


@pytest.mark.parametrize("policy", ["travel", "reset"])
@pytest.mark.parametrize("make", [RoundRobinWeightPassing, SplitFedV2])
def test_one_party_alone_has_what_goes_round(tmp_path, make, policy):
    """The last client of a round robin; the one server of both."""
    module, protocol = make_split(), make(optimizer_state=policy, local_steps=1)
    fit(tmp_path, module, make_data(3, protocol, **SKEWED))
    client, server = remembered(module)
    last = {f"client/{module.engine.last_client}"} if make != SplitFedV2 else set()
    assert all(names == last for names in client.values())
    assert all(names == {"server/0"} for names in server.values())


class Leaking(Average):
    """Leaves a client with weights of its own."""

    def apply(self, engine):
        super().apply(engine)
        for store, name in engine.segments_of(1, "client"):
            store.adopt(name, ("parameters",))


class Own(Protocol):
    """Each client trains by itself, and then comes an action."""

    def __init__(self, action):
        super().__init__()
        self.action = action

    def plan(self, round):
        for _, batches in round.turns(round.clients()):
            for batch in batches:
                yield Train((batch,))
        yield self.action


def test_a_protocol_that_leaks_states_is_reported(tmp_path):
    message = r"Own leaks states: after Leaking \['client/1'\].* take part in it"
    with pytest.raises(RuntimeError, match=message):
        fit(tmp_path, make_split(), make_data(3, Own(Leaking())))


class Count(Action):
    """Counts how often it is applied."""

    closes, times = True, 0

    def apply(self, engine):
        self.times += 1


@pytest.mark.parametrize("closes", [True, False])
def test_an_action_that_closes_is_applied_where_a_round_is_cut_short(tmp_path, closes):
    action = Count()
    action.closes = closes
    fit(tmp_path, make_split(), make_data(3, Own(action)), limit_train_batches=2)
    assert action.times == ROUNDS * closes


def test_a_round_that_is_not_cut_short_is_not_planned_again_at_its_end(tmp_path):
    planned = []

    class Watched(RoundRobinWeightPassing):
        def plan(self, round):
            planned.append(round.number)
            return super().plan(round)

    fit(tmp_path, make_split(), make_data(3, Watched()))
    assert planned.count(1) == 2  # for the number of steps, and for the steps


class Alone(Own):
    """An action in a round without a step."""

    def plan(self, round):
        yield self.action


class Joint(Protocol):
    """Clients train together, all at once."""

    def plan(self, round):
        for batches in round.together(round.clients()):
            yield Train(batches)


class JointOfTwo(Joint):
    together = True

    def __init__(self):
        super().__init__(clients_per_round=2)


REFUSED = {
    "a word": (Own("pass"), r"yield Train\(...\), or.* of Action, but got 'pass'"),
    "a class": (Own(Average), "of Action, but got <class .*Average"),
    "no step": (Alone(Count()), r"yield Train\(...\) in each round.*Count.* without"),
    "several clients": (Joint(), "3 clients.* step of Joint. Set `together = True`"),
    "too many": (JointOfTwo(), r"3 clients.* Draw at most 2.*round.clients\(self"),
}


@pytest.mark.parametrize(("protocol", "message"), REFUSED.values(), ids=REFUSED)
def test_a_plan_that_cannot_be_carried_out_is_refused(protocol, message):
    with pytest.raises(ValueError, match=message):
        list(protocol.steps(Round(0, SIZES, 3)))
