"""Each protocol against a plain loop with no code of the library's protocols.

Each rule below was broken on purpose, in the library's code, and a test failed:

- averaging skips the buffers, forgets a weight, counts clients (or batches) in place
  of samples, or counts samples of before the last averaging: test_fedavg_...
- it comes before the round's last step, or takes a client in before its own last step
  or at the end of a turn that is not its last: test_fedavg_..., ..._splitfed_v2_...
- it comes a round early: test_several_servers_...
- the mean is not put in place, is that of all rounds, or clients begin from the run's
  start in its place: test_fedavg_...
- buffers that are to be kept are averaged, or lost: test_policies_...
- a stale optimizer: the last client's state stays, a kept one is lost, `reset` keeps,
  what travels is not averaged, or all share one averaged state: test_policies_...
- evaluation before weights are loaded, of the live network alone, or of some of those
  that differ: ..._splitfed_v3_..., test_several_servers_...
- clients that wait lose their weights: test_fedavg_... (several turns in a round)
- one server copy for all: ..._splitfed_v3_...; the second server never in place, or
  hand-offs across servers: test_several_servers_...
- at a hand-off the optimizer's state stays behind: test_several_servers_...
- groups' segments, or servers, are not averaged, or too often, or not by samples;
  clients of a round robin go on from their own weights: test_several_servers_...
- clients that act together share weights that are their own: test_parallel_equals_...
- the factor at the cut is missing, or the other way round: test_parallel_equals_...
- slices go to the wrong clients: test_parallel_equals_...
- at each step the last client's buffers are taken, or each client's go on from the
  last one's, or BatchNorm sees all as one batch: test_parallel_averaged_at_each_...
- with joint statistics BatchNorm sees each client by itself:
  test_parallel_averaged_at_each_step_equals_centralized_...
- SGLR sums in place of averaging, or averages over all: test_options_of_sglr_...
- pooled samples are one client's alone: test_centralized_training_...
- a client that dropped out counts for the samples that were planned:
  test_fedavg_of_clients_that_are_absent_...
- the turn goes to clients that are absent: test_a_hand_off_goes_round_...
- turns in order or by client in place of drawn, one pass in place of several:
  data/test_schedule.py
"""

import copy
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
import torch
from flwr_datasets.partitioner import LinearPartitioner
from protocols import (
    ADAM,
    CUTS,
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
    make_unsplit,
    mean_optimizer,
    mean_state,
    network,
    settle,
    step,
    without_buffers,
)
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from split_lightning.server_map import ServerMap

from split_lightning import (
    CycleSplitLightningModule,
    RoundRobinWeightPassing,
    merge,
)
from split_lightning.callbacks import ClientAveraging, ServerAveraging
from split_lightning.data import (
    Availability,
    ParallelSchedule,
    PooledSchedule,
    RoundRobinSchedule,
)

SKEWED = {"partitioner": LinearPartitioner}  # clients of 8, 16 and 24 images
EACH = ServerMap(None)
SOME_AWAY = {"availability": Availability(absent=0.3, dropout=0.5), "seed": 4}


def merged(module):
    return merge(module.client, module.server)


def plain_fedavg(data, optimizer=SGD, policy="keep", buffers="average", every=1):
    """Federated averaging of the unsplit network: whole copies in a list.

    Returns what each client would go on from.
    """
    whole = network()
    common, statistics = whole.state_dict(), [name for name, _ in whole.named_buffers()]
    states, kept, ends, samples = {}, {}, {}, Counter()
    for round_index in range(ROUNDS):
        for ((client, inputs, targets),) in batches_of(data, round_index):
            if client not in ends:
                net = clone(whole)
                net.load_state_dict(common | kept.get(client, {}))
                own = optimizer(net.parameters())
                if client in states:
                    own.load_state_dict(copy.deepcopy(states[client]))
                ends[client] = (net, own)
            net, own = ends[client]
            step([own], loss_of(net, inputs, targets))
            samples[client] += len(targets)
        if (round_index + 1) % every:
            continue
        nets = {client: net.state_dict() for client, (net, _) in ends.items()}
        ended = {client: own.state_dict() for client, (_, own) in ends.items()}
        weights = [samples[client] for client in ends]
        mean = mean_state(list(nets.values()), weights)
        if buffers == "keep":
            kept |= {k: {name: s[name] for name in statistics} for k, s in nets.items()}
            mean = {name: mean[name] for name in mean if name not in statistics}
        common = common | mean
        if policy == "keep":
            states |= ended
        elif policy == "travel":
            states = dict.fromkeys(range(3), mean_optimizer(ended.values(), weights))
        ends, samples = {}, Counter()
    went_on = {client: net.state_dict() for client, (net, _) in ends.items()}
    begin = {client: common | kept.get(client, {}) for client in range(3)}
    return list((begin | went_on).values())


SCHEDULES = {
    "all": {},
    "two of three, shuffled": {
        "schedule": RoundRobinSchedule(shuffle=True, clients_per_round=2)
    },
    "several turns in a round": {"schedule": RoundRobinSchedule(local_steps=1)},
    "two passes": {"local_epochs": 2},
}


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fedavg_equals_a_plain_loop(tmp_path, schedule, optimizer):
    options = SKEWED | SCHEDULES[schedule]
    module = make_unsplit(optimizer=optimizer)
    fit(tmp_path, module, make_data(**options), [ClientAveraging()])
    expected = plain_fedavg(make_data(**options), optimizer)
    assert_close(module.network.state_dict(), expected[0])


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
@pytest.mark.parametrize("buffers", ["average", "keep"])
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_policies_of_averaging_equal_a_plain_loop(
    tmp_path, optimizer, buffers, policy, every
):
    """Of clients, two of three in a round, each is compared as it would go on."""
    options = SKEWED | SCHEDULES["two of three, shuffled"]
    module = make_unsplit(optimizer=optimizer, optimizer_state=policy, buffers=buffers)
    fit(tmp_path, module, make_data(**options), [ClientAveraging(every)])
    expected = plain_fedavg(make_data(**options), optimizer, policy, buffers, every)
    for client_id, state in enumerate(expected):
        module.parties.show(client_id)
        assert_close(module.network.state_dict(), state)


def test_a_client_that_never_took_part_has_the_buffers_of_the_start(tmp_path):
    """Not those that another keeps."""
    data = make_data(3, schedule=RoundRobinSchedule(clients_per_round=1))
    (chosen,) = data.schedule.turns(3, 0, seed=3)
    module = make_unsplit(buffers="keep")
    fit(tmp_path, module, data, [ClientAveraging()], rounds=1)
    for client_id in range(3):
        module.parties.show(client_id)
        batches = module.network[1].num_batches_tracked
        assert (batches > 0) == (client_id == chosen)


@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
@pytest.mark.parametrize("cut_layer", CUTS.values(), ids=CUTS)
def test_splitfed_v1_equals_federated_averaging_at_any_cut(tmp_path, cut_layer, policy):
    """Skipping buffers, a weight, or the last step's weights fails here."""
    module = make_split(
        cut_layer,
        optimizer_state=policy,
        server_optimizer_state=policy,
        server_map=EACH,
    )
    data = make_data(**SKEWED, servers=EACH)
    fit(tmp_path, module, data, [ClientAveraging(), ServerAveraging(remote=False)])
    expected = plain_fedavg(make_data(**SKEWED), policy=policy)
    assert_close(merged(module), expected[0])
    unsplit = make_unsplit(optimizer_state=policy)
    fit(tmp_path, unsplit, make_data(**SKEWED), [ClientAveraging()])
    assert_close(unsplit.network.state_dict(), merged(module))


def away_in(data):
    """Returns how many were absent in the rounds of a run, and dropped out in it."""
    data.setup("fit")
    sampler, absent, begun = data.train_dataloader().sampler, 0, 0
    for round_index in range(ROUNDS):
        sampler.set_epoch(round_index)
        away, dropped = sampler.absentees()
        absent += len(away)
        begun += sum(made > 0 for made, _ in dropped.values())
    return absent, begun


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("local_steps", [None, 1])
def test_fedavg_of_clients_that_are_absent_or_drop_out_equals_a_plain_loop(
    tmp_path, local_steps, every
):
    """The mean is weighted by the samples of those batches that were given out."""
    schedule = RoundRobinSchedule(local_steps=local_steps)
    options = SKEWED | SOME_AWAY | {"schedule": schedule, "batch_size": 4}
    assert min(away_in(make_data(**options))) > 0
    module = make_unsplit()
    fit(tmp_path, module, make_data(**options), [ClientAveraging(every)])
    expected = plain_fedavg(make_data(**options), every=every)
    for client_id, state in enumerate(expected):
        module.parties.show(client_id)
        assert_close(module.network.state_dict(), state)


def segments(cut_layer=2):
    """The parts of the network before and after the cut, as plain modules."""
    whole = network()
    return clone(whole[: cut_layer + 1]), clone(whole[cut_layer + 1 :])


def named(client, server):
    """The state of both parts: slices keep the unsplit network's names."""
    return {**client, **server}


def split_step(client, server, optimizers, inputs, targets):
    activations = client(inputs)
    smashed = activations.detach().requires_grad_()
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss_of(server, smashed, targets).backward()
    activations.backward(smashed.grad)
    for optimizer in optimizers:
        optimizer.step()


def plain_v2(data, policy="keep", buffers="average", make=SGD):
    """SplitFed v2: one server for all in turn; the clients are averaged each round.

    Returns each client's network.
    """
    client, server = segments()
    server_optimizer = make(server.parameters())
    clients = {k: clone(client) for k in range(3)}
    optimizers = {k: make(net.parameters()) for k, net in clients.items()}
    for round_index in range(ROUNDS):
        samples = Counter()
        for ((k, inputs, targets),) in batches_of(data, round_index):
            both = [optimizers[k], server_optimizer]
            split_step(clients[k], server, both, inputs, targets)
            samples[k] += len(targets)
        average(clients, samples, buffers)
        settle(optimizers, samples, policy)
    return [named(net.state_dict(), server.state_dict()) for net in clients.values()]


def plain_round_robin(data):
    """One client segment and one server; the momentum is each client's own.

    Returns the network, and how often the turn went to another client.
    """
    client, server = segments()
    server_optimizer = SGD(server.parameters())
    optimizers = {k: SGD(client.parameters()) for k in range(data.num_clients)}
    order = []
    for round_index in range(ROUNDS):
        for ((k, inputs, targets),) in batches_of(data, round_index):
            both = [optimizers[k], server_optimizer]
            split_step(client, server, both, inputs, targets)
            order.append(k)
    hand_offs = sum(k != following for k, following in pairwise(order))
    return named(client.state_dict(), server.state_dict()), hand_offs


@pytest.mark.parametrize("local_steps", [None, 1])
def test_a_hand_off_goes_round_clients_that_are_absent_or_drop_out(
    tmp_path, local_steps
):
    schedule = RoundRobinSchedule(shuffle=True, local_steps=local_steps)
    options = SKEWED | SOME_AWAY | {"schedule": schedule, "batch_size": 5}
    assert min(away_in(make_data(4, **options))) > 0
    module = make_split()
    fit(tmp_path, module, make_data(4, **options), [RoundRobinWeightPassing()])
    expected, hand_offs = plain_round_robin(make_data(4, **options))
    assert_close(merged(module), expected)
    assert module.traffic.handoffs == hand_offs


def average(nets, weights, buffers):
    """Averages those that have a weight; all get the mean, with buffers or without."""
    mean = mean_state([nets[k].state_dict() for k in weights], weights.values())
    for net in nets.values():
        own = without_buffers(mean, net) if buffers == "keep" else mean
        net.load_state_dict({**net.state_dict(), **own})


@pytest.mark.parametrize("local_steps", [None, 1])
def test_splitfed_v2_equals_a_plain_loop(tmp_path, local_steps):
    schedule = RoundRobinSchedule(shuffle=True, local_steps=local_steps)
    module = make_split()
    data = make_data(**SKEWED, schedule=schedule)
    fit(tmp_path, module, data, [ClientAveraging()])
    expected = plain_v2(make_data(**SKEWED, schedule=schedule))
    assert_close(merged(module), expected[0])


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("buffers", ["average", "keep"])
@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
def test_splitfed_v2_by_policy_equals_a_plain_loop(
    tmp_path, policy, buffers, optimizer
):
    """A state that was not averaged, or buffers that were, fail here."""
    schedule = RoundRobinSchedule(local_steps=1)
    options = {"optimizer_state": policy, "buffers": buffers}
    module = make_split(optimizer=optimizer, **options)
    data = make_data(**SKEWED, schedule=schedule)
    fit(tmp_path, module, data, [ClientAveraging()])
    data = make_data(**SKEWED, schedule=schedule)
    assert_each_close(module, plain_v2(data, policy, buffers, optimizer))


def assert_each_close(module, expected):
    """Each client's network is as expected."""
    for client_id, state in enumerate(expected):
        module.parties.show(client_id)
        assert_close(merged(module), state)
    module.parties.show_live()


def plain_v1(data, policy, buffers, make=SGD, every=1):
    """SplitFed v1, as federated averaging of networks that are all in memory."""
    nets = {k: network() for k in range(3)}
    optimizers = {k: make(net.parameters()) for k, net in nets.items()}
    samples = Counter()
    for round_index in range(ROUNDS):
        for ((k, inputs, targets),) in batches_of(data, round_index):
            step([optimizers[k]], loss_of(nets[k], inputs, targets))
            samples[k] += len(targets)
        if (round_index + 1) % every == 0:
            average(nets, samples, buffers)
            settle(optimizers, samples, policy)
            samples = Counter()
    return [net.state_dict() for net in nets.values()]


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("buffers", ["average", "keep"])
@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
def test_splitfed_v1_and_fedavg_by_policy_equal_a_plain_loop(
    tmp_path, policy, buffers, optimizer
):
    expected = plain_v1(make_data(**SKEWED), policy, buffers, optimizer)
    options = {"optimizer": optimizer, "optimizer_state": policy, "buffers": buffers}
    module = make_split(server_map=EACH, server_optimizer_state=policy, **options)
    data = make_data(**SKEWED, servers=EACH)
    fit(tmp_path, module, data, [ClientAveraging(), ServerAveraging(remote=False)])
    assert_each_close(module, expected)
    unsplit = make_unsplit(**options)
    fit(tmp_path, unsplit, make_data(**SKEWED), [ClientAveraging()])
    for client_id, state in enumerate(expected):
        unsplit.parties.show(client_id)
        assert_close(unsplit.network.state_dict(), state)


def plain_v3(data):
    """SplitFed v3: a server copy for each client, averaged each round."""
    client, server = segments()
    clients = {k: clone(client) for k in range(3)}
    servers = {k: clone(server) for k in range(3)}
    optimizers = {
        k: [SGD(clients[k].parameters()), SGD(servers[k].parameters())]
        for k in range(3)
    }
    for round_index in range(ROUNDS):
        samples = Counter()
        for ((k, inputs, targets),) in batches_of(data, round_index):
            split_step(clients[k], servers[k], optimizers[k], inputs, targets)
            samples[k] += len(targets)
        mean = mean_state([servers[k].state_dict() for k in samples], samples.values())
        for net in servers.values():
            net.load_state_dict(mean)
    return [named(clients[k].state_dict(), mean) for k in range(3)]


def test_splitfed_v3_equals_a_plain_loop(tmp_path):
    """Each client's network is compared, and its accuracy is what the test logs."""
    module = make_split(server_map=EACH)
    data = make_data(**SKEWED, servers=EACH)
    callbacks = [ClientAveraging(every=None), ServerAveraging(remote=False)]
    trainer = fit(tmp_path, module, data, callbacks)
    expected = plain_v3(make_data(**SKEWED, servers=EACH))
    for client_id, state in enumerate(expected):
        module.parties.show(client_id)
        assert_close(merged(module), state)
    module.parties.show_live()
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    accuracies = [accuracy_of(state, data) for state in expected]
    assert len(set(accuracies)) > 1
    assert found["test/accuracy"] == pytest.approx(sum(accuracies) / 3)


def accuracy_of(state, data):
    net = network().eval()
    net.load_state_dict(state)
    pairs = list(data.test_dataloader())
    with torch.no_grad():
        right = [net(inputs).argmax(1) == targets for inputs, targets in pairs]
    return torch.cat(right).float().mean().item()


@pytest.mark.parametrize("buffers", ["average", "keep"])
@pytest.mark.parametrize("seed", [3, 4])
def test_averaging_every_two_rounds_of_some_clients_equals_a_plain_loop(
    tmp_path, seed, buffers
):
    """Buffers that are lost of a client that waits at the averaging fail here."""
    schedule = RoundRobinSchedule(clients_per_round=2)
    options = SKEWED | {"schedule": schedule, "seed": seed}
    module = make_unsplit(buffers=buffers)
    fit(tmp_path, module, make_data(**options), [ClientAveraging(2)])
    expected = plain_v1(make_data(**options), "keep", buffers, every=2)
    assert sorted(module.clients.known()) == [0, 1, 2]
    for client_id, state in enumerate(expected):
        module.parties.show(client_id)
        assert_close(module.network.state_dict(), state)


def plain_multi_server(data, every, policy, buffers):
    """Two servers, two clients each: a round robin in each group, then the mean."""
    client, server = segments()
    clients, servers = ({g: clone(part) for g in (0, 1)} for part in (client, server))
    server_optimizers = {g: SGD(net.parameters()) for g, net in servers.items()}
    # Of each client; where the state goes along with the weights, of each group.
    mine = (lambda k: k) if policy == "keep" else (lambda k: k // 2)
    optimizers = {mine(k): SGD(clients[k // 2].parameters()) for k in range(4)}
    samples, last = Counter(), {}
    for round_index in range(ROUNDS):
        for ((k, inputs, targets),) in batches_of(data, round_index):
            g = k // 2
            if policy == "reset" and last.get(g, k) != k:
                optimizers[g].state.clear()
            last[g] = k
            both = [optimizers[mine(k)], server_optimizers[g]]
            split_step(clients[g], servers[g], both, inputs, targets)
            samples[g] += len(targets)
        if (round_index + 1) % every == 0:
            for nets, own in ((clients, optimizers), (servers, server_optimizers)):
                average(nets, samples, buffers)
                settle(own, samples, policy)
            samples, last = Counter(), {}
    return [named(clients[g].state_dict(), servers[g].state_dict()) for g in (0, 1)]


@pytest.mark.parametrize("buffers", ["average", "keep"])
@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
@pytest.mark.parametrize("every", [1, 2])
def test_several_servers_equal_a_plain_loop(tmp_path, every, policy, buffers):
    two = ServerMap(2)
    policies = {"optimizer_state": policy, "server_optimizer_state": policy}
    module = make_split(server_map=two, buffers=buffers, **policies)
    options = SKEWED | {"servers": two, "batch_size": 5}
    data = make_data(4, **options)
    passing = RoundRobinWeightPassing(average_every=every)
    trainer = fit(tmp_path, module, data, [passing, ServerAveraging(every)])
    expected = plain_multi_server(
        make_data(4, **SKEWED, servers=two, batch_size=5), every, policy, buffers
    )
    for client_id in range(4):
        module.parties.show(client_id)
        assert_close(merged(module), expected[client_id // 2])
    module.parties.show_live()
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    accuracies = [accuracy_of(state, data) for state in expected]
    assert found["test/accuracy"] == pytest.approx(sum(accuracies) / 2)


def test_several_servers_of_clients_that_are_absent_equal_a_plain_loop(tmp_path):
    two, policies = ServerMap(2), ("keep", "average")
    module = make_split(server_map=two)
    options = SKEWED | SOME_AWAY | {"servers": two, "batch_size": 5}
    assert min(away_in(make_data(4, **options))) > 0
    passing = RoundRobinWeightPassing(average_every=1)
    data = make_data(4, **options)
    fit(tmp_path, module, data, [passing, ServerAveraging()])
    expected = plain_multi_server(make_data(4, **options), 1, *policies)
    for client_id in range(4):
        module.parties.show(client_id)
        assert_close(merged(module), expected[client_id // 2])


def plain_parallel(data, own, average, net=network, exponent=0.0, mean_of=0):
    """One server batch of all clients' smashed data; each gets its slice back."""
    whole = net()
    client, server = clone(whole[:3]), clone(whole[3:])
    clients = {k: clone(client) for k in range(3)}
    optimizers = {k: SGD(net.parameters()) for k, net in clients.items()}
    server_optimizer = SGD(server.parameters(), lr=0.05 * 3**exponent)
    for round_index in range(ROUNDS):
        samples = Counter()
        for parts in batches_of(data, round_index):
            activations = [clients[k](inputs) for k, inputs, _ in parts]
            smashed = [a.detach().requires_grad_() for a in activations]
            targets = torch.cat([targets for *_, targets in parts])
            server_optimizer.zero_grad()
            loss_of(server, torch.cat(smashed), targets).backward()
            server_optimizer.step()
            alike = [s.grad for s in smashed[:mean_of]]
            if len({grad.shape for grad in alike}) == 1:
                mean = sum(alike) / len(alike)
                for s in smashed[:mean_of]:
                    s.grad = mean
            for (k, inputs, _), a, s in zip(parts, activations, smashed, strict=True):
                optimizers[k].zero_grad()
                scale = len(targets) / len(inputs) if own else 1
                a.backward(s.grad * scale)
                optimizers[k].step()
                samples[k] += len(inputs)
            if average == "step":
                sizes = [len(inputs) for _, inputs, _ in parts]
                spread(clients, [k for k, *_ in parts], sizes)
        if average == 1:
            spread(clients, list(samples), list(samples.values()))
    states = [c.state_dict() for c in clients.values()]
    return [named(state, server.state_dict()) for state in states]


def spread(clients, chosen, weights):
    mean = mean_state([clients[k].state_dict() for k in chosen], weights)
    for net in clients.values():
        net.load_state_dict(mean)


@pytest.mark.parametrize("cut_gradient", ["joint", "own"])
@pytest.mark.parametrize("average", [None, 1])
@pytest.mark.parametrize("draw", ["equal", "proportional"])
def test_parallel_equals_a_plain_loop(tmp_path, draw, average, cut_gradient):
    options = SKEWED | {"schedule": ParallelSchedule(draw=draw), "batch_size": 12}
    module = make_split(cut_gradient=cut_gradient)
    fit(tmp_path, module, make_data(**options), [ClientAveraging(every=average)])
    own = cut_gradient == "own"
    expected = plain_parallel(make_data(**options), own, average)
    for client_id, state in enumerate(expected):
        module.parties.show(client_id)
        assert_close(merged(module), state)
    assert module.traffic.handoffs == 0


SGLR = {
    "server rate": {"exponent": 0.5},
    "mean of two": {"mean_of": 2},
    "mean of all": {"mean_of": 3, "exponent": 1.0},
}


@pytest.mark.parametrize("options", SGLR.values(), ids=SGLR)
@pytest.mark.parametrize("split", [{}, SKEWED], ids=["equal", "skewed"])
def test_options_of_sglr_equal_a_plain_loop(tmp_path, split, options):
    """Batches of clients of 16 samples are alike, those of the skewed ones are not."""
    given = {**split, "schedule": ParallelSchedule(), "batch_size": 8}
    module = make_split(
        server_lr_exponent=options.get("exponent", 0.0),
        average_cut_gradients=options.get("mean_of"),
    )
    fit(tmp_path, module, make_data(**given), [ClientAveraging(every=1)])
    expected = plain_parallel(make_data(**given), own=False, average=1, **options)
    assert_close(merged(module), expected[0])


def plain_sgd_network(norm):
    return partial(network, norm=norm)


@pytest.mark.parametrize("cut_gradient", ["joint", "own"])
@pytest.mark.parametrize("norm", [True, False], ids=["BatchNorm", "GroupNorm"])
def test_parallel_averaged_at_each_step_equals_a_plain_loop(
    tmp_path, norm, cut_gradient
):
    """With momentum; the buffers of each step are averaged, too."""
    options = {"schedule": ParallelSchedule(), "batch_size": 8}  # the same clients
    module = make_split(net=network(norm), cut_gradient=cut_gradient)
    fit(tmp_path, module, make_data(**options), [ClientAveraging(every="step")])
    own = cut_gradient == "own"
    net = plain_sgd_network(norm)
    expected = plain_parallel(make_data(**options), own, "step", net)
    assert_close(merged(module), expected[0])


@pytest.mark.parametrize("average", [None, 1])
def test_parallel_of_clients_that_are_absent_or_drop_out_equals_a_plain_loop(
    tmp_path, average
):
    """The others go on without those, in smaller batches of the server."""
    options = SKEWED | SOME_AWAY | {"schedule": ParallelSchedule(), "batch_size": 4}
    assert min(away_in(make_data(**options))) > 0
    module = make_split()
    fit(tmp_path, module, make_data(**options), [ClientAveraging(every=average)])
    expected = plain_parallel(make_data(**options), own=False, average=average)
    assert_each_close(module, expected)


@pytest.mark.parametrize("norm", [True, False], ids=["BatchNorm", "GroupNorm"])
@pytest.mark.parametrize("draw", ["equal", "proportional"])
def test_parallel_averaged_at_each_step_equals_centralized_training(
    tmp_path, draw, norm
):
    """On the joined batches, once each client's gradient is of its own mean loss.

    The mean of the clients' gradients, weighted by b / B, of B / b times their slices
    is the sum of the slices: the unsplit network's gradient. BatchNorm must see the
    samples of all clients, as it does there.
    """
    schedule = ParallelSchedule(draw=draw)
    options = SKEWED | {"schedule": schedule, "batch_size": 12}
    normalisation = "joint" if norm else "own"
    module = make_split(net=network(norm), cut_gradient="own", batch_norm=normalisation)
    fit(tmp_path, module, make_data(**options), [ClientAveraging(every="step")])

    net = network(norm)
    optimizer = SGD(net.parameters())
    for round_index in range(ROUNDS):
        for parts in batches_of(make_data(**options), round_index):
            inputs = torch.cat([inputs for _, inputs, _ in parts])
            targets = torch.cat([targets for *_, targets in parts])
            step([optimizer], loss_of(net, inputs, targets))
    assert_close(merged(module), net.state_dict())


def test_one_client_is_the_unsplit_network_bit_for_bit(tmp_path):
    """A round robin, federated averaging and parallel clients of one client each."""
    central = make_unsplit()
    fit(tmp_path, central, make_data(1, schedule=PooledSchedule()), [])
    expected = central.network.state_dict()
    for callback in (RoundRobinWeightPassing(), ClientAveraging()):
        module = make_split()
        fit(tmp_path, module, make_data(1), [callback])
        assert_equal(merged(module), expected)
    unsplit = make_unsplit()
    fit(tmp_path, unsplit, make_data(1), [ClientAveraging()])
    assert_equal(unsplit.network.state_dict(), expected)
    parallel = make_split()
    data = make_data(1, schedule=ParallelSchedule())
    fit(tmp_path, parallel, data, [ClientAveraging(every="step")])
    assert_equal(merged(parallel), expected)


def test_centralized_training_is_on_all_clients_samples(tmp_path):
    data = make_data(3, **SKEWED, schedule=PooledSchedule())
    module = make_unsplit()
    fit(tmp_path, module, data, [])
    owned = torch.cat(data.parts)
    net = network()
    optimizer = SGD(net.parameters())
    for round_index in range(ROUNDS):
        steps = batches_of(
            make_data(3, **SKEWED, schedule=PooledSchedule()), round_index
        )
        for ((_, inputs, targets),) in steps:
            step([optimizer], loss_of(net, inputs, targets))
        assert sum(len(targets) for ((*_, targets),) in steps) == len(owned)
    assert_equal(module.network.state_dict(), net.state_dict())


def test_clients_alone_equal_plain_loops(tmp_path):
    data, module = make_data(3, **SKEWED), make_unsplit()
    trainer = fit(tmp_path, module, data, [ClientAveraging(every=None)])
    nets = [network() for _ in range(3)]
    optimizers = [SGD(net.parameters()) for net in nets]
    for round_index in range(ROUNDS):
        for ((k, inputs, targets),) in batches_of(make_data(3, **SKEWED), round_index):
            step([optimizers[k]], loss_of(nets[k], inputs, targets))
    for client_id, net in enumerate(nets):
        module.parties.show(client_id)
        assert_equal(module.network.state_dict(), net.state_dict())
    module.parties.show_live()
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    accuracies = [accuracy_of(net.state_dict(), data) for net in nets]
    assert found["test/accuracy"] == pytest.approx(sum(accuracies) / 3)


def plain_cycle(data, passes, size):
    """The server on pooled smashed data first, then the clients with its gradients."""
    client, server = segments()
    clients = {k: clone(client) for k in range(3)}
    optimizers = {k: SGD(net.parameters()) for k, net in clients.items()}
    server_optimizer = SGD(server.parameters())
    torch.manual_seed(11)
    for round_index in range(ROUNDS):
        samples = Counter()
        for parts in batches_of(data, round_index):
            activations = [clients[k](inputs) for k, inputs, _ in parts]
            targets = torch.cat([targets for *_, targets in parts])
            pooled = torch.cat([a.detach() for a in activations])
            orders = [torch.randperm(len(targets)) for _ in range(passes)]
            for chosen in (batch for order in orders for batch in order.split(size)):
                step(
                    [server_optimizer], loss_of(server, pooled[chosen], targets[chosen])
                )
            smashed = [a.detach().requires_grad_() for a in activations]
            loss_of(server, torch.cat(smashed), targets).backward()
            for (k, inputs, _), a, s in zip(parts, activations, smashed, strict=True):
                optimizers[k].zero_grad()
                a.backward(s.grad)
                optimizers[k].step()
                samples[k] += len(inputs)
        spread(clients, list(samples), list(samples.values()))
    return named(clients[0].state_dict(), server.state_dict())


@pytest.mark.parametrize(("passes", "size"), [(1, 6), (2, 10)])
def test_cycle_equals_a_plain_loop(tmp_path, passes, size):
    options = SKEWED | {"schedule": ParallelSchedule(), "batch_size": 8}
    module = CycleSplitLightningModule(
        network(), 2, SGD, SGD, 3, server_passes=passes, server_batch_size=size
    )
    torch.manual_seed(11)
    trainer = fit(tmp_path, module, make_data(**options), [ClientAveraging()])
    assert trainer.global_step == 3 * ROUNDS  # one tick a step, however many batches
    assert_close(merged(module), plain_cycle(make_data(**options), passes, size))


def test_sglr_scales_the_server_and_averages_gradients(tmp_path):
    """Against a plain loop: server lr times sqrt(K), the first two clients' mean."""
    options = {"schedule": ParallelSchedule(), "batch_size": 8}
    module = make_split(server_lr_exponent=0.5, average_cut_gradients=2)
    fit(tmp_path, module, make_data(**options), [ClientAveraging(every=None)])

    client, server = segments()
    clients = {k: clone(client) for k in range(3)}
    optimizers = {k: SGD(net.parameters()) for k, net in clients.items()}
    faster = torch.optim.SGD(server.parameters(), lr=0.05 * 3**0.5, momentum=0.9)
    for round_index in range(ROUNDS):
        for parts in batches_of(make_data(**options), round_index):
            activations = [clients[k](inputs) for k, inputs, _ in parts]
            smashed = [a.detach().requires_grad_() for a in activations]
            targets = torch.cat([targets for *_, targets in parts])
            step([faster], loss_of(server, torch.cat(smashed), targets))
            gradients = [s.grad for s in smashed]
            gradients[:2] = [(gradients[0] + gradients[1]) / 2] * 2
            for (k, *_), a, gradient in zip(parts, activations, gradients, strict=True):
                optimizers[k].zero_grad()
                a.backward(gradient)
                optimizers[k].step()
    for client_id, net in clients.items():
        module.parties.show(client_id)
        assert_close(merged(module), named(net.state_dict(), server.state_dict()))


PARALLEL = {"schedule": ParallelSchedule()}
MISMATCHES = {
    "a round robin of several at once": (
        (make_split, PARALLEL, [RoundRobinWeightPassing()]),
        r"Several clients act in each step, and RoundRobinWeightPassing is for one",
    ),
    "averaging at each step of clients in turn": (
        (make_split, {}, [ClientAveraging(every="step")]),
        "One client acts in each step, and ClientAveraging is for several",
    ),
    "whole networks at once": (
        (make_unsplit, PARALLEL, [ClientAveraging()]),
        "whole network act one at a time.*ParallelSchedule",
    ),
    "a policy for weights that never come": (
        (
            partial(make_split, optimizer_state="reset"),
            {},
            [ClientAveraging(every=None)],
        ),
        "optimizer_state=reset.*every=None",
    ),
    "joint statistics of different weights": (
        (partial(make_split, batch_norm="joint"), PARALLEL, [ClientAveraging()]),
        "`batch_norm` to be 'own' where clients do not act on the same weights",
    ),
    "joint statistics of clients in turn": (
        (partial(make_split, batch_norm="joint"), {}, [RoundRobinWeightPassing()]),
        "`batch_norm` to be 'own' where clients do not act on the same weights",
    ),
    "nothing that passes weights on": (
        (make_split, PARALLEL, []),
        "nothing passes the weights on",
    ),
}


@pytest.mark.parametrize(("parts", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_parts_that_do_not_fit_are_refused(tmp_path, parts, message):
    make, options, callbacks = parts
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, make(), make_data(**options), callbacks)


def test_a_step_of_clients_of_different_servers_is_refused(tmp_path):
    module = make_split(server_map=EACH)
    with pytest.raises(ValueError, match=r"share a server.*the same `servers`"):
        fit(tmp_path, module, make_data(**PARALLEL), [ClientAveraging()])


def test_a_server_that_trains_first_is_for_one_process():
    """Its batches are drawn from all samples of a step, of which a process has few."""
    trainer = Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        logger=False,
        callbacks=[ClientAveraging()],
    )
    module = CycleSplitLightningModule(network(), 2, SGD, SGD, 3)
    with pytest.raises(MisconfigurationException, match="Use one device"):
        module.verify(trainer, make_data())
