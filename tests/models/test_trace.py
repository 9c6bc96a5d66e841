"""Networks that tracing cannot see through, or would see wrongly, are refused."""

import own_networks as own
import pytest

from split_lightning.models.split import cut_layers, split


@pytest.mark.parametrize(
    ("network", "match"),
    [
        pytest.param(
            own.Gated(), "tracing Gated stopped in its layer `block.1`: ", id="layer"
        ),
        pytest.param(own.Gate(), "tracing Gate stopped: ", id="root"),
    ],
)
def test_untraceable_network_names_the_layer(network, match):
    match = f"Expected argument `network` to be .* torch.fx can trace, but {match}"
    with pytest.raises(ValueError, match=match):
        split(network, 0)
    with pytest.raises(ValueError, match=match):
        cut_layers(network)


@pytest.mark.parametrize(
    "make",
    [own.Noisy, own.FrozenMiddle, own.HalfPrecision],
    ids=lambda make: make.__name__,
)
def test_what_a_trace_would_lose_is_refused(make):
    with pytest.raises(ValueError, match="Expected argument `network`"):
        split(make(), "conv2")
