"""Each protocol against a plain loop with no code of the library's protocols.

Each rule below was broken on purpose, in the library's code, and a test failed:

- averaging skips the buffers, forgets a weight, counts clients (or batches) in place
  of samples, or counts samples of before the last averaging: ..._fedavg_...
- it comes before the round's last step, or takes a client in before its own last step
  or at the end of a turn that is not its last: ..._fedavg_..., ..._splitfed_v2_...
- it comes a round early: test_several_servers_...
- the mean is not put in place, is that of all rounds, or clients begin from the run's
  start in its place: ..._fedavg_...
- buffers that are to be kept are averaged, or lost: ..._by_policy_...
- a stale optimizer: the last client's state stays, a kept one is lost, `reset` keeps,
  what travels is not averaged, or all share one averaged state: ..._by_policy_...
- evaluation before weights are loaded, of the live network alone, or of some of those
  that differ: ..._splitfed_v3_..., test_several_servers_...
- clients that wait lose their weights: ..._splitfed_v2_... (several turns in a round)
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
  test_gpsl_equals_centralized_...
- SGLR sums in place of averaging, or averages over all: test_averaged_gradients_...
- pooled samples are one client's alone: test_centralized_training_...
- a client that dropped out counts for the samples that were planned:
  test_fedavg_of_clients_that_are_absent_...
- the turn goes to clients that are absent: test_a_hand_off_goes_round_...
- turns in order or by client in place of drawn, one pass in place of several:
  test_rounds.py
"""

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
    mean_state,
    network,
    settle,
    state_of,
    step,
    without_buffers,
)
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from split_lightning import (
    GPSL,
    AsynchronousWeightPassing,
    Centralized,
    Channel,
    CycleSL,
    FedAvg,
    Local,
    MultiServer,
    ParallelSplitLearning,
    Protocol,
    RoundRobinWeightPassing,
    SplitFedV1,
    SplitFedV2,
    SplitFedV3,
)
from split_lightning.coders import AverageGradients
from split_lightning.protocols import PassWeights, Train
from split_lightning.system import Availability

SKEWED = {"partitioner": LinearPartitioner}  # clients of 8, 16 and 24 images
SOME_AWAY = {"availability": Availability(absent=0.3, dropout=0.5), "seed": 4}


def trained(folder, module, protocol, num_clients=3, **options):
    return fit(folder, module, make_data(num_clients, protocol, **options))


def assert_each_close(module, expected):
    """Each client's network is as expected."""
    for client_id, state in enumerate(expected):
        assert_close(state_of(module, client_id), state)


def average(nets, weights, buffers):
    """Averages those that have a weight; all get the mean, with buffers or without."""
    mean = mean_state([nets[k].state_dict() for k in weights], weights.values())
    for net in nets.values():
        own = without_buffers(mean, net) if buffers == "keep" else mean
        net.load_state_dict({**net.state_dict(), **own})


def plain_fedavg(data, optimizer=SGD, policy="keep", buffers="average", every=1):
    """Federated averaging of whole networks that are all in memory."""
    nets = {k: network() for k in range(3)}
    optimizers = {k: optimizer(net.parameters()) for k, net in nets.items()}
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


ROUND_OPTIONS = {
    "all": (SGD, {"every": 1}, {}),
    "all, two passes, every two": (ADAM, {"every": 2}, {"local_epochs": 2}),
    "two of three": (ADAM, {"every": 1, "clients_per_round": 2}, {}),
    "two of three, every two": (
        SGD,
        {"every": 2, "clients_per_round": 2},
        {"seed": 4},
    ),
}


@pytest.mark.parametrize("buffers", ["average", "keep"])
@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
@pytest.mark.parametrize("rounds", ROUND_OPTIONS)
def test_fedavg_and_splitfed_v1_by_policy_equal_a_plain_loop(
    tmp_path, rounds, policy, buffers
):
    """Each client is compared as it would continue."""
    optimizer, given, options = ROUND_OPTIONS[rounds]
    given = given | {"optimizer_state": policy, "buffers": buffers}
    options = SKEWED | options
    unsplit, module = make_unsplit(optimizer=optimizer), make_split(optimizer=optimizer)
    trained(tmp_path, unsplit, FedAvg(**given), **options)
    protocol = SplitFedV1(**given, server_optimizer_state=policy)
    trained(tmp_path, module, protocol, **options)
    data = make_data(3, FedAvg(**given), **options)
    expected = plain_fedavg(data, optimizer, policy, buffers, given["every"])
    assert_each_close(unsplit, expected)
    assert_each_close(module, expected)


@pytest.mark.parametrize("cut_layer", CUTS.values(), ids=CUTS)
def test_splitfed_v1_equals_federated_averaging_at_any_cut(tmp_path, cut_layer):
    """Skipping buffers, a weight, or the last step's weights fails here."""
    module = make_split(cut_layer)
    policies = {"optimizer_state": "travel", "server_optimizer_state": "travel"}
    trained(tmp_path, module, SplitFedV1(**policies), **SKEWED)
    data = make_data(3, SplitFedV1(), **SKEWED)
    assert_each_close(module, plain_fedavg(data, policy="travel"))


def test_a_client_that_never_took_part_has_the_buffers_of_the_start(tmp_path):
    """Not those that another keeps."""
    protocol = FedAvg(clients_per_round=1, buffers="keep")
    data, module = make_data(3, protocol), make_unsplit()
    (chosen,) = {client for ((client, *_),) in batches_of(data, 0)}
    fit(tmp_path, module, data, rounds=1)
    for client_id in range(3):
        batches = state_of(module, client_id)["1.num_batches_tracked"]
        assert (batches > 0) == (client_id == chosen)


def away_in(data):
    """Returns how many were absent in the rounds of a run, and dropped out in it."""
    data.setup("fit")
    loader, absent, begun = data.train_dataloader(), 0, 0
    for round_index in range(ROUNDS):
        loader.set_epoch(round_index)
        round = loader.round()
        list(loader.protocol.plan(round))
        absent += len(round.absent)
        begun += sum(made > 0 for made, _ in round.dropped.values())
    return absent, begun


@pytest.mark.parametrize("every", [1, 2])
def test_fedavg_of_clients_that_are_absent_or_drop_out_equals_a_plain_loop(
    tmp_path, every
):
    """The mean is weighted by the samples of those batches that were given out."""
    options, protocol = SKEWED | SOME_AWAY | {"batch_size": 4}, FedAvg(every)
    assert min(away_in(make_data(3, protocol, **options))) > 0
    module = make_unsplit()
    trained(tmp_path, module, protocol, **options)
    expected = plain_fedavg(make_data(3, protocol, **options), every=every)
    assert_each_close(module, expected)


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
    protocol = RoundRobinWeightPassing(shuffle=True, local_steps=local_steps)
    options = SKEWED | SOME_AWAY | {"batch_size": 5}
    assert min(away_in(make_data(4, protocol, **options))) > 0
    module = make_split()
    trained(tmp_path, module, protocol, 4, **options)
    expected, hand_offs = plain_round_robin(make_data(4, protocol, **options))
    assert_each_close(module, [expected] * 4)
    assert module.totals()["handoffs"] == hand_offs


@pytest.mark.parametrize(("local_steps", "optimizer"), [(None, SGD), (1, ADAM)])
@pytest.mark.parametrize("buffers", ["average", "keep"])
@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
def test_splitfed_v2_by_policy_equals_a_plain_loop(
    tmp_path, policy, buffers, optimizer, local_steps
):
    """A state that was not averaged, or buffers that were, fail here."""
    given = {"optimizer_state": policy, "buffers": buffers, "local_steps": local_steps}
    module = make_split(optimizer=optimizer)
    trained(tmp_path, module, SplitFedV2(**given), **SKEWED)
    data = make_data(3, SplitFedV2(**given), **SKEWED)
    assert_each_close(module, plain_v2(data, policy, buffers, optimizer))


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
    module, data = make_split(), make_data(3, SplitFedV3(), **SKEWED)
    trainer = fit(tmp_path, module, data)
    expected = plain_v3(make_data(3, SplitFedV3(), **SKEWED))
    assert_each_close(module, expected)
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
    protocol = MultiServer(
        2,
        every,
        every,
        optimizer_state=policy,
        server_optimizer_state=policy,
        buffers=buffers,
    )
    module, data = make_split(), make_data(4, protocol, **SKEWED, batch_size=5)
    trainer = fit(tmp_path, module, data)
    plain = make_data(4, MultiServer(), **SKEWED, batch_size=5)
    expected = plain_multi_server(plain, every, policy, buffers)
    assert_each_close(module, [expected[k // 2] for k in range(4)])
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    accuracies = [accuracy_of(state, data) for state in expected]
    assert found["test/accuracy"] == pytest.approx(sum(accuracies) / 2)


def test_several_servers_of_clients_that_are_absent_equal_a_plain_loop(tmp_path):
    options = SKEWED | SOME_AWAY | {"batch_size": 5}
    assert min(away_in(make_data(4, MultiServer(), **options))) > 0
    module = make_split()
    trained(tmp_path, module, MultiServer(), 4, **options)
    plain = make_data(4, MultiServer(), **options)
    expected = plain_multi_server(plain, 1, "keep", "average")
    assert_each_close(module, [expected[k // 2] for k in range(4)])


def plain_parallel(
    data, average, own=False, net=network, make=SGD, server_lr=0.05, mean_of=0
):
    """One server batch of all clients' smashed data; each gets its slice back.

    Args:
        data: What is trained on.
        average: When clients are averaged: 1, "step" or `None`.
        own: Whether a client's gradient is of its own mean loss.
        net: Makes the network.
        make: Makes optimizers.
        server_lr: The server's learning rate.
        mean_of: How many clients get the mean of their gradients.
    """
    whole = net()
    client, server = clone(whole[:3]), clone(whole[3:])
    clients = {k: clone(client) for k in range(3)}
    optimizers = {k: make(net.parameters()) for k, net in clients.items()}
    server_optimizer = make(server.parameters(), lr=server_lr)
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


@pytest.mark.parametrize("every", [None, 1])
def test_parallel_equals_a_plain_loop(tmp_path, every):
    options, protocol = SKEWED | {"batch_size": 12}, ParallelSplitLearning(every)
    module = make_split()
    trained(tmp_path, module, protocol, **options)
    expected = plain_parallel(make_data(3, protocol, **options), every)
    assert_each_close(module, expected)
    assert module.totals()["handoffs"] == 0


@pytest.mark.parametrize(("mean_of", "every"), [(2, None), (2, 1), (3, 1)])
@pytest.mark.parametrize("split", [{}, SKEWED], ids=["equal", "skewed"])
def test_averaged_gradients_and_a_faster_server_equal_a_plain_loop(
    tmp_path, split, mean_of, every
):
    """SGLR. Batches of clients of 16 samples are alike, the skewed ones are not."""
    options, protocol = {**split, "batch_size": 8}, ParallelSplitLearning(every)
    module = make_split(
        server_optimizer=partial(SGD, lr=0.1),
        channel=Channel(downlink=AverageGradients(mean_of)),
    )
    trained(tmp_path, module, protocol, **options)
    data = make_data(3, protocol, **options)
    expected = plain_parallel(data, every, server_lr=0.1, mean_of=mean_of)
    assert_each_close(module, expected)


@pytest.mark.parametrize("norm", [True, False], ids=["BatchNorm", "GroupNorm"])
def test_parallel_averaged_at_each_step_equals_a_plain_loop(tmp_path, norm):
    """With momentum; the buffers of each step are averaged, too."""
    protocol, module = ParallelSplitLearning("step"), make_split(net=network(norm))
    trained(tmp_path, module, protocol, batch_size=8)  # the same clients in all steps
    data = make_data(3, protocol, batch_size=8)
    expected = plain_parallel(data, "step", net=partial(network, norm=norm))
    assert_each_close(module, expected)


def test_gpsl_with_statistics_of_each_client_equals_a_plain_loop(tmp_path):
    """Without momentum: clients that take no part in a step would have an old one."""
    plain = partial(torch.optim.SGD, lr=0.05)
    options, protocol = SKEWED | {"batch_size": 12}, GPSL(joint_norm=False)
    module = make_split(optimizer=plain)
    trained(tmp_path, module, protocol, **options)
    data = make_data(3, protocol, **options)
    expected = plain_parallel(data, "step", own=True, make=plain)
    assert_each_close(module, expected)


@pytest.mark.parametrize("every", [None, 1])
def test_parallel_of_clients_that_are_absent_or_drop_out_equals_a_plain_loop(
    tmp_path, every
):
    """The others go on without those, in smaller batches of the server."""
    options, protocol = (
        SKEWED | SOME_AWAY | {"batch_size": 4},
        ParallelSplitLearning(every),
    )
    assert min(away_in(make_data(3, protocol, **options))) > 0
    module = make_split()
    trained(tmp_path, module, protocol, **options)
    expected = plain_parallel(make_data(3, protocol, **options), every)
    assert_each_close(module, expected)


@pytest.mark.parametrize("norm", [True, False], ids=["BatchNorm", "GroupNorm"])
def test_gpsl_equals_centralized_training(tmp_path, norm):
    """On the joined batches: the sum of the slices is the unsplit network's gradient.

    BatchNorm sees the samples of all clients, as it does there.
    """
    options, protocol = SKEWED | {"batch_size": 12}, GPSL(joint_norm=norm)
    module = make_split(net=network(norm))
    trained(tmp_path, module, protocol, **options)

    net = network(norm)
    optimizer = SGD(net.parameters())
    for round_index in range(ROUNDS):
        for parts in batches_of(make_data(3, protocol, **options), round_index):
            inputs = torch.cat([inputs for _, inputs, _ in parts])
            targets = torch.cat([targets for *_, targets in parts])
            step([optimizer], loss_of(net, inputs, targets))
    assert_each_close(module, [net.state_dict()] * 3)


ALL_SPLIT = (
    RoundRobinWeightPassing,
    SplitFedV1,
    SplitFedV2,
    SplitFedV3,
    ParallelSplitLearning,
    partial(ParallelSplitLearning, "step"),
    GPSL,
    partial(MultiServer, 1),
    AsynchronousWeightPassing,
)


def test_one_client_is_the_unsplit_network_bit_for_bit(tmp_path):
    """Under each protocol but CycleSL, whose server steps first."""
    central = make_unsplit()
    trained(tmp_path, central, Centralized(), 1)
    expected = state_of(central)
    for protocol in (FedAvg, Local):
        unsplit = make_unsplit()
        trained(tmp_path, unsplit, protocol(), 1)
        assert_equal(state_of(unsplit), expected)
    for protocol in ALL_SPLIT:
        module = make_split()
        trained(tmp_path, module, protocol(), 1)
        assert_equal(state_of(module), expected)


def test_centralized_training_is_on_all_clients_samples(tmp_path):
    module, data = make_unsplit(), make_data(3, Centralized(), **SKEWED)
    fit(tmp_path, module, data)
    owned = torch.cat(data.parts)
    net = network()
    optimizer = SGD(net.parameters())
    for round_index in range(ROUNDS):
        steps = batches_of(make_data(3, Centralized(), **SKEWED), round_index)
        for ((_, inputs, targets),) in steps:
            step([optimizer], loss_of(net, inputs, targets))
        assert sum(len(targets) for ((*_, targets),) in steps) == len(owned)
    assert_equal(state_of(module), net.state_dict())


def test_clients_alone_equal_plain_loops(tmp_path):
    data, module = make_data(3, Local(), **SKEWED), make_unsplit()
    trainer = fit(tmp_path, module, data)
    nets = [network() for _ in range(3)]
    optimizers = [SGD(net.parameters()) for net in nets]
    for round_index in range(ROUNDS):
        steps = batches_of(make_data(3, Local(), **SKEWED), round_index)
        for ((k, inputs, targets),) in steps:
            step([optimizers[k]], loss_of(nets[k], inputs, targets))
    for client_id, net in enumerate(nets):
        assert_equal(state_of(module, client_id), net.state_dict())
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
    options, protocol = SKEWED | {"batch_size": 8}, CycleSL(passes, size)
    module = make_split()
    torch.manual_seed(11)
    trainer = trained(tmp_path, module, protocol, **options)
    assert trainer.global_step == 3 * ROUNDS  # one tick a step, however many batches
    expected = plain_cycle(make_data(3, protocol, **options), passes, size)
    assert_each_close(module, [expected] * 3)


class Together(RoundRobinWeightPassing):
    """A protocol of one's own: clients of different servers in one step."""

    num_servers, together = None, True

    def plan(self, round):
        for batches in round.together(round.clients()):
            yield Train(batches)


MISMATCHES = {
    "a whole network for clients that split it": (
        (make_unsplit, [RoundRobinWeightPassing()]),
        "`cut_layer` to name a layer, since RoundRobinWeightPassing",
    ),
    "a network that is cut for one party": (
        (make_split, [FedAvg()]),
        "`cut_layer` to be None, since with FedAvg one party.*but got 2",
    ),
    "two protocols": (
        (make_split, [SplitFedV1(), RoundRobinWeightPassing()]),
        "one protocol.*but got SplitFedV1, RoundRobinWeightPassing",
    ),
    "clients of different servers in one step": (
        (make_split, [Together()]),
        "share a server",
    ),
}


@pytest.mark.parametrize(("parts", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_parts_that_do_not_fit_are_refused(tmp_path, parts, message):
    make, callbacks = parts
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        fit(tmp_path, make(), make_data(), callbacks)


def test_clients_without_a_protocol_are_refused():
    trainer = Trainer(accelerator="cpu", logger=False)
    with pytest.raises(MisconfigurationException, match="nothing passes the weights"):
        trainer.fit(make_split(), datamodule=make_data())


WOULD_CHANGE_NOTHING = {
    "a policy for weights that never come": (
        partial(RoundRobinWeightPassing, enabled=False, optimizer_state="reset"),
        "`optimizer_state` to be 'keep'.*enabled=False.*'reset'",
    ),
    "a policy for means that are never made": (
        partial(ParallelSplitLearning, optimizer_state="reset"),
        "`optimizer_state` to be 'keep'.*every=None.*'reset'",
    ),
    "buffers of clients with one state": (
        partial(ParallelSplitLearning, "step", buffers="keep"),
        "`buffers` to be 'average'.*every=step.*'keep'",
    ),
    "an unknown policy": (
        partial(FedAvg, optimizer_state="drop"),
        r"`optimizer_state` to be one of \('keep', 'travel', 'reset'\).*'drop'",
    ),
    "no clients": (partial(Local, clients_per_round=0), "`clients_per_round`.*got 0"),
    "no rounds": (partial(SplitFedV2, every=0), "`every` to be a positive.*got 0"),
}


@pytest.mark.parametrize("name", WOULD_CHANGE_NOTHING)
def test_arguments_that_would_change_nothing_are_refused(name):
    make, message = WOULD_CHANGE_NOTHING[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_server_that_trains_first_is_for_one_process():
    """Its batches are drawn from all samples of a step, of which a process has few."""
    protocol = CycleSL()
    trainer = Trainer(
        accelerator="cpu", strategy="ddp", devices=2, logger=False, callbacks=[protocol]
    )
    with pytest.raises(MisconfigurationException, match="Use one device"):
        make_split().verify(trainer, make_data(), protocol)


def test_a_protocol_that_stops_passing_weights_is_told(tmp_path):
    class OnlyOnce(Protocol):
        def plan(self, round):
            for client, batches in round.turns(round.clients()):
                if round.number == 0 and client < 2:
                    yield PassWeights(to=client)
                for batch in batches:
                    yield Train((batch,))

    data = make_data(protocol=OnlyOnce())
    with pytest.raises(RuntimeError, match="client/2 has no weights of its own"):
        fit(tmp_path, make_split(), data)


@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_first_client_of_a_group_needs_no_hand_off(tmp_path, groups, policy):
    class FromTheStart(Protocol):
        num_servers = groups

        def plan(self, round):
            for client, batches in round.turns(round.clients()):
                if round.number or client % (4 // groups):
                    yield PassWeights(client, policy)
                for batch in batches:
                    yield Train((batch,))

    one, other = make_split(), make_split()
    trained(tmp_path, one, FromTheStart(), 4, **SKEWED)
    usual = MultiServer(groups, None, None, optimizer_state=policy)
    trained(tmp_path, other, usual, 4, **SKEWED)
    for client_id in range(4):
        assert_equal(state_of(one, client_id), state_of(other, client_id))
    assert one.totals() == other.totals()
