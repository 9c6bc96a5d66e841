"""Weights from elsewhere: equal to the file's, or an error that names what differs."""

import copy
from collections import OrderedDict

import pytest
import torch
from conftest import tiny_network
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from split_lightning.models import load_weights, merge, split

SAVERS = {"pth": torch.save, "safetensors": save_file}


@pytest.fixture(params=SAVERS)
def saved(request, tmp_path):
    """Returns a function that saves a state dict, and returns the file."""

    def save(state):
        path = tmp_path / f"weights.{request.param}"
        SAVERS[request.param](state, path)
        return path

    return save


def test_the_segments_have_the_tensors_of_the_file(saved):
    torch.manual_seed(1)
    state = resnet18(num_classes=10).state_dict()
    network = resnet18(num_classes=10)
    load_weights(network, saved(state))
    client, server = split(network, "layer2.0.conv1")
    merged = merge(client, server)
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[key], state[key]) for key in state)
    assert not merged["fc.weight"].equal(resnet18(num_classes=10).fc.weight)


def test_what_is_excluded_keeps_its_random_start(saved):
    state = tiny_network(num_classes=7).state_dict()
    network = tiny_network(num_classes=3)
    before = copy.deepcopy(network.state_dict())
    load_weights(network, saved(state), weights_exclude=["6"])
    after = network.state_dict()
    for key in after:
        kept = key.startswith("6.")
        assert torch.equal(after[key], before[key] if kept else state[key]), key
    assert not torch.equal(before["0.weight"], state["0.weight"])


def test_what_only_the_file_has_can_be_excluded_too(saved):
    state = {**tiny_network().state_dict(), "extra.weight": torch.ones(2)}
    network = tiny_network()
    load_weights(network, saved(state), weights_exclude=["extra"])
    assert torch.equal(network[0].weight, state["0.weight"])


def test_a_file_from_before_batch_norm_counted_fits(saved):
    state = tiny_network().state_dict()
    del state["1.num_batches_tracked"]
    if state.__dict__:
        state._metadata["1"]["version"] = 1
    network = tiny_network()
    load_weights(network, saved(state))
    assert torch.equal(network[6].weight, state["6.weight"])


def test_tied_weights_stay_tied(saved):
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    state = {k: v.clone() + 1 for k, v in network.state_dict().items()}
    load_weights(network, saved(state))
    assert network[0].weight is network[1].weight
    assert torch.equal(network[1].weight, state["1.weight"])


def _without(state, key):
    return OrderedDict((k, v) for k, v in state.items() if k != key)


WRONG = {
    "missing": (
        lambda state: _without(state, "6.bias"),
        r"`6\.bias` is missing.*weights_exclude=\[6\]",
    ),
    "unexpected": (
        lambda state: {**state, "aux.weight": torch.ones(2)},
        r"`aux\.weight` is not in the network.*weights_exclude=\[aux\]",
    ),
    "shape": (
        lambda state: tiny_network(num_classes=7).state_dict(),
        r"`6\.weight` is \(7, 36\), not \(3, 36\).*weights_exclude=\[6\]",
    ),
    "prefix": (
        lambda state: {f"module.{k}": v for k, v in state.items()},
        r"without the `module\.` that is in front",
    ),
    "another network": (
        lambda state: nn.Linear(2, 2).state_dict(),
        r"`0\.weight` is missing.* and \d+ more\. .*weights of another network",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_weights_that_do_not_fit_are_named_and_nothing_is_changed(saved, kind):
    change, words = WRONG[kind]
    network = tiny_network()
    before = copy.deepcopy(network.state_dict())
    state = change(tiny_network().state_dict())
    with pytest.raises(ValueError, match=words):
        load_weights(network, saved(state))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_an_excluded_layer_must_exist(saved):
    path = saved(tiny_network().state_dict())
    with pytest.raises(ValueError, match=r"`weights_exclude` to name.*got 'head'"):
        load_weights(tiny_network(), path, weights_exclude=["head"])


def test_a_torn_file_is_named(saved):
    path = saved(tiny_network().state_dict())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=str(path)):
        load_weights(tiny_network(), path)


def test_nothing_is_unpickled(tmp_path):
    torch.save(tiny_network(), tmp_path / "network.pth")
    with pytest.raises(ValueError, match=r"network\.pth.*without unpickling"):
        load_weights(tiny_network(), tmp_path / "network.pth")


def test_a_file_that_holds_more_than_a_state_dict_is_refused(tmp_path):
    torch.save({"epoch": 3, "model": {}}, tmp_path / "all.pth")
    with pytest.raises(ValueError, match=r"holds epoch, model.*Save that alone"):
        load_weights(tiny_network(), tmp_path / "all.pth")


@pytest.mark.parametrize("name", ["nowhere.pth", "."])
def test_no_file_of_weights(tmp_path, name):
    with pytest.raises(ValueError, match=r"`weights` to be a file.*folder of a run"):
        load_weights(tiny_network(), tmp_path / name)


def test_segments_in_a_folder_are_joined(tmp_path):
    client, server = split(tiny_network(), 1)
    save_file(client.state_dict(), tmp_path / "client.safetensors")
    save_file(server.state_dict(), tmp_path / "server.safetensors")
    network = tiny_network()
    load_weights(network, tmp_path)
    merged = merge(client, server)
    assert all(torch.equal(v, merged[k]) for k, v in network.state_dict().items())
    stray = {"0.weight": torch.zeros(4, 1, 3, 3)}
    save_file(stray, tmp_path / "old.safetensors")
    with pytest.raises(ValueError, match=r"`0\.weight` differs.*Name one file"):
        load_weights(network, tmp_path)
