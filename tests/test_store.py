"""`StateStore`: which party has which state; moving one copies nothing."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from split_lightning.spill import SpillFolder
from split_lightning.store import PARTS, WEIGHTS, Seat, StateStore, tensors_in

MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
CLIENTS = [f"client/{k}" for k in range(3)]


def segment():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def made(num_seats=1, at_rest=dict):
    """A store with an optimizer, as an engine makes it."""
    seats = [Seat(segment(), "client") for _ in range(num_seats)]
    store = StateStore(0, seats, at_rest)
    parameters = [p for seat in seats for p in seat.module.parameters()]
    store.optimizers = {"client": MOMENTUM(parameters)}
    store.remember_start()
    return store


def train(store, name, seed):
    """A step of a party; draws its numbers from a seed."""
    module = store.check_out([name])[name].module
    step(module, store.optimizers["client"], seed)
    return module


def step(module, optimizer, seed):
    drawn = torch.Generator().manual_seed(seed)
    module(torch.randn(6, 4, generator=drawn)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(store, name):
    """A copy of all that a party has."""
    return {part: copy.deepcopy(dict(store.peek(name, part))) for part in PARTS}


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("spills", [False, True])
def test_parties_in_turn_are_as_if_each_had_a_copy(tmp_path, spills):
    """Parameters, buffers and momentum, over several turns of each."""
    folder = SpillFolder(tmp_path / "rest")
    folder.open()
    store = made(at_rest=folder.store if spills else dict)
    copies = {name: segment() for name in CLIENTS}
    optimizers = {name: MOMENTUM(own.parameters()) for name, own in copies.items()}
    for number, name in enumerate([*CLIENTS, *CLIENTS, "client/1", "client/0"]):
        train(store, name, number)
        step(copies[name], optimizers[name], number)
    for name in CLIENTS:
        assert_same(store.weights_of(name), dict(copies[name].state_dict()))
        momenta = optimizers[name].state_dict()["state"].values()
        assert_same([*store.peek(name, "optimizer").values()], [*momenta])
    assert any((tmp_path / "rest").rglob("*.*")) == spills
    folder.close()
    assert not (tmp_path / "rest").exists()


def test_a_live_state_moves_by_its_name_alone():
    store = made()
    module = train(store, "client/0", 0)
    state = store.optimizers["client"].state
    tensors = [
        *module.state_dict().values(),
        *tensors_in(dict(enumerate(state.values()))),
    ]
    addresses = [tensor.data_ptr() for tensor in tensors]
    expected = state_of(store, "client/0")
    store.move("client/0", "client/1", PARTS)
    assert store.check_out(["client/1"])["client/1"].module is module
    tensors = [
        *module.state_dict().values(),
        *tensors_in(dict(enumerate(state.values()))),
    ]
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    assert_same(state_of(store, "client/1"), expected)
    assert store.names() == ["client/1"]


def test_a_state_at_rest_moves_as_the_same_object():
    store = made()
    train(store, "client/0", 0)
    train(store, "client/1", 1)
    at_rest = {part: store.own[part]["client/0"] for part in PARTS}
    store.move("client/0", "client/2", PARTS)
    for part in PARTS:
        assert store.own[part]["client/2"] is at_rest[part]
        assert "client/0" not in store.own[part]


def test_a_state_at_rest_moves_to_a_party_that_is_live():
    store = made()
    train(store, "client/0", 0)
    train(store, "client/1", 1)
    sent = state_of(store, "client/0")
    store.move("client/0", "client/1", PARTS)
    assert_same(state_of(store, "client/1"), sent)
    store.check_out(["client/1"])
    assert_same(state_of(store, "client/1"), sent)
    assert store.names() == ["client/1"]


@pytest.mark.parametrize("policy", ["keep", "travel", "reset"])
def test_what_moves_with_the_weights(policy):
    """A policy is which parts move, and which are dropped."""
    store = made()
    train(store, "client/1", 1)
    before = state_of(store, "client/1")["optimizer"]
    train(store, "client/0", 0)
    sent = state_of(store, "client/0")
    store.move("client/0", "client/1", PARTS if policy == "travel" else WEIGHTS)
    if policy == "reset":
        store.drop("client/1", ["optimizer"])
    store.check_out(["client/1"])
    found = state_of(store, "client/1")
    expected = {"keep": before, "travel": sent["optimizer"], "reset": {}}[policy]
    assert_same(found, sent | {"optimizer": expected})


def test_states_at_rest_are_never_modified():
    store = made()
    train(store, "client/0", 0)
    train(store, "client/1", 1)
    at_rest = [store.common["client"], {p: store.own[p]["client/0"] for p in PARTS}]
    kept, copies = list(at_rest), copy.deepcopy(at_rest)
    for number, name in enumerate(["client/2", "client/1", "client/2"]):
        train(store, name, number)
    assert_same(kept, copies)
    assert all(store.own[part]["client/0"] is kept[1][part] for part in PARTS)


def test_a_thousand_clients_that_start_alike_cost_one_state():
    store, names = made(), [f"client/{k}" for k in range(1000)]
    for name in names:
        assert store.origin(name) is None
        store.adopt(name, WEIGHTS)
    tensors = {id(t) for own in store.own["parameters"].values() for t in own.values()}
    assert len(store.own["parameters"]) == 1000
    assert len(tensors) == 4  # a weight and a bias of each layer
    train(store, "client/0", 0)
    for name in names[1:]:
        assert store.peek(name, "parameters") is store.common["client"]["parameters"]


def test_a_mean_is_one_state_for_all():
    store = made()
    train(store, "client/0", 0)
    train(store, "client/1", 1)
    mean = {"0.weight": torch.ones(4, 4), "0.bias": torch.ones(4)}
    mean |= {name: torch.full((4,), 2.0) for name in ("1.weight", "1.bias")}
    store.share("parameters", mean, ["client"])
    for name in CLIENTS:
        assert store.peek(name, "parameters") is mean
        assert not store.has_own(name, "parameters")
    assert store.has_own("client/0", "buffers")
    assert torch.equal(store.seats[0].module[0].weight, torch.ones(4, 4))
    train(store, "client/2", 2)
    assert torch.equal(mean["0.weight"], torch.ones(4, 4))


def test_parties_of_one_step_have_a_seat_each():
    store = made(num_seats=2)
    seats = store.check_out(["client/0", "client/1"])
    assert seats["client/0"].module is not seats["client/1"].module
    again = store.check_out(["client/2", "client/1"])
    assert again["client/1"] is seats["client/1"]  # stays where it is
    assert again["client/2"] is seats["client/0"]
    with pytest.raises(RuntimeError, match=r"3 parties train at once.*room for 2"):
        store.check_out(CLIENTS)


def test_it_continues_from_a_state_dict():
    """With the live segment and its optimizer, which a checkpoint has besides."""
    store, other = made(), made()
    for number, name in enumerate([*CLIENTS, "client/1"]):
        train(store, name, number)
    state = copy.deepcopy(store.state_dict())
    other.load_state_dict(state)
    other.seats[0].module.load_state_dict(store.seats[0].module.state_dict())
    optimizer = store.optimizers["client"].state_dict()
    other.optimizers["client"].load_state_dict(copy.deepcopy(optimizer))
    for number, name in enumerate(["client/2", "client/0", "client/1"]):
        for own in (store, other):
            train(own, name, 10 + number)
    for name in CLIENTS:
        assert_same(state_of(other, name), state_of(store, name))
    store.forget()
    assert not store.names()
