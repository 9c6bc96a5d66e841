"""`Party`: its two backward passes, against autograd through the whole network."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from split_lightning.party import Party, step
from split_lightning.store import Seat
from split_lightning.task import Task

SIZES = [3, 2]


class Permuting(nn.Module):
    """Its gradient comes back with its dimensions permuted."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, maps):
        return self.head(maps.permute(0, 2, 3, 1).tanh().mean((1, 2)))


class Both(nn.Module):
    """Sends two tensors and a size; of one of them nothing has a gradient."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, images):
        return self.conv(images), images > 0, images.shape[-1]


class Taking(Permuting):
    def forward(self, maps, mask, size):
        return super().forward(maps * mask * size)


def lower():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


PAIRS = {"one tensor": (lower, Permuting), "several values": (Both, Taking)}


def made(name, module, place, **options):
    seat = Seat(module, name.partition("/")[0])
    return Party(name, {place: seat}, Task(3), **options)


def drawn(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 6, 6, generator=generator)
    return images, torch.randint(3, (count,), generator=generator)


def assert_gradients(module, expected):
    for one, other in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("name", PAIRS)
def test_two_stages_are_one_backward_pass(name):
    """Two batches are in flight; each is named by its step."""
    torch.manual_seed(1)
    below, above = (make() for make in PAIRS[name])
    expected = copy.deepcopy(below), copy.deepcopy(above)
    client, server = made("client/0", below, 0), made("server/0", above, 1)
    batches = {number: drawn(5, number) for number in (7, 8)}
    sent = {}
    for number, (images, _) in batches.items():
        (sent[number],) = client.forward((number, 0), [(images,)], [5])
        assert all(v.grad_fn is None for v in sent[number] if torch.is_tensor(v))
    for number, (images, targets) in batches.items():
        server.forward((number, 1), [sent[number]], [5])
        losses = server.loss((number, 1), [targets])
        client.backward((number, 0), losses.gradients)
        values = expected[0](images)
        logits = expected[1](*(values if isinstance(values, tuple) else (values,)))
        loss = cross_entropy(logits, targets)
        loss.backward()
        assert torch.equal(losses.total, loss)
        assert [own.item() for own in losses.own] == [loss.item()]
    assert_gradients(below, expected[0])
    assert_gradients(above, expected[1])
    assert not client.calls
    assert not server.calls


def test_a_gradient_keeps_the_strides_that_autograd_gave_it():
    torch.manual_seed(1)
    above, smashed = Permuting(), torch.randn(5, 4, 6, 6)
    targets = drawn(5)[1]
    server = made("server/0", above, 1)
    server.forward((0, 1), [(smashed.detach().requires_grad_(),)], [5])
    ((gradient,),) = server.loss((0, 1), [targets]).gradients
    leaf = smashed.detach().requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(above(leaf), targets), leaf)
    assert torch.equal(gradient, expected)
    assert gradient.stride() == expected.stride() != smashed.stride()


def test_clients_that_meet_are_one_batch():
    """Each gets back its slice of the gradient of one mean loss over all samples."""
    torch.manual_seed(1)
    above, (values, targets) = Permuting(), (torch.randn(5, 4, 6, 6), drawn(5)[1])
    parts = [(own.detach().requires_grad_(),) for own in values.split(SIZES)]
    server = made("server/0", above, 1)
    server.forward((0, 1), parts, SIZES)
    losses = server.loss((0, 1), targets.split(SIZES))
    own, leaf = copy.deepcopy(above), values.clone().requires_grad_()
    own.zero_grad()
    logits = own(leaf)
    cross_entropy(logits, targets).backward()
    assert_gradients(above, own)
    pairs = zip(logits.split(SIZES), targets.split(SIZES), strict=True)
    expected = torch.stack([cross_entropy(*pair) for pair in pairs])
    torch.testing.assert_close(torch.stack(losses.own), expected)
    for (gradient,), part in zip(losses.gradients, leaf.grad.split(SIZES), strict=True):
        assert torch.equal(gradient, part)


def test_shares_weigh_the_gradient_of_a_party_and_not_what_it_sends_back():
    torch.manual_seed(1)
    below, own = lower(), lower()
    own.load_state_dict(below.state_dict())
    client = made("client/all", below, 0, normalisation="by_client")
    parts = [(part.requires_grad_(),) for part in drawn(5)[0].split(SIZES)]
    sent = client.forward((0, 0), parts, SIZES)
    slopes = [(torch.randn_like(value),) for (value,) in sent]
    shares = [torch.tensor(0.6), torch.tensor(0.4)]
    found = client.backward((0, 0), slopes, shares)
    for (part,), (slope,), (gradient,), share in zip(
        parts, slopes, found, shares, strict=True
    ):
        leaf = part.detach().requires_grad_()
        own(leaf).backward(slope * share)
        torch.testing.assert_close(gradient, leaf.grad / share)
    pairs = zip(below.parameters(), own.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_what_needs_no_gradient_gets_none():
    """Of several clients only those that train; sizes cannot be joined."""
    server = made("server/0", Permuting(), 1)
    parts = [(torch.randn(n, 4, 6, 6).requires_grad_(n == 2),) for n in SIZES]
    server.forward((0, 1), parts, SIZES)
    first, second = server.loss((0, 1), drawn(5)[1].split(SIZES)).gradients
    assert first == (None,)
    assert second[0].shape == (2, 4, 6, 6)
    frozen = made("client/0", lower().requires_grad_(False), 0)
    ((value,),) = frozen.forward((0, 0), [(drawn(5)[0],)], [5])
    assert not value.requires_grad
    frozen.backward((0, 0), [(None,)])
    both = made("server/0", Taking(), 1)
    several = [(torch.zeros(2, 4, 6, 6), torch.zeros(2, 1, 6, 6), 6)] * 2
    with pytest.raises(ValueError, match="only tensors to cross the cut where clients"):
        both.forward((0, 1), several, [2, 2])


def test_live_parameters_get_the_gradient_of_older_ones():
    torch.manual_seed(1)
    old, live = lower(), lower()
    stash = {0: {name: p.detach().clone() for name, p in old.named_parameters()}}
    client = made("client/0", live, 0, stash=stash)
    images = drawn(5)[0]
    ((value,),) = client.forward((0, 0), [(images,)], [5])
    client.backward((0, 0), [(torch.ones_like(value),)])
    outputs = old(images)
    assert torch.equal(value, outputs)
    outputs.sum().backward()
    assert_gradients(live, old)


def test_parties_step_and_clip_by_themselves():
    """Those of a role that is not on the route do not step."""
    modules = {name: nn.Linear(2, 2) for name in ("client/0", "client/1", "server/0")}
    before = copy.deepcopy(modules)
    parties = [made(name, module, 0) for name, module in modules.items()]
    clients = [*modules["client/0"].parameters(), *modules["client/1"].parameters()]
    servers = modules["server/0"].parameters()
    optimizers = {
        "client": torch.optim.SGD(clients, lr=1.0),
        "server": torch.optim.SGD(servers, lr=1.0),
    }
    for module in modules.values():
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, 3.0)
    step(parties[:2], optimizers, lambda own: nn.utils.clip_grad_norm_(own, 1.0))
    for name in ("client/0", "client/1"):
        pairs = zip(modules[name].parameters(), before[name].parameters(), strict=True)
        for one, other in pairs:
            expected = torch.full_like(one, 6**-0.5)  # six numbers, of norm 1
            torch.testing.assert_close(other - one, expected)
            assert one.grad is None
    assert torch.equal(modules["server/0"].weight, before["server/0"].weight)
    assert modules["server/0"].weight.grad is not None
