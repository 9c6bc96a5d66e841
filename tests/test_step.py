"""A training step: who sends what to whom, and the gradients of the unsplit network."""

import copy

import pytest
import torch
from protocols import loss_of, network
from torch import nn
from torch.nn.functional import cross_entropy

from split_lightning import ParallelSplitLearning, SplitFedV1, SplitLightningModule
from split_lightning.data.loader import ClientBatch
from split_lightning.models import VerticalNetwork
from split_lightning.models.joins import Sum
from split_lightning.models.parts import Tiles

SGD = torch.optim.SGD


def vertical():
    torch.manual_seed(3)
    bottoms = [nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh()) for _ in range(2)]
    top = nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    return VerticalNetwork(Tiles(1, 2), bottoms, Sum(), top)


# The network, where to cut and further arguments; each message of a step of client 1.
STEPS = {
    "one cut": (
        network, 2, {},
        ["smashed client/1 server/0", "labels client/1 server/0",
         "gradient server/0 client/1"],
    ),
    "U": (
        network, [2, 5], {"labels": "client"},
        ["smashed client/1 server/0", "smashed server/0 client/1",
         "gradient client/1 server/0", "gradient server/0 client/1"],
    ),
    "hops": (
        network, [0, 2, 6], {},
        ["smashed client/1 server/0", "labels client/1 server/2",
         "smashed server/0 server/1", "smashed server/1 server/2",
         "gradient server/2 server/1", "gradient server/1 server/0",
         "gradient server/0 client/1"],
    ),
    "U over hops": (
        network, [0, 2, 6], {"labels": "client"},
        ["smashed client/1 server/0", "smashed server/0 server/1",
         "smashed server/1 client/1", "gradient client/1 server/1",
         "gradient server/1 server/0", "gradient server/0 client/1"],
    ),
    "a deeper cut than others": (
        network, [[0, 2]], {},
        ["smashed client/1 server/0", "labels client/1 server/0",
         "gradient server/0 client/1"],
    ),
    "holders": (
        vertical, "bottoms", {"label_holder": 1},
        ["smashed client/1.0 server/0", "smashed client/1.1 server/0",
         "labels client/1.1 server/0", "gradient server/0 client/1.0",
         "gradient server/0 client/1.1"],
    ),
    "holders, one with a head": (
        vertical, ["bottoms", "top.1"], {"labels": "client", "label_holder": 1},
        ["smashed client/1.0 server/0", "smashed client/1.1 server/0",
         "smashed server/0 client/1.1", "gradient client/1.1 server/0",
         "gradient server/0 client/1.0", "gradient server/0 client/1.1"],
    ),
}  # fmt: skip


def batch_of(client, count=4):
    drawn = torch.Generator().manual_seed(client)
    images = torch.randn(count, 1, 6, 6, generator=drawn)
    targets = torch.randint(3, (count,), generator=drawn)
    return ClientBatch(client, images, targets, ends_turn=True)


def computed(net, cut_layer, batches, protocol, **options):
    """Computes a step; returns the module and the messages."""
    module, seen = SplitLightningModule(net, cut_layer, SGD, SGD, 3, **options), []
    module.follow(protocol, num_clients=2)
    module.channel.observers.append(seen.append)
    module.engine.compute(batches)
    return module, seen


def words(messages):
    return [" ".join(message[:3]) for message in messages]


@pytest.mark.parametrize(
    ("make", "cut_layer", "options", "expected"), STEPS.values(), ids=STEPS
)
def test_messages_and_gradients_of_a_step(make, cut_layer, options, expected):
    net, batch = make(), batch_of(1)
    module, seen = computed(
        copy.deepcopy(net), cut_layer, [batch], ParallelSplitLearning(), **options
    )
    assert words(seen) == expected
    loss_of(net, batch.inputs, batch.targets).backward()
    found = {}
    for segment in module.segments(1).values():
        found |= {name: p.grad for name, p in segment.named_parameters()}
    for name, parameter in net.named_parameters():
        assert torch.equal(found[name], parameter.grad), name
    if options.get("labels") == "client":
        assert all(v.is_floating_point() for message in seen for v in message.payload)
    else:
        (labels,) = (message for message in seen if message.kind == "labels")
        assert labels.payload[0] is batch.targets


def test_clients_that_act_together_send_one_after_the_other():
    batches = [batch_of(0, 3), batch_of(1, 4)]
    _, seen = computed(network(), 2, batches, ParallelSplitLearning())
    assert words(seen) == [
        "smashed client/0 server/0",
        "labels client/0 server/0",
        "smashed client/1 server/0",
        "labels client/1 server/0",
        "gradient server/0 client/0",
        "gradient server/0 client/1",
    ]
    assert [message.num_bytes for message in seen[:2]] == [3 * 4 * 4 * 36, 3 * 8]


def test_clients_with_one_state_step_by_the_mean_of_their_gradients():
    """In a U-shape each has a loss of its own; the server sees them as one batch."""
    net, batches = network(), [batch_of(0, 3), batch_of(1, 4)]
    copies = [copy.deepcopy(net) for _ in batches]
    module = SplitLightningModule(
        copy.deepcopy(net), [2, 5], SGD, SGD, 3, labels="client"
    )
    module.follow(ParallelSplitLearning(every="step"), num_clients=2)
    losses = module.engine.compute(batches)
    smashed = [
        own[:3](batch.inputs) for own, batch in zip(copies, batches, strict=True)
    ]
    behind = net[3:6](torch.cat(smashed)).split([3, 4])
    own = [
        cross_entropy(each[6:](values), batch.targets)
        for each, values, batch in zip(copies, behind, batches, strict=True)
    ]
    mean = 3 / 7 * own[0] + 4 / 7 * own[1]
    mean.backward()
    assert losses.total.item() == pytest.approx(mean.item())
    theirs = [dict(each.named_parameters()) for each in copies]
    expected = {
        k: 3 / 7 * theirs[0][k].grad + 4 / 7 * theirs[1][k].grad
        for k in theirs[0]
        if not k.startswith("5.")
    }
    expected |= {f"5.{k}": p.grad for k, p in net[5].named_parameters()}
    for segment in module.segments(0).values():
        for name, parameter in segment.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name])


def test_clients_of_other_servers_do_not_act_together():
    with pytest.raises(ValueError, match="clients of a step to share a server"):
        computed(network(), 2, [batch_of(0), batch_of(1)], SplitFedV1())
