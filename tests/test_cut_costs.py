"""What cuts cost, against closed formulas, sums by hand and a real run."""

from functools import partial

import pytest
import torch
from pytorch_lightning import Trainer
from torch import nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2, resnet18

from split_lightning import (
    CutCost,
    DigitsImages,
    RoundRobinWeightPassing,
    SplitDataModule,
    SplitLightningModule,
    cut_costs,
    cut_layers,
    split,
)
from split_lightning.models import DigitsCNN

# Two 3x3 convolutions of an 8x8 image, pooling between them, a linear layer.
CONV1 = 2 * (8 * 8) * 5 * 9 * 1  # out pixels, out channels, kernel, in channels
CONV2 = 2 * (4 * 4) * 7 * 9 * 5
LINEAR = 2 * 7 * 16 * 3


def small_network():
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 7, 3, padding=1),
        nn.Flatten(),
        nn.Linear(7 * 16, 3),
    )


def costs_of(network, shape=(1, 8, 8), layers=None):
    return {cost.cut_layer: cost for cost in cut_costs(network, shape, layers)}


def test_flops_of_a_small_network_equal_the_closed_formula():
    costs = costs_of(small_network())
    assert list(costs) == ["0", "1", "2", "3", "4", "5"]
    for layer, cost in costs.items():
        has_second = layer in "45"
        forward = CONV1 + CONV2 * has_second
        # The first layer needs its weight's gradient alone, the second two of them.
        assert cost.client_forward_flops == forward
        assert cost.client_backward_flops == CONV1 + 2 * CONV2 * has_second
        assert cost.server_forward_flops == LINEAR + CONV2 * (not has_second)
        assert cost.server_backward_flops == 2 * cost.server_forward_flops
        assert cost.client_flops == forward + cost.client_backward_flops
        assert cost.server_flops == 3 * cost.server_forward_flops


def test_flops_of_grouped_and_transposed_convolutions():
    network = nn.Sequential(
        nn.Conv2d(1, 6, 1),
        nn.Conv2d(6, 12, 3, padding=1, groups=3),
        nn.ConvTranspose2d(12, 4, 2, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(4 * 64, 2),
    )
    first, grouped = 2 * 16 * 6, 2 * 16 * 12 * 9 * 2
    transposed = 2 * 16 * 12 * 4 * 2  # pixels that go in; kernel; channels out, a group
    costs = costs_of(network, (1, 4, 4))
    assert costs["1"].client_forward_flops == first + grouped
    assert costs["1"].client_backward_flops == first + 2 * grouped
    assert costs["2"].client_forward_flops == first + grouped + transposed
    assert costs["2"].client_backward_flops == first + 2 * (grouped + transposed)


@pytest.mark.parametrize("make", [resnet18, mobilenet_v2])
def test_a_cut_moves_work_and_adds_none(make):
    network = make(num_classes=10)
    layers = cut_layers(network)[5::90]
    costs = costs_of(network, (3, 32, 32), layers).values()
    assert len({cost.client_flops + cost.server_flops for cost in costs}) == 1
    forward = {cost.client_forward_flops + cost.server_forward_flops for cost in costs}
    total = next(iter(costs)).client_flops + next(iter(costs)).server_flops
    # Twice the forward backwards, but for the gradient of the images.
    (once,) = forward
    first_layer = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    image = torch.zeros(1, 3, 32, 32)
    pixels = first_layer(image)[0, 0].numel()
    assert total == 3 * once - 2 * pixels * first_layer.weight.numel()


@pytest.mark.parametrize(
    ("network", "shape"), [(small_network(), (1, 8, 8)), (resnet18(), (3, 32, 32))]
)
def test_parameters_and_state_are_those_of_the_segment(network, shape):
    for layer in cut_layers(network)[:30:5]:
        (cost,) = cut_costs(network, shape, [layer])
        client, server = split(network, layer)
        held = list(client.parameters())
        assert cost.client_parameters == sum(map(torch.Tensor.numel, held))
        rest = sum(p.numel() for p in server.parameters())
        assert cost.client_parameters + rest == sum(
            p.numel() for p in network.parameters()
        )
        buffers = sum(b.numel() * b.element_size() for b in client.buffers())
        assert cost.client_bytes == 4 * cost.client_parameters + buffers


def test_activations_that_a_small_network_keeps_equal_the_formula():
    costs = costs_of(small_network())
    image, wide, pooled = 4 * 8 * 8, 4 * 5 * 8 * 8, 4 * 5 * 4 * 4
    kept = {"0": image}
    kept["1"] = kept["0"] + wide  # what BatchNorm got
    kept["2"] = kept["1"] + wide  # what ReLU returned
    kept["3"] = kept["2"] + 2 * pooled  # ... is kept once; and where maxima were, int64
    kept["4"] = kept["3"] + pooled  # what the convolution got
    kept["5"] = kept["4"]  # a view keeps nothing
    assert {k: cost.client_activation_bytes for k, cost in costs.items()} == kept


class Attention(nn.Module):
    """Attention and dropout: what they keep is more than their inputs."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(8, 24)
        self.outside = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        q, k, v = self.inside(images).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.head(self.drop(self.outside(mixed))).mean(dim=(1, 2))


@pytest.mark.parametrize(
    ("network", "shape", "layers"),
    [
        (DigitsCNN(), (1, 8, 8), ["conv1", "relu2", "fc1"]),
        (resnet18(), (3, 32, 32), ["maxpool", "layer1.0.conv2", "layer2.0"]),
        (mobilenet_v2(), (3, 32, 32), ["features.2", "features.4"]),
        (Attention(), (1, 8, 8), ["inside", "outside", "drop"]),
    ],
)
def test_activations_are_those_that_a_real_forward_keeps(network, shape, layers):
    for layer in layers:
        (cost,) = cut_costs(network, shape, [layer])
        client, _ = split(network.train(), layer)
        own = {p.data_ptr() for p in client.parameters()}
        sizes = []
        for number in (4, 6):
            kept, alive = {}, []

            def pack(tensor, kept=kept, alive=alive):
                alive.append(tensor.detach())
                kept[tensor.untyped_storage().data_ptr()] = (
                    tensor.untyped_storage().nbytes()
                )
                return tensor.detach()

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                client(torch.rand(number, *shape))
            sizes.append(sum(size for key, size in kept.items() if key not in own))
        assert cost.client_activation_bytes == (sizes[1] - sizes[0]) / 2


@pytest.mark.parametrize("layer", ["conv2", "maxpool", "fc1"])
def test_bytes_are_those_that_a_run_counts(tmp_path, layer):
    (cost,) = cut_costs(DigitsCNN(), (1, 8, 8), [layer])
    sgd = partial(torch.optim.SGD, lr=0.01)
    module = SplitLightningModule(DigitsCNN(), layer, sgd, sgd, 10)
    data = SplitDataModule(DigitsImages(), num_clients=1, val_share=0)
    fit(tmp_path, module, data, limit_train_batches=5)
    samples = 5 * data.batch_size
    assert module.totals()["uplink_bytes"] == samples * cost.uplink_bytes
    assert module.totals()["downlink_bytes"] == samples * cost.downlink_bytes
    assert cost.link_bytes == cost.uplink_bytes + cost.downlink_bytes
    assert cost.uplink_bytes_per_batch == 0


def test_the_state_is_what_a_hand_off_counts(tmp_path):
    (cost,) = cut_costs(DigitsCNN(), (1, 8, 8), ["maxpool"])
    sgd = partial(torch.optim.SGD, lr=0.01)
    module = SplitLightningModule(DigitsCNN(), "maxpool", sgd, sgd, 10)
    data = SplitDataModule(DigitsImages(), num_clients=3, batch_size=300, val_share=0)
    fit(tmp_path, module, data, callbacks=[RoundRobinWeightPassing()])
    assert module.totals()["handoffs"] == 2
    assert module.totals()["handoff_bytes"] == 2 * cost.client_bytes


class SendsSizes(nn.Module):
    """What is left of the image's width goes to the server, as a number."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(16, 10)

    def forward(self, images):
        width = images.shape[3]
        x = self.pool(self.conv(images))
        return self.head(x.flatten(1)) / width


def test_sizes_cross_with_each_batch_and_are_counted(tmp_path):
    (cost,) = cut_costs(SendsSizes(), (1, 8, 8), ["pool"])
    assert cost.uplink_bytes_per_batch == 8
    sgd = partial(torch.optim.SGD, lr=0.01)
    module = SplitLightningModule(SendsSizes(), "pool", sgd, sgd, 10)
    data = SplitDataModule(DigitsImages(), num_clients=1, val_share=0)
    fit(tmp_path, module, data, limit_train_batches=4)
    expected = 4 * (data.batch_size * cost.uplink_bytes + 8)
    assert module.totals()["uplink_bytes"] == expected


def fit(folder, module, data, **options):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, datamodule=data)


class Chooses(nn.Module):
    """Its shapes depend on values; and it has a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("chosen", torch.tensor([True, False, True, False]))
        self.scale = torch.ones(2)
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)

    def forward(self, images):
        return self.second(self.first(images.flatten(1)[:, self.chosen]) * self.scale)


def test_numbers_are_computed_where_shapes_are_not_enough():
    costs = costs_of(Chooses(), (1, 2, 2))
    assert costs["first"].client_forward_flops == 2 * 2 * 2
    assert costs["first"].downlink_bytes == 4 * 2


def test_a_frozen_client_gets_and_does_nothing_back():
    network = DigitsCNN()
    for layer in (network.conv1, network.bn1):
        layer.requires_grad_(False)
    (cost,) = cut_costs(network, (1, 8, 8), ["relu1"])
    assert cost.client_backward_flops == 0
    assert cost.client_activation_bytes == 0
    assert cost.downlink_bytes == 0
    assert cost.uplink_bytes == 4 * 16 * 64 + 8


def test_the_network_is_left_as_it_is():
    network = DigitsCNN().eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    cut_costs(network, (1, 8, 8), ["relu1"])
    assert not network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for p in network.parameters())


def test_which_cut_dominates():
    def cost(flops=1, link=1, memory=1, state=1):
        return CutCost("x", 0, state, flops, 0, 0, 0, memory, link, 0, 0)

    assert cost(flops=2).is_dominated([cost()])
    assert cost(state=2, memory=2).is_dominated([cost(), cost(flops=9)])
    assert not cost().is_dominated([cost(), cost(flops=2)])  # the same is not less
    assert not cost(flops=2).is_dominated([cost(link=2), cost(memory=2), cost(state=2)])


def test_images_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"images of shape \(3, 8, 8\), but: .*channel"
    ):
        cut_costs(DigitsCNN(), (3, 8, 8))


def test_a_layer_that_is_not_there():
    with pytest.raises(ValueError, match=r"got 'maxpol'.*`maxpool`"):
        cut_costs(DigitsCNN(), (1, 8, 8), ["maxpol"])
