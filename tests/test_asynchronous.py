"""Asynchronous training against plain loops that follow the plan.

What happens when is held against traces by hand in system/test_asynchronous_round.py;
that a run continues after a stop, in test_resume_protocols.py. Each rule below was
broken on purpose, and a test failed: a turn begins from the newest of when it is served
first; a share of 1 for every age, or that of the age before; buffers that are to be
kept are mixed, those that are to be mixed stay; optimizer states that travel are not
mixed, those to be reset stay, or go where the newest are the client's own; the forward
pass is on the newest weights, or on those of one batch more or less; the gradient of
stale weights is lost; the stash of the last turn is left; a round that is cut short
leaves turns open; the plan knows nothing of labels, of the way down, or of hand-ins'
seconds; the data keep a system when the fit is over.
"""

import copy
from collections import Counter, deque

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
    state_of,
)
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from test_protocols import SKEWED
from test_topologies import ROUTES, is_clients, parts_of

from split_lightning import AsynchronousWeightPassing, RoundRobinWeightPassing
from split_lightning.callbacks import DriftMonitor, ResumeCheckpoint, VirtualClock
from split_lightning.protocols import Begin, Mix, Train
from split_lightning.system import Availability, System
from split_lightning.system.seconds import BatchSeconds

VANILLA = ROUTES["one cut"]


class Uneven:
    """Client 2, of the most samples, is the fastest; the server takes its time."""

    def of_batch(self, client_id, num_samples):
        pace = (5, 2, 1)[client_id]
        return BatchSeconds(pace * num_samples, 1, 4, 1, pace * num_samples)

    def upload(self, client_id):
        return 3

    def download(self, client_id):
        return 2


def data_of(protocol, num_clients=3, **options):
    data = make_data(num_clients, protocol, **SKEWED | options)
    data.seconds = Uneven()
    return data


def make(route=VANILLA, optimizer=SGD, **options):
    cuts, labels, _ = route
    return make_split(cuts, optimizer=optimizer, labels=labels, **options)


class Plain:
    """A loop over what happens, with a whole network for each client.

    The layers of the server are the same objects in all of them. Of the layers of the
    client there is a list of copies: of before each batch of a turn.
    """

    def __init__(self, protocol, route=VANILLA):
        self.protocol, self.route = protocol, route
        self.shared = network()
        self.nets = {k: clone(self.shared) for k in range(3)}
        for net in self.nets.values():
            self.share(net)
        self.server = SGD(parts_of(self.shared, route)[1])
        self.own = {k: SGD(parts_of(net, route)[0]) for k, net in self.nets.items()}
        self.newest = self.mine(self.shared)
        self.newest_momentum = None
        self.newest_of = None
        self.count, self.begun, self.ages, self.turns = 0, {}, [], 0
        self.before = {k: deque(maxlen=protocol.in_flight) for k in range(3)}

    def share(self, net):
        for index in set(range(8)) - set(self.route[2]):
            net[index] = self.shared[index]

    def mine(self, net):
        return {
            name: tensor.clone()
            for name, tensor in net.state_dict().items()
            if is_clients(self.route, name)
        }

    def begin(self, k):
        self.begun[k] = self.count
        self.turns += 1
        own = self.newest
        if self.protocol.buffers == "keep":
            names = [name for name, _ in self.nets[k].named_parameters()]
            own = {n: t for n, t in self.newest.items() if n in names}
        self.nets[k].load_state_dict(own, strict=False)
        from_elsewhere = self.count > 0 and self.newest_of != k
        if from_elsewhere and self.protocol.optimizer_state == "reset":
            self.own[k] = SGD(self.mine_of(k))
        travels = self.protocol.optimizer_state == "travel"
        if travels and self.newest_momentum is not None:
            momentum = copy.deepcopy(self.newest_momentum)
            for parameter, value in zip(self.mine_of(k), momentum, strict=True):
                self.own[k].state[parameter]["momentum_buffer"] = value
        self.before[k].clear()

    def mine_of(self, k):
        return parts_of(self.nets[k], self.route)[0]

    def buffers_of(self, k):
        named = self.nets[k].named_buffers()
        return [(name, b) for name, b in named if is_clients(self.route, name)]

    def stale(self, k):
        """The client's network with the parameters of in_flight - 1 batches ago."""
        net = clone(self.nets[k])
        self.share(net)
        mine = parts_of(net, self.route)[0]
        for old, parameter in zip(self.before[k][0], mine, strict=True):
            parameter.data.copy_(old)
        return net

    def serve(self, k, inputs, targets):
        self.before[k].append([p.detach().clone() for p in self.mine_of(k)])
        net = self.stale(k)
        for optimizer in (self.server, self.own[k]):
            optimizer.zero_grad()
        loss_of(net, inputs, targets).backward()
        self.server.step()
        stale = parts_of(net, self.route)[0]
        for mine, other in zip(self.mine_of(k), stale, strict=True):
            mine.grad = other.grad
        self.own[k].step()
        for name, buffer in net.named_buffers():
            if is_clients(self.route, name):
                self.nets[k].get_buffer(name).copy_(buffer)

    def upload(self, k):
        age = self.count - self.begun.pop(k)
        share = (1 + age) ** -self.protocol.staleness_exponent
        own = self.mine(self.nets[k])
        if self.protocol.buffers == "keep":
            own |= {n: self.newest[n] for n, _ in self.buffers_of(k)}
        self.newest = mean_state([self.newest, own], [1 - share, share])
        momentum = [self.own[k].state[p]["momentum_buffer"] for p in self.mine_of(k)]
        before = self.newest_momentum or momentum
        self.newest_momentum = [
            (1 - share) * b + share * m for b, m in zip(before, momentum, strict=True)
        ]
        self.newest_of = k if share == 1 else None
        self.count += 1
        self.ages.append(age)

    def run(self, data, rounds=ROUNDS):
        """Returns the network as a client would have it that begins now."""
        for round_index in range(rounds):
            batches = deque(batches_of(data, round_index))
            for action in self.protocol.plan(data.new_round(round_index)):
                if isinstance(action, Begin):
                    self.begin(action.client)
                elif isinstance(action, Train):
                    ((k, inputs, targets),) = batches.popleft()
                    self.serve(k, inputs, targets)
                elif isinstance(action, Mix):
                    self.upload(action.client)
        return self.newest | {
            name: tensor
            for name, tensor in self.shared.state_dict().items()
            if not is_clients(self.route, name)
        }


def compare(folder, protocol, route=VANILLA):
    module, plain = make(route), Plain(protocol, route)
    fit(folder, module, data_of(protocol))
    assert_close(state_of(module), plain.run(data_of(protocol)))
    return module, plain


@pytest.mark.parametrize("local_steps", [None, 2, 1])
@pytest.mark.parametrize("exponent", [0.5, 0.0, 2.0])
def test_weights_are_mixed_by_age(tmp_path, local_steps, exponent):
    """Each turn gets the newest weights, and sends its own."""
    protocol = AsynchronousWeightPassing(exponent, local_steps=local_steps)
    module, plain = compare(tmp_path, protocol)
    assert max(plain.ages) >= 2 > min(plain.ages)
    size = sum(t.nbytes for t in module.client.state_dict().values())
    totals = module.totals()
    assert totals["averaging_bytes"] == 2 * plain.turns * size
    assert totals["handoffs"] == totals["handoff_bytes"] == 0


@pytest.mark.parametrize("buffers", ["average", "keep"])
@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
def test_policies(tmp_path, policy, buffers):
    protocol = AsynchronousWeightPassing(
        local_steps=1, max_staleness=2, optimizer_state=policy, buffers=buffers
    )
    module, plain = make(), Plain(protocol)
    fit(tmp_path, module, data_of(protocol))
    plain.run(data_of(protocol))
    for k in plain.nets:
        own = plain.buffers_of(k) if buffers == "keep" else []
        client = module.segments(k)["client"].state_dict()
        assert_close(client, plain.newest | dict(own))


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("in_flight", [1, 3])
def test_each_route_and_stale_gradients(tmp_path, name, in_flight):
    """A gradient is of the weights that its forward pass was computed with."""
    protocol = AsynchronousWeightPassing(local_steps=4, in_flight=in_flight)
    _, plain = compare(tmp_path, protocol, ROUTES[name])
    assert any(len(kept) == in_flight for kept in plain.before.values())


def test_memory_of_batches_on_their_way(tmp_path):
    """Copies for as many as may be on their way, and none when the turns are over."""
    module, seen = make(), Counter()

    class Watch(AsynchronousWeightPassing):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.update(Counter(client for client, _ in module.engine.stash).values())
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    fit(tmp_path, module, data_of(Watch(in_flight=3), batch_size=4))
    assert max(seen) == 3
    assert module.engine.stash == {}


def test_what_is_logged(tmp_path):
    protocol = AsynchronousWeightPassing(local_steps=1)
    trainer = fit(tmp_path, make(), data_of(protocol), rounds=2)
    first, both = Plain(protocol), Plain(protocol)
    first.run(data_of(protocol), rounds=1)
    both.run(data_of(protocol), rounds=2)
    ages = both.ages[len(first.ages) :]
    logged = trainer.callback_metrics
    assert logged["staleness/mean"] == pytest.approx(sum(ages) / len(ages))
    assert logged["staleness/max"] == max(ages)


@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
@pytest.mark.parametrize(
    ("num_clients", "bound"), [(1, None), (3, 0)], ids=["one client", "bound 0"]
)
def test_it_is_the_round_robin_bit_for_bit(tmp_path, num_clients, bound, policy):
    """Three rounds with momentum and BatchNorm: weights, losses and bytes of steps."""
    for turns in ({}, {"local_steps": 2, "shuffle": True}):
        found = []
        options = turns | {"optimizer_state": policy}
        for protocol in (
            RoundRobinWeightPassing(**options),
            AsynchronousWeightPassing(max_staleness=bound, **options),
        ):
            module = make()
            data = data_of(protocol, num_clients, availability=Availability(0, 0.4))
            trainer = fit(tmp_path, module, data)
            found.append((module, trainer.callback_metrics))
        (one, logged), (other, same) = found
        assert_equal(state_of(other), state_of(one))
        for name in ("uplink_bytes", "downlink_bytes"):
            assert other.totals()[name] == one.totals()[name] > 0
        for name in ("train/loss", "val/loss"):
            assert same[name] == logged[name]


@pytest.mark.parametrize("limit", ["limit_train_batches", "max_steps"])
def test_a_round_that_is_cut_short_ends_its_turns(tmp_path, limit):
    """All clients have the same weights, though all but one turn were under way."""
    module = make()
    fit(tmp_path, module, data_of(AsynchronousWeightPassing()), **{limit: 4})
    assert module.networks.representatives() == []
    for k in (1, 2):
        assert_equal(state_of(module, k), state_of(module, 0))


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
    """Message by message from bytes and operations; planned ahead, event by event."""
    route = ROUTES[name.partition(",")[0]]
    protocol = AsynchronousWeightPassing(**{"local_steps": 2} | CLOCKED[name])
    data, planned, ends = make_data(3, protocol, **SKEWED), [], []

    class Watch(VirtualClock):
        def on_train_epoch_start(self, trainer, pl_module):
            planned.append(protocol.events(data.new_round(trainer.current_epoch)))

        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            ends.append(self.seconds)

    module = make(route)
    module.client.requires_grad_("frozen" not in name)
    fit(tmp_path, module, data, [Watch(SYSTEM)])
    times = [events[-1].time for events in planned]
    expected = torch.tensor(times, dtype=torch.float64).cumsum(0).tolist()
    assert ends == pytest.approx(expected)
    assert repr(data.seconds) == "EqualSeconds()"


def test_it_takes_less_virtual_time_than_turns_in_order(tmp_path):
    seconds = {}
    for bound in (0, 1, None):
        clock = VirtualClock(SYSTEM)
        protocol = AsynchronousWeightPassing(max_staleness=bound)
        fit(tmp_path, make(), make_data(3, protocol, **SKEWED), [clock], rounds=1)
        seconds[bound] = clock.seconds
    assert seconds[None] < seconds[1] < seconds[0]


def test_it_continues_with_the_same_system_alone(tmp_path):
    """Another one would give the batches in another order."""
    flow = [AsynchronousWeightPassing(), VirtualClock(SYSTEM)]
    fit(tmp_path, make(), make_data(), [*flow, ResumeCheckpoint(tmp_path)], rounds=1)
    last = tmp_path / "last.ckpt"
    other = System(1e6, 1e6, 1e5, 1e6)
    for clock, words in (([VirtualClock(other)], "but got System"), ([], "EqualSec")):
        flow = [AsynchronousWeightPassing(), *clock]
        with pytest.raises(ValueError, match=words):
            fit(tmp_path, make(), make_data(), flow, ckpt_path=last)


@pytest.mark.parametrize(
    ("module", "callbacks", "words"),
    [
        ({}, [DriftMonitor()], "compares turns that follow each other"),
        (
            {"accumulate_grad_batches": 2},
            [],
            "`accumulate_grad_batches` to be 1",
        ),
        (
            {"cut_layer": [[0, 3]]},
            [],
            "mix their weights into the same ones",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, module, callbacks, words):
    data = make_data(3, AsynchronousWeightPassing())
    with pytest.raises((MisconfigurationException, ValueError), match=words):
        fit(tmp_path, make_split(**module), data, callbacks)


def test_several_batches_on_their_way_are_for_one_process():
    trainer = Trainer(accelerator="cpu", strategy="ddp", devices=2, logger=False)
    make().verify(trainer, make_data(), AsynchronousWeightPassing())
    with pytest.raises(MisconfigurationException, match="Use one device"):
        make().verify(trainer, make_data(), AsynchronousWeightPassing(in_flight=2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"staleness_exponent": -1}, "`staleness_exponent` to be a number from 0"),
        ({"max_staleness": -1}, "`max_staleness` to be an age from 0"),
        ({"in_flight": 0}, "`in_flight` to be a positive number of batches"),
        ({"local_steps": 0}, "`local_steps` to be a positive number"),
        ({"clients_per_round": 0}, "`clients_per_round` to be a positive"),
        ({"buffers": "drop"}, "`buffers` to be one of"),
    ],
)
def test_arguments_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AsynchronousWeightPassing(**options)
