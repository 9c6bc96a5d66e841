"""Whatever the network, wherever `cut_layers` says it can be cut: the same numbers."""

from by_hand import check_split_equals_unsplit, trained
from hypothesis import assume, event, given, settings
from random_networks import NETWORKS

from split_lightning.models.split import cut_layers, split


@settings(max_examples=15 if settings.default.max_examples < 100 else 500)
@given(network=NETWORKS)
def test_split_equals_unsplit_whatever_the_network(network):
    try:
        unsplit = trained(lambda: network, image_size=8)
    except RuntimeError:  # changed in place what its own backward needs
        assume(False)
    layers = cut_layers(network)
    event(f"{len(layers)} cuts")
    assert layers
    for layer in layers:
        check_split_equals_unsplit(unsplit, layer)
        client, server = split(network, layer)
        keys = [*client.state_dict(), *server.state_dict()]
        assert sorted(keys) == sorted(network.state_dict())
