"""Holders of parts of samples, against joint networks and plain loops.

Each rule below was broken on purpose, and a test failed: tiles are put back in another
order; a mean is over all holders where those that lack a sample are to be left out, and
attention weighs them; a bottom sees zeros in the place of samples that it lacks; labels
cross where they stay with a holder; rows that are not there are counted; gradients are
clipped over a client's holders as one; one holder waits for another's link; holders
lack other samples in each round.
"""

import copy
import json
from collections import Counter
from functools import partial
from itertools import cycle, product

import pytest
import torch
from conftest import RandomImages
from kornia.augmentation import RandomHorizontalFlip
from protocols import (
    ROUNDS,
    SGD,
    assert_close,
    assert_equal,
    batches_of,
    fit,
    loss_of,
    mean_state,
    state_of,
    step,
)
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from test_resume import check
from test_train import command
from torch import nn
from torch.nn.functional import cross_entropy

from split_lightning import (
    GPSL,
    ParallelSplitLearning,
    RoundRobinWeightPassing,
    SplitDataModule,
    SplitFedV1,
    SplitLightningModule,
    split,
)
from split_lightning.callbacks import VirtualClock
from split_lightning.cuts import main as cuts_main
from split_lightning.data import Images, MissingParts, SklearnTable
from split_lightning.evaluate import main as evaluate_main
from split_lightning.export import main as export_main
from split_lightning.message import AGGREGATOR, Computed, Message
from split_lightning.models import (
    MLP,
    DigitsCNN,
    VerticalNetwork,
    cifar_resnet18,
    vertical_network,
)
from split_lightning.models.joins import Mean, join_of
from split_lightning.models.parts import Columns, Tiles
from split_lightning.observers.clock import Clock
from split_lightning.system import System, Work, work_of


class RandomTable:
    """Rows of seven columns."""

    classes = ("a", "b", "c")

    def load(self, train):
        images = RandomImages(shape=(7, 1, 1)).load(train)
        return Images(images.inputs.float() / 100, images.targets)


# How samples are divided, and the slices of a batch that each holder has, written out.
LEFT, RIGHT = slice(0, 3), slice(3, 6)
HALVES = (Tiles(1, 2), [(..., LEFT), (..., RIGHT)])
QUADRANTS = (
    Tiles(2, 2),
    [(..., LEFT, LEFT), (..., LEFT, RIGHT), (..., RIGHT, LEFT), (..., RIGHT, RIGHT)],
)
COLUMNS = (
    Columns(sizes=[4, 2, 1]),
    [
        (slice(None), slice(0, 4)),
        (slice(None), slice(4, 6)),
        (slice(None), slice(6, 7)),
    ],
)
IMAGES, TABLE = {"halves": HALVES, "quadrants": QUADRANTS}, {"columns": COLUMNS}
DIVIDED = IMAGES | TABLE
JOINS = ["concat", "sum", "mean", "attention"]
# Where to cut behind the bottoms, who has the labels, and the top's layers that are the
# client's.
ROUTES = {
    "server": (["bottoms"], "server", []),
    "hops": (["bottoms", "top.1"], "server", []),
    "U": (["bottoms", "top.1"], "client", ["top.2", "top.3"]),
}


def bottom_of(divided, holder, norm=True):
    torch.manual_seed(10 + holder)
    if divided in TABLE:
        size = (4, 2, 1)[holder]
        layers = [nn.Flatten(), nn.Linear(size, 6)]
        # BatchNorm of vectors needs two samples of each batch.
        layers += [nn.BatchNorm1d(6) if norm else nn.LayerNorm(6)]
        return nn.Sequential(*layers, nn.ReLU(inplace=True))
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
    )


def values_of_holder(divided, join):
    """How many values each holder sends, and how many they make together."""
    own = 6 if divided in TABLE else 4 * (18 if divided == "halves" else 9)
    return own, own * len(DIVIDED[divided][1]) if join == "concat" else own


def network(divided="halves", join="concat", missing=None):
    parts, slices = DIVIDED[divided]
    norm = missing is None
    bottoms = [bottom_of(divided, holder, norm) for holder in range(len(slices))]
    torch.manual_seed(7)
    joining = join_of(join, parts, 6 if divided in TABLE else 4, missing)
    width = values_of_holder(divided, join)[1]
    top = nn.Sequential(
        nn.Flatten(), nn.Linear(width, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
    )
    return VerticalNetwork(parts, bottoms, joining, top, missing)


def make_data(num_clients=3, protocol=None, divided="halves", lack=None, **options):
    options = {"batch_size": 6, "val_share": 0.2, "seed": 3} | options
    source = RandomTable() if divided in TABLE else RandomImages()
    missing = MissingParts(DIVIDED[divided][0], lack, seed=3)
    data = SplitDataModule(source, num_clients, missing_parts=missing, **options)
    data.protocol = protocol or data.protocol
    return data


def made(net=None, route="server", **options):
    cuts, labels, _ = ROUTES[route]
    net = network() if net is None else net
    return SplitLightningModule(net, cuts, SGD, SGD, 3, labels=labels, **options)


def is_clients(route, name):
    return name.startswith(("bottoms", *ROUTES[route][2]))


def parts_of(net, route="server"):
    """The client's parameters and the server's."""
    named = list(net.named_parameters())
    mine = [p for name, p in named if is_clients(route, name)]
    return mine, [p for name, p in named if not is_clients(route, name)]


def plain(net, divided, join, missing, inputs):
    """What a joint network computes, written out holder by holder."""
    values, there = [], []
    for bottom, own in zip(net.bottoms, DIVIDED[divided][1], strict=True):
        part = inputs[own]
        has = torch.tensor([not bool(row.isnan().any()) for row in part])
        found = bottom.network(part[has])
        rows = iter(found)
        blank = torch.zeros(found.shape[1:])
        values.append(torch.stack([next(rows) if h else blank for h in has.tolist()]))
        there.append(has)
    there = torch.stack(there, dim=1)  # (B, holders)
    if join == "concat" and divided == "quadrants":
        one, two, three, four = values
        return torch.cat([torch.cat([one, two], 3), torch.cat([three, four], 3)], 2)
    if join == "concat":
        return torch.cat(values, dim=-1)
    samples = []
    for number, has in enumerate(there.tolist()):
        own = [value[number] for value in values]
        if missing == "skip":
            own = [value for value, h in zip(own, has, strict=True) if h]
        weights = [1.0 if join == "sum" else 1 / len(own)] * len(own)
        if join == "attention":
            pooled = [v if v.ndim == 1 else v.mean(dim=(1, 2)) for v in own]
            weight, bias = net.join.score.weight[0], net.join.score.bias[0]
            weights = torch.stack([p @ weight + bias for p in pooled]).softmax(dim=0)
        samples.append(sum(w * v for w, v in zip(weights, own, strict=True)))
    return torch.stack(samples)


RULES = [(join, rule) for join in JOINS for rule in (None, "zeros", "skip")]
RULES = [rule for rule in RULES if rule not in (("concat", "skip"), ("sum", "skip"))]


LOOPS = [("halves", *rule) for rule in RULES] + [
    ("quadrants", "concat", None),
    ("quadrants", "mean", "skip"),
    ("columns", "concat", "zeros"),
    ("columns", "attention", "skip"),
]


@pytest.mark.parametrize(("divided", "join", "missing"), LOOPS)
def test_it_equals_a_plain_loop_over_holders(tmp_path, divided, join, missing):
    """With momentum and BatchNorm; of samples that a holder lacks it knows nothing."""
    lack = [0.4, 0.2, 0.1, 0.5][: len(DIVIDED[divided][1])]
    options = {"divided": divided, "lack": lack if missing else None}
    module = made(network(divided, join, missing))
    fit(tmp_path, module, make_data(1, **options))
    net = network(divided, join, missing)
    optimizer, lacked = SGD(net.parameters()), 0
    for round_index in range(ROUNDS):
        for ((_, inputs, targets),) in batches_of(make_data(1, **options), round_index):
            lacked += int(inputs.isnan().any())
            logits = net.top(plain(net, divided, join, missing, inputs))
            step([optimizer], cross_entropy(logits, targets))
    assert (lacked > 0) == (missing is not None)
    assert_close(state_of(module), net.state_dict())


# Each rule on one of the routes, so that each meets each way of dividing samples.
CASES = [
    (divided, *rule, route)
    for (divided, rule), route in zip(
        product(DIVIDED, RULES), cycle([*ROUTES, "U"]), strict=False
    )
]


@pytest.mark.parametrize(("divided", "join", "missing", "route"), CASES)
def test_it_is_the_joint_network_bit_for_bit(tmp_path, divided, join, missing, route):
    options = {"divided": divided, "lack": 0.3 if missing else None}
    module = made(network(divided, join, missing), route, label_holder=1)
    data = make_data(1, **options)
    fit(tmp_path, module, data, rounds=1)
    net = network(divided, join, missing)
    optimizer = SGD(net.parameters())
    for ((_, inputs, targets),) in batches_of(make_data(1, **options), 0):
        step([optimizer], loss_of(net, inputs, targets))
    assert_equal(state_of(module), net.state_dict())
    net.load_state_dict(state_of(module))


@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_round_robin_of_groups_equals_a_plain_loop(tmp_path, route, policy):
    module = made(route=route)
    protocol = RoundRobinWeightPassing(optimizer_state=policy)
    fit(tmp_path, module, make_data(3, protocol))
    net = network()
    mine, theirs = parts_of(net, route)
    server, own, states, before = SGD(theirs), SGD(mine), {}, None
    for round_index in range(ROUNDS):
        for ((client, inputs, targets),) in batches_of(make_data(), round_index):
            if client != before and policy != "travel":
                states[before] = copy.deepcopy(own.state_dict())
                own = SGD(mine)
                if policy == "keep" and client in states:
                    own.load_state_dict(states[client])
            before = client
            step([own, server], loss_of(net, inputs, targets))
    assert_equal(state_of(module), net.state_dict())


def test_splitfed_averages_part_by_part(tmp_path):
    """Each holder's bottom with those of the same holder of other groups."""
    module = made()
    fit(tmp_path, module, make_data(3, SplitFedV1()))
    nets = {k: network() for k in range(3)}
    own = {k: SGD(net.parameters()) for k, net in nets.items()}
    for round_index in range(ROUNDS):
        samples = Counter()
        for ((k, inputs, targets),) in batches_of(make_data(), round_index):
            step([own[k]], loss_of(nets[k], inputs, targets))
            samples[k] += len(targets)
        states = [nets[k].state_dict() for k in samples]
        mean = mean_state(states, samples.values())
        for net in nets.values():
            net.load_state_dict(mean)
    assert_close(state_of(module), nets[0].state_dict())


@pytest.mark.parametrize("missing", [None, "skip"])
def test_groups_that_act_on_one_state_equal_a_plain_loop(tmp_path, missing):
    """BatchNorm sees each group's samples by themselves."""
    data = make_data(3, GPSL(joint_norm=False), batch_size=12, lack=missing and 0.3)
    module = made(network("halves", "mean", missing))
    fit(tmp_path, module, data)
    net = network("halves", "mean", missing)
    mine, theirs = parts_of(net)
    own, server = SGD(mine), SGD(theirs)
    averaged = {n for n, _ in net.named_buffers() if n.startswith("bottoms")}
    for round_index in range(ROUNDS):
        for parts in batches_of(data, round_index):
            sizes = [len(targets) for *_, targets in parts]
            before, states, joined = copy.deepcopy(net.state_dict()), [], []
            for _, inputs, _ in parts:
                for name in averaged:
                    net.get_buffer(name).data.copy_(before[name])
                joined.append(plain(net, "halves", "mean", missing, inputs))
                states.append({n: net.get_buffer(n).clone() for n in averaged})
            for name, value in mean_state(states, sizes).items():
                net.get_buffer(name).data.copy_(value)
            targets = torch.cat([own for *_, own in parts])
            loss = cross_entropy(net.top(torch.cat(joined)), targets)
            step([own, server], loss)
    assert_close(state_of(module), net.state_dict())


def spied(tmp_path, module, data):
    seen = []
    module.channel.observers.append(seen.append)
    fit(tmp_path, module, data)
    return seen


@pytest.mark.parametrize("route", ROUTES)
def test_each_holder_sends_what_is_its_own_and_gets_back_its_own(tmp_path, route):
    """Its smashed data are a function of its part alone; so is no other's."""
    options = {"divided": "quadrants", "lack": 0.3}
    module = made(network("quadrants", "mean", "skip"), route, label_holder=3)
    seen = spied(tmp_path, module, make_data(1, **options))
    net = network("quadrants", "mean", "skip").train()
    ((_, inputs, targets),) = batches_of(make_data(1, **options), 0)[0]
    first = [m for m in seen if m.step == 0 and m.cut == 0]
    sent = {m.sender: m.payload for m in first if m.kind == "smashed"}
    back = {m.receiver: m.payload for m in first if m.kind == "gradient"}
    names = [f"client/0.{holder}" for holder in range(4)]
    assert list(sent) == names
    assert list(back) == names
    joined = plain(net, "quadrants", "mean", "skip", inputs)
    cross_entropy(net.top(joined), targets).backward()
    for holder, own in enumerate(QUADRANTS[1]):
        part = inputs[own]
        has = ~part.flatten(1).isnan().any(dim=1)
        bottom = bottom_of("quadrants", holder)
        values, there = sent[names[holder]]
        found = bottom(part[has])
        assert torch.equal(values, found)
        assert torch.equal(there, has)
        found.backward(back[names[holder]][0])
        for one, other in zip(
            bottom.parameters(), net.bottoms[holder].parameters(), strict=True
        ):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("divided", "route"), zip(DIVIDED, ROUTES, strict=True))
def test_no_part_of_a_sample_crosses(tmp_path, divided, route):
    data = make_data(1, divided=divided)
    seen = spied(tmp_path, made(network(divided), route), data)
    raw = {
        row.numpy().tobytes()
        for ((_, inputs, _),) in batches_of(data, 0)
        for own in DIVIDED[divided][1]
        for row in inputs[own]
    }
    assert len(raw) > 40
    for message in seen:
        for value in message.payload:
            for row in value:
                assert row.numpy(force=True).tobytes() not in raw, message


@pytest.mark.parametrize("holder", [0, 1])
def test_labels_are_one_holders(tmp_path, holder):
    seen = spied(tmp_path, made(route="U", label_holder=holder), make_data(1))
    assert {message.kind for message in seen} == {"smashed", "gradient"}
    ends = {e for m in seen if m.cut == 1 for e in (m.sender, m.receiver)}
    assert ends == {f"client/0.{holder}", "server/0"}
    assert all(v.is_floating_point() for message in seen for v in message.payload)
    seen = spied(tmp_path, made(label_holder=holder), make_data(1))
    senders = {m.sender for m in seen if m.kind == "labels"}
    assert senders == {f"client/0.{holder}"}


@pytest.mark.parametrize("divided", DIVIDED)
def test_a_head_is_the_clients_second_stage_however_many_holders(divided):
    """So the files of an export are called."""
    module = made(network(divided), "U", label_holder=1)
    assert list(module.stages()) == ["client", "server", "client_2"]


@pytest.mark.parametrize("lack", [None, [0.5, 0.2]])
@pytest.mark.parametrize("route", ROUTES)
def test_bytes_are_those_of_what_is_there(tmp_path, route, lack):
    """Held against closed formulas: n of N samples are there, of d values each."""
    missing = lack and "zeros"
    module = made(network(missing=missing), route)
    seen = spied(tmp_path, module, make_data(1, lack=lack))
    there, samples = Counter(), 0
    for round_index in range(ROUNDS):
        for ((_, inputs, _),) in batches_of(make_data(1, lack=lack), round_index):
            samples += len(inputs)
            for holder, own in enumerate(HALVES[1]):
                there[holder] += int((~inputs[own].isnan()).all(dim=(1, 2, 3)).sum())
    assert (there[0] < there[1] < samples) == (lack is not None)
    width = 4 * values_of_holder("halves", "concat")[0]
    mask = samples if lack else 0
    by_holder = [[width * n + mask, width * n] for n in (there[0], there[1])]
    head = 4 * 8 * samples if len(ROUTES[route][0]) == 2 else 0
    labels = 0 if route == "U" else 8 * samples
    counted = Counter()
    for message in seen:
        counted[message.kind, message.cut, message.sender] += message.num_bytes
        counted[message.kind, message.cut, message.receiver] += message.num_bytes
    for holder, (up, down) in enumerate(by_holder):
        name = f"client/0.{holder}"
        assert counted["smashed", 0, name] == up
        assert counted["gradient", 0, name] == down
    assert counted["labels", 0, "client/0.0"] == labels
    assert counted["smashed", 1, "server/0"] == head
    up, down = (sum(ways) for ways in zip(*by_holder, strict=True))
    at_client = head if route == "U" else 0
    assert module.totals() == dict.fromkeys(module.totals(), 0) | {
        "uplink_bytes": up + at_client + labels,
        "downlink_bytes": down + at_client,
        "hop_bytes": 2 * (head - at_client),
    }


@pytest.mark.parametrize("route", ["server", "U"])
def test_each_holder_clips_by_itself(tmp_path, route):
    """The one with the labels its bottom and the head together."""
    limit = 0.05
    module = made(route=route, gradient_clip_val=limit, label_holder=1)
    fit(tmp_path, module, make_data(1))
    net = network()
    optimizer = SGD(net.parameters())
    _, theirs = parts_of(net, route)
    head = [p for n, p in net.named_parameters() if n.startswith(("top.2", "top.3"))]
    held = [list(bottom.parameters()) for bottom in net.bottoms]
    held[1] += head if route == "U" else []
    for round_index in range(ROUNDS):
        for ((_, inputs, targets),) in batches_of(make_data(1), round_index):
            optimizer.zero_grad()
            loss_of(net, inputs, targets).backward()
            for own in (*held, theirs):
                nn.utils.clip_grad_norm_(own, limit)
            optimizer.step()
    assert_close(state_of(module), net.state_dict())


@pytest.mark.parametrize("num_clients", [1, 3])
def test_a_holder_that_has_none_of_a_batch_does_nothing(tmp_path, num_clients):
    """Neither its weights nor its momentum nor its statistics change."""
    module = made(network("halves", "mean", "skip"))
    protocol = ParallelSplitLearning()
    data = make_data(num_clients, protocol, lack=[0.999, 0.0])
    fit(tmp_path, module, data)
    before = network("halves", "mean", "skip").state_dict()
    own = {k: v for k, v in before.items() if k.startswith("bottoms.0")}
    assert_equal({k: v for k, v in state_of(module).items() if k in own}, own)
    assert not torch.equal(state_of(module)["top.1.weight"], before["top.1.weight"])


# What holders lack.


def test_a_sample_always_lacks_the_same_parts():
    """In each round, in validation and in tests; each is with a holder at least."""
    lack = [0.2, 0.9, 0.9, 0.5]

    def data(seed=3):
        missing = MissingParts(QUADRANTS[0], lack, seed)
        source = RandomImages(800, 100)
        return SplitDataModule(source, 2, missing_parts=missing, val_share=0.5)

    def masks(loader):
        found = {}
        for batch in loader:
            parts = getattr(batch, "parts", [batch])
            for row in getattr(parts[0], "inputs", parts[0][0]):
                parts = [row[own] for own in QUADRANTS[1]]
                lacks = tuple(bool(part.isnan().all()) for part in parts)
                assert lacks == tuple(bool(part.isnan().any()) for part in parts)
                assert not all(lacks)
                known = row.nan_to_num(0).numpy().tobytes()
                assert found.setdefault(known, lacks) == lacks
        return found

    one = data()
    one.setup()
    loader = one.train_dataloader()
    first = masks(loader)
    loader.set_epoch(1)
    assert masks(loader) == first
    every = [*first.values(), *masks(one.val_dataloader()).values()]
    shares = torch.tensor(every).float().mean(dim=0)
    kept = 0.2 * 0.9 * 0.9 * 0.5 / 4  # about: one of four, where all would lack it
    torch.testing.assert_close(shares, torch.tensor(lack) - kept, rtol=0, atol=0.08)
    assert masks(one.test_dataloader()) == masks(one.test_dataloader())
    other = data(seed=4)
    other.setup()
    assert masks(other.train_dataloader()) != first


def test_the_mean_of_nothing_is_zero():
    values = [torch.ones(2, 3), torch.ones(2, 3)]
    there = [torch.tensor([False, True]), torch.tensor([False, True])]
    zeroed = [v * h[:, None] for v, h in zip(values, there, strict=True)]
    assert Mean("skip")(zeroed, there).tolist() == [[0.0] * 3, [1.0] * 3]


# Networks made of others.


@pytest.mark.parametrize("join", ["concat", "attention"])
@pytest.mark.parametrize("divided", IMAGES)
def test_any_network_can_be_made_vertical(divided, join):
    """Each holder begins with weights of its own; what is loaded fits."""
    torch.manual_seed(0)
    for make, cut, shape in (
        (DigitsCNN, "maxpool", (1, 8, 8)),
        (cifar_resnet18, "layer1", (3, 8, 8)),
    ):
        net = vertical_network(make, cut, DIVIDED[divided][0], shape, join)
        inputs = torch.rand(5, *shape)
        assert net(inputs).shape == (5, 10)
        weights = [bottom.network.conv1.weight for bottom in net.bottoms]
        assert not any(torch.equal(weights[0], other) for other in weights[1:])
        segments = split(net, "bottoms", num_holders=len(weights))
        keys = [key for segment in segments for key in segment.state_dict()]
        assert sorted(keys) == sorted(net.state_dict())
        *bottoms, top = (segment.eval() for segment in segments)
        sent = [bottom(inputs) for bottom in bottoms]
        assert torch.equal(top(*sent), net.eval()(inputs))


def test_concatenated_halves_are_the_whole_map():
    """A bottom of 1 x 1 convolutions alone does not see where an image was divided."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)]
    whole = nn.Sequential(*layers)
    for divided in IMAGES:
        parts = DIVIDED[divided][0]
        net = vertical_network(lambda: copy.deepcopy(whole), 1, parts, (1, 6, 6))
        inputs = torch.rand(5, 1, 6, 6)
        torch.testing.assert_close(net(inputs), whole(inputs))


@pytest.mark.parametrize("join", JOINS)
def test_a_table_of_uneven_columns(join):
    """Thirteen columns among three: 5, 4, 4; linear layers take what comes."""
    net = vertical_network(lambda: MLP(13, 3), "relu1", Columns(3), (13, 1, 1), join)
    widths = [bottom.network.fc1.in_features for bottom in net.bottoms]
    assert widths == [5, 4, 4]
    assert net.top.fc2.in_features == (192 if join == "concat" else 64)
    assert net(torch.rand(4, 13, 1, 1)).shape == (4, 3)


def test_tables_are_standardised_and_left_as_they_are():
    """Ten columns on each scale; a loader changes none of the numbers it is given."""
    source = SklearnTable("breast_cancer")
    table = source.load(train=True)
    assert table.inputs.shape == (455, 30, 1, 1)
    assert len(source.load(train=False).targets) == 114
    flat = table.inputs[:, :, 0, 0].double()
    assert flat.mean(dim=0).abs().max() < 1e-5
    assert (flat.std(dim=0, correction=0) - 1).abs().max() < 1e-5
    missing = MissingParts(Columns(2), 0.5)
    data = SplitDataModule(source, 1, mean=[1.0], std=[2.0], missing_parts=missing)
    kept = table.inputs.clone()
    source.load = lambda train: table
    data.setup()
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert all(list(loader) for loader in loaders)
    torch.testing.assert_close(data.example(), (kept[:1] - 1) / 2)
    assert torch.equal(table.inputs, kept)


# Runs.


@pytest.mark.parametrize("missing", [None, "skip"])
@pytest.mark.parametrize("route", ["server", "U"])
def test_a_run_that_was_stopped_goes_on(tmp_path, route, missing):
    def make():
        return made(network("halves", "mean", missing), route), make_data(
            lack=missing and 0.2
        )

    check(tmp_path, make, (2, 7), [partial(RoundRobinWeightPassing, local_steps=1)])


def test_a_run_does_not_go_on_where_holders_lack_others(tmp_path):
    from split_lightning.callbacks import ResumeCheckpoint

    net = network("halves", "mean", "skip")
    callbacks = [RoundRobinWeightPassing(), ResumeCheckpoint(tmp_path)]
    fit(tmp_path, made(net), make_data(3, lack=0.2), callbacks, rounds=1)
    with pytest.raises(ValueError, match=r"missing_parts=.*0\.2.*but got.*0\.3"):
        fit(
            tmp_path,
            made(net),
            make_data(lack=0.3),
            callbacks,
            ckpt_path=tmp_path / "last.ckpt",
        )


# Virtual time: two holders, whose devices and links are not alike.


class FourSpeeds(System):
    """Device d computes, sends and receives d + 1 times as fast as device 0."""

    def _draw(self, client_id):
        device = super()._draw(client_id)
        times = client_id + 1
        return device._replace(
            flops=device.flops * times,
            uplink=device.uplink * times,
            downlink=device.downlink * times,
        )


OF_HOLDERS = [(40, 40), (20, 20)]  # bytes of a sample, forth and back
WORKS = [Work(10, 20), Work(40, 40), Work(100, 200), Work(10, 20)]


def send(clock, kind, sender, receiver, num_bytes, place=0):
    payload = (torch.empty(num_bytes, dtype=torch.uint8, device="meta"),)
    clock(Message(kind, sender, receiver, payload, 0, place))


def one_step(has_head):
    """A sample of client 0, whose holder 1 may have the head: the clock behind it."""
    system = FourSpeeds(10, 100, uplink=80, downlink=160, latency=0.5)
    clock = Clock(system, WORKS.__getitem__, num_holders=2)
    names = ["client/0.0", "client/0.1"]
    for holder, name in enumerate(names):
        clock(Computed(name, holder, "forward", 1))
    for name, (up, _) in zip(names, OF_HOLDERS, strict=True):
        send(clock, "smashed", name, "server/0", up)
    clock(Computed("server/0", 2, "forward", 1))
    if has_head:
        send(clock, "smashed", "server/0", names[1], 20, place=1)
        clock(Computed(names[1], 3, "forward", 1))
        clock(Computed(names[1], 3, "backward", 1))
        send(clock, "gradient", names[1], "server/0", 40, place=1)
    clock(Computed("server/0", 2, "backward", 1))
    for name, (_, down) in zip(names, OF_HOLDERS, strict=True):
        send(clock, "gradient", "server/0", name, down)
    for holder, name in enumerate(names):
        clock(Computed(name, holder, "backward", 1))
    return clock


def test_holders_compute_and_send_at_the_same_time():
    """A sample of client 0: forward 1 and 2 s, 40 and 20 bytes up 0.5 + 4 and 0.5 + 1.

    The server begins when the later one is there, after 5.5 s, and computes 3 s; then
    0.5 + 2 and 0.5 + 0.5 down, 2 and 2 s of backward.
    """
    clock = one_step(has_head=False)
    ready = {"server/0": 5.5 + 3, "client/0.0": 8.5 + 4.5, "client/0.1": 8.5 + 3}
    assert clock.ready == pytest.approx(ready)
    # Each holder sends its weights to its own like.
    for holder, num_bytes in enumerate((10, 30)):
        ends = f"client/0.{holder}", f"client/1.{holder}"
        send(clock, "weights", *ends, num_bytes)
    assert clock.ready["client/1.0"] == pytest.approx(13 + (0.5 + 1) + (0.5 + 0.5 / 3))
    assert clock.ready["client/1.1"] == pytest.approx(
        11.5 + (0.5 + 1.5) + (0.5 + 1.5 / 4)
    )
    for holder, num_bytes in enumerate((10, 30)):
        send(clock, "weights", f"client/0.{holder}", AGGREGATOR, num_bytes)
    for holder, num_bytes in enumerate((10, 30)):
        send(clock, "weights", AGGREGATOR, f"client/0.{holder}", num_bytes)
    made = max(13 + 0.5 + 1, 11.5 + 0.5 + 1.5)
    assert clock.ready["client/0.0"] == pytest.approx(made + 0.5 + 0.5)
    assert clock.ready["client/0.1"] == pytest.approx(made + 0.5 + 0.75)


def test_what_is_behind_the_last_cut_is_with_one_holder():
    """Holder 1 gets 20 bytes (0.5 + 0.5), computes 0.5 + 1, sends 40 (0.5 + 2)."""
    there = 5.5 + 1 + 1 + 1.5 + 2.5 + 2
    ready = {"server/0": there, "client/0.0": there + 4.5, "client/0.1": there + 3}
    assert one_step(has_head=True).ready == pytest.approx(ready)


@pytest.mark.parametrize("holder", [0, 1])
def test_the_clock_of_a_run(tmp_path, holder):
    """Added up by hand, from what each holder sends; labels go along with one's."""
    system = System([1e5, 1e6], 1e6, [1e4, 1e5], [1e5, 1e6], latency=0.01, seed=5)
    module = made(label_holder=holder)
    clock = VirtualClock(system)
    fit(tmp_path, module, make_data(1), [clock])
    bottom = bottom_of("halves", 0)
    (mine,) = work_of({"bottom": bottom}, torch.rand(1, 1, 6, 3))
    (theirs,) = work_of(
        {"top": network().top}, torch.rand(1, 4, 6, 6, requires_grad=True)
    )
    width, ready = 4 * 4 * 18, [0.0, 0.0]
    for round_index in range(ROUNDS):
        for ((_, _, targets),) in batches_of(make_data(1), round_index):
            count, there = len(targets), []
            for number in range(2):
                device = system.client(number)
                sent = count * (width + (8 if number == holder else 0))
                ready[number] += count * mine.forward / device.flops
                there.append(ready[number] + device.sends(sent))
            end = max(there) + count * sum(theirs) / system.server_flops
            for number in range(2):
                device = system.client(number)
                back = count * mine.backward / device.flops
                ready[number] = end + device.receives(count * width) + back
    assert clock.seconds == pytest.approx(max(ready))


# What is refused.


class TwoStreams(nn.Module):
    """Branches that share a layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.top = nn.Linear(8, 3)

    def forward(self, inputs):
        one = self.layer(inputs.flatten(1)[:, :4])
        return self.top(torch.cat([one, self.layer(inputs.flatten(1)[:, 4:8])], dim=1))


TWO = (SGD, SGD, 3)
TOP = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
SHARED = bottom_of("halves", 0)
REFUSED = {
    "a cut behind the join": (
        lambda: SplitLightningModule(network(), "top.1", *TWO),
        r"as many branches .* as there are holders \(2\).*there are 1.*`bottoms`",
    ),
    "a shared layer": (
        lambda: split(TwoStreams(), "layer", num_holders=2),
        "holders to share no layer, but two of them use `layer`",
    ),
    "a shared bottom": (
        lambda: made(VerticalNetwork(HALVES[0], [SHARED] * 2, Mean(), TOP)),
        "holders to share no layer",
    ),
    "too few bottoms": (
        lambda: VerticalNetwork(QUADRANTS[0], [SHARED], Mean(), nn.Flatten()),
        "one for each of 4 holders, but got 1",
    ),
    "no such holder": (
        lambda: made(label_holder=2),
        "`label_holder` to be one of a client's holders, from 0 to 1, but got 2",
    ),
    "labels without a head": (
        lambda: SplitLightningModule(network(), "bottoms", *TWO, labels="client"),
        "at least two layers where labels stay",
    ),
    "no pixels": (
        lambda: vertical_network(DigitsCNN, "maxpool", Tiles(9, 1), (1, 8, 8)),
        "each part of an image to have pixels: at most 8 rows and 8 columns",
    ),
    "more holders than columns": (
        lambda: vertical_network(lambda: MLP(3, 2), "relu1", Columns(4), (3, 1, 1)),
        "at most 3 holders.*but got 4",
    ),
    "sizes that do not add up": (
        lambda: vertical_network(
            lambda: MLP(3, 2), "relu1", Columns(sizes=[1, 1]), (3, 1, 1)
        ),
        r"add up to the table's columns \(3\).*which are 2",
    ),
    "one tile": (lambda: Tiles(1, 1), "at least two tiles"),
    "no columns": (lambda: Columns(1), "at least two holders with a column each"),
    "neither": (Columns, "one of the arguments `num_holders` and `sizes`"),
    "no such join": (
        lambda: vertical_network(DigitsCNN, "maxpool", Tiles(1, 2), (1, 8, 8), "max"),
        r"`join` to be one of \('concat', 'sum', 'mean', 'attention'\), but got 'max'",
    ),
    "no rule for it": (
        lambda: network(missing="skip"),
        "`missing` to be 'zeros' where the join is 'concat'.*but got 'skip'",
    ),
    "no such rule": (
        lambda: VerticalNetwork(HALVES[0], [SHARED] * 2, Mean(), SHARED, "ones"),
        r"`missing` to be one of \('zeros', 'skip'\)",
    ),
    "parts of other sizes in a sum": (
        lambda: vertical_network(DigitsCNN, "relu1", Tiles(1, 3), (1, 8, 8), "sum"),
        "holders' values to be of one shape.*join='concat'",
    ),
    "a bottom that does not fit": (
        lambda: vertical_network(DigitsCNN, "maxpool", Tiles(1, 8), (1, 8, 8)),
        "whose layers up to `maxpool`.*Use another cut layer",
    ),
    "a probability": (
        lambda: MissingParts(HALVES[0], 1.0),
        r"in \[0, 1\), but got 1.0",
    ),
    "three probabilities": (
        lambda: MissingParts(HALVES[0], [0.1] * 3),
        "one for each of 2 holders",
    ),
    "no such table": (lambda: SklearnTable("iris"), "`name` to be one of.*'iris'"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make()


UNFIT = {
    "an augmentation": (
        {},
        {"augmentation": RandomHorizontalFlip()},
        "would move pixels from one holder to another",
    ),
    "no rule": ({}, {"lack": 0.2}, "has no rule for that.*missing='zeros'"),
    "other parts": (
        {"net": network("quadrants", "mean", "skip")},
        {"lack": 0.2},
        "Give both the same `parts`",
    ),
    "joint statistics": (
        {"net": network("halves", "mean", "skip")},
        {"lack": 0.2, "protocol": GPSL()},
        "`joint_norm` to be False where holders lack samples",
    ),
}


@pytest.mark.parametrize(("own", "of_data", "message"), UNFIT.values(), ids=UNFIT)
def test_data_that_do_not_go_with_it_are_refused(tmp_path, own, of_data, message):
    with pytest.raises(MisconfigurationException, match=f"(?s){message}"):
        fit(tmp_path, made(**own), make_data(**of_data))


@pytest.mark.parametrize("experiment", ["vertical", "vertical_table"])
def test_an_experiment_is_tested_again_and_taken_away(
    monkeypatch, tmp_path, experiment
):
    """From the run's folder alone, with the same figures."""
    words = [f"+experiment={experiment}", "rounds=1", "callbacks=figures"]
    (folder,) = command(monkeypatch, tmp_path, *words, pictures=True)
    results = json.loads((folder / "results.json").read_text())
    assert results["handoff_bytes"] == 0
    evaluate_main([f"run={folder}"])
    again = json.loads((folder / "evaluation" / "results.json").read_text())
    assert again["test_accuracy"] == results["test_accuracy"]
    assert again["test_loss"] == results["test_loss"]
    export_main([f"run={folder}", "format=[safetensors,torch]"])
    assert (folder / "export" / "client.pt2").is_file()


MISTAKES = {
    "a rule without a probability": (
        ["topology=vertical", "topology.missing=zeros"],
        "would change nothing without `topology.missing_parts.probability`",
    ),
    "a probability without a rule": (
        ["topology=vertical", "topology.missing_parts.probability=0.1"],
        "has no rule for that",
    ),
    "no holders": (["topology.join=mean"], "`topology.join=mean` would change"),
    "no holder to have the labels": (
        ["topology.label_holder=1"],
        "(protocol=round_robin, topology=vanilla) uses `topology.label_holder`",
    ),
    "bottoms that end at several layers": (
        ["topology=vertical", "model.cut_layer=[relu1,maxpool]"],
        "`model.cut_layer` to be of type str or int, as "
        "split_lightning.models.vertical_network takes it, but got ['relu1', ",
    ),
    "a table in halves": (
        ["topology=vertical", "data=wine", "model=mlp"],
        "`topology/parts=columns`",
    ),
    "a head and a server that trains first": (
        ["topology=vertical_u", "protocol=cyclesl"],
        "one layer where the server trains first",
    ),
    "no split network": (
        ["topology=vertical", "protocol=fedavg"],
        "leave `topology` out",
    ),
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.values(), ids=MISTAKES)
def test_words_that_do_not_go_together(monkeypatch, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, *words)
    assert message in capsys.readouterr().err


def test_the_cuts_of_parts_are_not_listed(capsys):
    with pytest.raises(SystemExit):
        cuts_main(["+experiment=vertical"])
    assert "Expected a topology of whole samples" in capsys.readouterr().err


QUICK = ["rounds=1", "num_clients=3", "trainer.limit_train_batches=6"]


VERTICAL = ["topology=vertical"]
WITH_HEAD = [
    "topology=vertical_u",
    "topology/parts=quadrants",
    "topology.join=attention",
]


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        ("parallel", VERTICAL),
        ("gpsl", WITH_HEAD),
        ("cyclesl", VERTICAL),
        ("splitfed_v1", WITH_HEAD),
        ("splitfed_v2", VERTICAL),
        ("splitfed_v3", WITH_HEAD),
        ("multi_server", VERTICAL),
    ],
)
def test_the_command_line(monkeypatch, tmp_path, words, protocol):
    (folder,) = command(monkeypatch, tmp_path, f"protocol={protocol}", *words, *QUICK)
    results = json.loads((folder / "results.json").read_text())
    labels = results["uplink_bytes"] - results["downlink_bytes"]
    assert (labels > 0) == (words is VERTICAL)
