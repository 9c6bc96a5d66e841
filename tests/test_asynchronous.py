"""Asynchronous training against plain loops that follow the trace.

Each rule below was broken on purpose, and a test failed: a turn begins from the newest
of when it is served first; a share of 1 for every age, or that of the age before;
buffers that are to be kept are mixed, those that are to be mixed stay; optimizer states
that travel are not mixed, those to be reset stay, or go where the newest are the
client's own; a hand-off from oneself is counted; the forward is on the newest weights,
or on those of one batch more or less; the gradient of stale weights is lost; the stash
of the last turn is left; in B the client steps, or hands in; in C targets are sent,
weights are taken over, or stored batches come in another order; losses are compared
with the last turn's, or their sums are; stash, stored data or ages are not in
checkpoints; a round that is cut short leaves turns open; the plan knows nothing of
labels, of the way down, or of hand-ins' seconds; a schedule keeps a system when the fit
is over.
"""

import copy
from collections import Counter, deque
from functools import partial

import pytest
import torch
from protocols import (
    ROUNDS,
    SGD,
    assert_close,
    assert_equal,
    batches_of,
    clone,
    fit,
    loss_of,
    make_data,
    make_split,
    mean_state,
    network,
)
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from split_lightning.data.asynchronous_round import Began, Served
from split_lightning.data.seconds import BatchSeconds
from test_protocols import SKEWED
from test_resume import ADAM, check
from test_topologies import ROUTES, is_clients, merged, parts_of

from split_lightning import (
    AsynchronousSplitLightningModule,
    RoundRobinWeightPassing,
    ServerMap,
    SplitLightningModule,
    UnsplitLightningModule,
)
from split_lightning.callbacks import (
    AsynchronousWeightPassing,
    ClientAveraging,
    DriftMonitor,
    ResumeCheckpoint,
    VirtualClock,
)
from split_lightning.data import (
    AsynchronousSchedule,
    Availability,
    RoundRobinSchedule,
)
from split_lightning.system import System

VANILLA = ROUTES["one cut"]
WIDTH = 4 * 36  # values of a sample that cross the cut


class Uneven:
    """Client 2, of the most samples, is the fastest; the server takes its time."""

    def of_batch(self, client_id, num_samples):
        pace = (5, 2, 1)[client_id]
        return BatchSeconds(pace * num_samples, 1, 4, 1, pace * num_samples)

    def hand_in(self, client_id):
        return 3

    def take_over(self, client_id):
        return 2


def scheduled(seconds=None, **options):
    schedule = AsynchronousSchedule(**options)
    schedule.seconds = seconds or Uneven()
    return schedule


def make(route=VANILLA, optimizer=SGD, **options):
    cuts, labels, _ = route
    return AsynchronousSplitLightningModule(
        network(), cuts, optimizer, optimizer, 3, labels=labels, **options
    )


def events_of(data, round_index):
    data.setup("fit")
    sampler = data.train_dataloader().sampler
    sampler.set_epoch(round_index)
    return data.schedule.trace(list(sampler.steps()))


class Plain:
    """A loop over what happens, with a whole network for each client.

    The layers of the server are the same objects in all of them. Of the layers of the
    client there is a list of copies: of before each batch of a turn.
    """

    def __init__(self, route=VANILLA, policy="keep", buffers="average", **options):
        self.route, self.policy, self.buffers = route, policy, buffers
        self.exponent = options.get("exponent", 0.5)
        self.in_flight = options.get("in_flight", 1)
        self.threshold = options.get("threshold")
        self.shared = network()
        self.nets = {k: clone(self.shared) for k in range(3)}
        for net in self.nets.values():
            for index in set(range(8)) - set(route[2]):
                net[index] = self.shared[index]
        self.server = SGD(parts_of(self.shared, route)[1])
        self.own = {k: SGD(parts_of(net, route)[0]) for k, net in self.nets.items()}
        self.newest = self.mine(self.shared)
        self.newest_momentum = None
        self.newest_of = None
        self.count, self.begun, self.ages = 0, {}, []
        self.before = {k: deque(maxlen=self.in_flight) for k in range(3)}
        self.states, self.references, self.losses = dict.fromkeys(range(3), "A"), {}, {}
        self.stored, self.batches, self.turns, self.history = {}, Counter(), [], {}
        self.up = self.down = self.handoffs = 0

    def mine(self, net):
        return {
            name: tensor.clone()
            for name, tensor in net.state_dict().items()
            if is_clients(self.route, name)
        }

    def begin(self, k):
        self.begun[k] = self.count
        own = self.mine(self.nets[k])
        if self.buffers == "keep":
            names = [name for name, _ in self.nets[k].named_parameters()]
            own |= {n: t for n, t in self.newest.items() if n in names}
        else:
            own = self.newest
        self.nets[k].load_state_dict(own, strict=False)
        from_elsewhere = self.count > 0 and self.newest_of != k
        self.handoffs += from_elsewhere and self.states[k] != "C"
        if from_elsewhere and self.policy == "reset":
            self.own[k] = SGD(parts_of(self.nets[k], self.route)[0])
        if self.policy == "travel" and self.newest_momentum is not None:
            momentum = copy.deepcopy(self.newest_momentum)
            for parameter, value in zip(self.mine_of(k), momentum, strict=True):
                self.own[k].state[parameter]["momentum_buffer"] = value
        self.before[k].clear()
        self.losses[k], self.batches[k] = [], 0
        if self.states[k] != "C":
            self.stored[k] = []

    def mine_of(self, k):
        return parts_of(self.nets[k], self.route)[0]

    def buffers_of(self, k):
        named = self.nets[k].named_buffers()
        return [(name, b) for name, b in named if is_clients(self.route, name)]

    def stale(self, k):
        """The client's network with the parameters of in_flight - 1 batches ago."""
        net = clone(self.nets[k])
        for index in set(range(8)) - set(self.route[2]):
            net[index] = self.shared[index]
        for old, parameter in zip(
            self.before[k][0], parts_of(net, self.route)[0], strict=True
        ):
            parameter.data.copy_(old)
        return net

    def serve(self, k, inputs, targets):
        self.before[k].append([p.detach().clone() for p in self.mine_of(k)])
        net, state = self.stale(k), self.states[k]
        for optimizer in (self.server, self.own[k]):
            optimizer.zero_grad()
        if state == "C":
            smashed, targets = self.stored[k][self.batches[k] % len(self.stored[k])]
            loss = torch.nn.functional.cross_entropy(self.shared[3:](smashed), targets)
        elif state == "B":
            smashed = net[:3](inputs).detach()
            self.stored[k].append((smashed.clone(), targets))
            loss = torch.nn.functional.cross_entropy(self.shared[3:](smashed), targets)
        else:
            loss = loss_of(net, inputs, targets)
        loss.backward()
        self.server.step()
        if state == "A":
            for mine, stale in zip(
                self.mine_of(k), parts_of(net, self.route)[0], strict=True
            ):
                mine.grad = stale.grad
            self.own[k].step()
        for name, buffer in net.named_buffers():
            if is_clients(self.route, name):
                self.nets[k].get_buffer(name).copy_(buffer)
        count = len(inputs)
        self.up += (state != "C") * count * (4 * WIDTH + 8)
        self.down += (state == "A") * count * 4 * WIDTH
        self.losses[k].append((loss.item(), count))
        self.batches[k] += 1

    def hand_in(self, k):
        age = self.count - self.begun.pop(k)
        state = self.states[k]
        self.turns.append(state)
        self.history[k] = self.history.get(k, "") + state
        if state == "A":
            share = (1 + age) ** -self.exponent
            own = self.mine(self.nets[k])
            if self.buffers == "keep":
                own |= {n: self.newest[n] for n, _ in self.buffers_of(k)}
            self.newest = mean_state([self.newest, own], [1 - share, share])
            momentum = [
                self.own[k].state[p]["momentum_buffer"] for p in self.mine_of(k)
            ]
            before = self.newest_momentum or momentum
            self.newest_momentum = [
                (1 - share) * b + share * m
                for b, m in zip(before, momentum, strict=True)
            ]
            self.newest_of = k if share == 1 else None
            self.count += 1
            self.ages.append(age)
        if self.threshold is not None:
            total = sum(loss * n for loss, n in self.losses[k])
            mean = total / sum(n for _, n in self.losses[k])
            before = self.references.get(k)
            if before is None or abs(mean - before) >= self.threshold:
                self.references[k], self.states[k] = mean, "A"
            else:
                self.states[k] = {"A": "B", "B": "C", "C": "C"}[state]

    def run(self, data, rounds=ROUNDS):
        for round_index in range(rounds):
            batches = {k: deque() for k in range(3)}
            for ((k, inputs, targets),) in batches_of(data, round_index):
                batches[k].append((inputs, targets))
            for event in events_of(data, round_index):
                k = event.client_id
                if isinstance(event, Began):
                    self.begin(k)
                elif isinstance(event, Served):
                    self.serve(k, *batches[k].popleft())
                else:
                    self.hand_in(k)
        return self.newest | {
            name: tensor
            for name, tensor in self.shared.state_dict().items()
            if not is_clients(self.route, name)
        }


def compare(folder, plain, schedule, **options):
    make_own = partial(make_data, **SKEWED, batch_size=6)
    module = make(
        plain.route,
        optimizer_state=plain.policy,
        buffers=plain.buffers,
        loss_threshold=plain.threshold,
        **options,
    )
    passing = AsynchronousWeightPassing(plain.exponent)
    data = make_own(schedule=scheduled(in_flight=plain.in_flight, **schedule))
    fit(folder, module, data, [passing])
    data = make_own(schedule=scheduled(in_flight=plain.in_flight, **schedule))
    expected = plain.run(data)
    assert_close(merged(module), expected)
    return module


@pytest.mark.parametrize("schedule", [{}, {"local_steps": 2}, {"local_steps": 1}])
@pytest.mark.parametrize("exponent", [0.5, 0.0, 2.0])
def test_hand_ins_are_mixed_by_age(tmp_path, schedule, exponent):
    plain = Plain(exponent=exponent)
    module = compare(tmp_path, plain, schedule)
    assert max(plain.ages) >= 2 > min(plain.ages)
    totals = module.totals()
    size = sum(t.nbytes for t in module.client.state_dict().values())
    assert totals["handoffs"] == plain.handoffs
    assert totals["handoff_bytes"] == plain.handoffs * size
    assert (totals["uplink_bytes"], totals["downlink_bytes"]) == (plain.up, plain.down)


@pytest.mark.parametrize("buffers", ["average", "keep"])
@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
def test_policies(tmp_path, policy, buffers):
    plain = Plain(policy=policy, buffers=buffers)
    schedule = {"local_steps": 1, "max_staleness": 2}
    module = make(optimizer_state=policy, buffers=buffers)
    data = make_data(**SKEWED, schedule=scheduled(**schedule))
    fit(tmp_path, module, data, [AsynchronousWeightPassing()])
    plain.run(make_data(**SKEWED, schedule=scheduled(**schedule)))
    assert_close(module.client.state_dict(), plain.newest)
    for k in plain.nets:
        own = plain.buffers_of(k) if buffers == "keep" else []
        expected = plain.newest | dict(own)
        module.parties.show(k)
        assert_close(module.client.state_dict(), expected)


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("in_flight", [1, 3])
def test_each_route_and_stale_gradients(tmp_path, name, in_flight):
    """A gradient is of the weights that its forward was computed with."""
    plain = Plain(ROUTES[name], in_flight=in_flight)
    compare(tmp_path, plain, {"local_steps": 4})
    assert any(len(kept) == in_flight for kept in plain.before.values())


def test_memory_of_batches_on_their_way(tmp_path):
    """Copies for one batch less, of those in a turn, and none when it is over."""
    module, seen = make(), Counter()

    class Watch(AsynchronousWeightPassing):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kept = module.stash.state_dict()
            seen.update(len(own) for own in kept.values())
            assert kept.keys() <= set(module.clients.running())
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    data = make_data(**SKEWED, batch_size=4, schedule=scheduled(in_flight=3))
    fit(tmp_path, module, data, [Watch()])
    assert max(seen) == 2
    assert module.stash.state_dict() == {}


def test_skipping_states(tmp_path):
    """Client by client: all, no gradient, nothing; and back again."""
    plain = Plain(threshold=0.2, in_flight=2)
    module = compare(tmp_path, plain, {"local_steps": 2})
    assert any("BC" in own and "CA" in own for own in plain.history.values())
    totals = module.totals()
    size = sum(t.nbytes for t in module.client.state_dict().values())
    assert (totals["uplink_bytes"], totals["downlink_bytes"]) == (plain.up, plain.down)
    assert totals["handoff_bytes"] == plain.handoffs * size


def test_what_is_logged(tmp_path):
    plain = Plain(threshold=0.15)
    schedule = {"local_steps": 1}
    module = make(loss_threshold=0.15)
    data = make_data(**SKEWED, schedule=scheduled(**schedule))
    trainer = fit(tmp_path, module, data, [AsynchronousWeightPassing()], rounds=2)
    data = make_data(**SKEWED, schedule=scheduled(**schedule))
    plain.run(data, rounds=1)
    first, ages = len(plain.turns), len(plain.ages)
    other = Plain(threshold=0.15)
    other.run(data, rounds=2)
    turns, ages = other.turns[first:], other.ages[ages:]
    logged = trainer.callback_metrics
    assert logged["staleness/mean"] == pytest.approx(sum(ages) / len(ages))
    assert logged["staleness/max"] == max(ages)
    for state in "ABC":
        expected = turns.count(state) / len(turns)
        assert logged[f"skipping/{state}"] == pytest.approx(expected)


@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
@pytest.mark.parametrize(
    ("num_clients", "bound"), [(1, None), (3, 0)], ids=["one client", "bound 0"]
)
def test_it_is_the_round_robin_bit_for_bit(tmp_path, num_clients, bound, policy):
    """Three rounds with momentum and BatchNorm: weights, bytes and losses."""
    for turns in ({}, {"local_steps": 2, "shuffle": True}):
        options = {"availability": Availability(dropout=0.4)} | SKEWED
        module = make_split(optimizer_state=policy)
        data = make_data(num_clients, **options, schedule=RoundRobinSchedule(**turns))
        trainer = fit(tmp_path, module, data, [RoundRobinWeightPassing()])
        for kind in (SplitLightningModule, AsynchronousSplitLightningModule):
            schedule = scheduled(max_staleness=bound, **turns)
            other = kind(network(), 2, SGD, SGD, 3, optimizer_state=policy)
            data = make_data(num_clients, **options, schedule=schedule)
            same = fit(tmp_path, other, data, [AsynchronousWeightPassing()])
            assert_equal(merged(other), merged(module))
            assert other.totals() == module.totals()
            for name in ("train/loss", "val/loss"):
                assert same.callback_metrics[name] == trainer.callback_metrics[name]


@pytest.mark.parametrize("limit", ["limit_train_batches", "max_steps"])
def test_a_round_that_is_cut_short_hands_in(tmp_path, limit):
    module = make()
    data = make_data(**SKEWED, schedule=scheduled())
    passing = AsynchronousWeightPassing()
    fit(tmp_path, module, data, [passing], **{limit: 4})
    assert module.clients.running() == []
    assert not module.clients.are_apart


SYSTEM = System([1e5, 1e6], 1e6, [1e4, 1e5], [1e5, 1e6], latency=0.01, seed=5)
CLOCKED = {
    "one cut": {},
    "U": {"in_flight": 2},
    "two hops": {"max_staleness": 1},
    "one cut, three on their way": {"in_flight": 3, "max_staleness": 2},
    "one cut, frozen": {},
}


@pytest.mark.parametrize("name", CLOCKED)
def test_the_clock_measures_what_was_planned(tmp_path, name):
    """Step by step from bytes and operations; planned ahead, event by event."""
    route = ROUTES[name.partition(",")[0]]
    options = {"local_steps": 2} | CLOCKED[name]
    data = make_data(**SKEWED, schedule=AsynchronousSchedule(**options))
    planned, ends = [], []

    class Watch(VirtualClock):
        def on_train_epoch_start(self, trainer, pl_module):
            planned.append(events_of(data, trainer.current_epoch)[-1].time)

        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            ends.append(self.seconds)

    module = make(route)
    module.client.requires_grad_("frozen" not in name)
    fit(tmp_path, module, data, [AsynchronousWeightPassing(), Watch(SYSTEM)])
    expected = torch.tensor(planned, dtype=torch.float64).cumsum(0).tolist()
    assert ends == pytest.approx(expected)
    assert repr(data.schedule.seconds) == "EqualSeconds()"


def test_it_takes_less_virtual_time_than_turns_in_order(tmp_path):
    seconds = {}
    for bound in (0, 1, None):
        clock = VirtualClock(SYSTEM)
        schedule = AsynchronousSchedule(max_staleness=bound)
        data = make_data(**SKEWED, schedule=schedule)
        fit(tmp_path, make(), data, [AsynchronousWeightPassing(), clock], rounds=1)
        seconds[bound] = clock.seconds
    assert seconds[None] < seconds[1] < seconds[0]


def resumed(policy="keep", buffers="average", **schedule):
    def make_both():
        schedule_ = AsynchronousSchedule(**schedule)
        module = make(
            optimizer=ADAM,
            optimizer_state=policy,
            buffers=buffers,
            loss_threshold=0.2,
        )
        return module, make_data(**SKEWED, batch_size=8, schedule=schedule_)

    return make_both


def test_it_goes_on_after_a_stop_at_each_position(tmp_path):
    """Batches on their way, stashed weights and stored smashed data included."""
    make_both = resumed(in_flight=3, local_steps=2, max_staleness=2)
    flow = [AsynchronousWeightPassing, partial(VirtualClock, SYSTEM)]
    data = make_both()[1]
    total = ROUNDS * len(batches_of(data, 0))
    check(tmp_path, make_both, range(1, total), flow)


@pytest.mark.parametrize(
    ("policy", "buffers"), [("travel", "average"), ("reset", "keep")]
)
def test_it_goes_on_with_each_policy(tmp_path, policy, buffers):
    make_both = resumed(policy, buffers, clients_per_round=2, in_flight=2)
    check(tmp_path, make_both, (1, 4, 9), [AsynchronousWeightPassing])


def test_it_goes_on_with_the_same_system_alone(tmp_path):
    """Another one would give the batches in another order."""
    module, data = resumed()()
    checkpoint = ResumeCheckpoint(tmp_path)
    flow = [AsynchronousWeightPassing(), VirtualClock(SYSTEM), checkpoint]
    fit(tmp_path, module, data, flow, rounds=1)
    last = tmp_path / "last.ckpt"
    other = System(1e6, 1e6, 1e5, 1e6)
    for clock, words in ((VirtualClock(other), "but got System"), (None, "EqualSec")):
        flow = [AsynchronousWeightPassing(), *([clock] if clock else [])]
        with pytest.raises(ValueError, match=words):
            fit(tmp_path, *resumed()(), flow, ckpt_path=last)


@pytest.mark.parametrize(
    ("module", "data", "callbacks", "words"),
    [
        ({}, {}, [RoundRobinWeightPassing()], "for turns that follow each other"),
        ({}, {}, [ClientAveraging()], "for turns that follow each other"),
        (
            {},
            {},
            [AsynchronousWeightPassing(), DriftMonitor()],
            "compares turns that follow each other",
        ),
        (
            {"server_map": ServerMap(2)},
            {"servers": ServerMap(2)},
            [AsynchronousWeightPassing()],
            "against one server",
        ),
        (
            {"accumulate_grad_batches": 2},
            {},
            [AsynchronousWeightPassing()],
            "`accumulate_grad_batches` to be 1",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, module, data, callbacks, words):
    data = make_data(**({"schedule": scheduled()} | data))
    with pytest.raises(MisconfigurationException, match=words):
        fit(tmp_path, make(**module), data, callbacks)


def test_other_modules_are_refused_where_they_would_ignore_something(tmp_path):
    passing = AsynchronousWeightPassing()
    data = make_data(schedule=scheduled(in_flight=2))
    with pytest.raises(MisconfigurationException, match="keeps the weights of batches"):
        fit(tmp_path, make_split(), data, [passing])
    whole = UnsplitLightningModule(network(), SGD, 3)
    with pytest.raises(MisconfigurationException, match="against one server"):
        fit(tmp_path, whole, make_data(schedule=scheduled()), [passing])
    with pytest.raises(MisconfigurationException, match="needs to know when turns"):
        fit(tmp_path, make_split(), make_data(), [passing])
    data = make_data(schedule=RoundRobinSchedule())
    with pytest.raises(MisconfigurationException, match="for clients whose turns run"):
        fit(tmp_path, make(), data, [RoundRobinWeightPassing()])


@pytest.mark.parametrize("option", ["in_flight", "loss_threshold"])
def test_options_are_for_one_process(option):
    trainer = Trainer(accelerator="cpu", strategy="ddp", devices=2, logger=False)
    trainer.callbacks.append(AsynchronousWeightPassing())
    make().verify(trainer, make_data(schedule=scheduled()))
    data = make_data(schedule=scheduled(in_flight=2 if option == "in_flight" else 1))
    module = make(loss_threshold=0.1) if option == "loss_threshold" else make()
    with pytest.raises(MisconfigurationException, match="Use one device"):
        module.verify(trainer, data)


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`staleness_exponent` to be a number from 0"):
        AsynchronousWeightPassing(-1)
    with pytest.raises(ValueError, match="`loss_threshold` to be a number from 0"):
        make(loss_threshold=-0.1)
    with pytest.raises(ValueError, match="`loss_threshold` to be null where clients"):
        make(ROUTES["U"], loss_threshold=0.1)
