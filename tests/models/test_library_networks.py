"""Networks of timm, of Hugging Face and of users, at several cuts: as if unsplit.

They are as small as they can be: a few layers, images of 64 pixels.
"""

from functools import lru_cache, partial

import pytest
import torch
from by_hand import check_split_equals_unsplit, trained
from torch import nn
from torch.nn.utils import parametrizations

from split_lightning.models.split import cut_layers


def timm(name, **options):
    return pytest.importorskip("timm").create_model(name, num_classes=10, **options)


def hugging_face(name, **options):
    library = pytest.importorskip("transformers")
    config = getattr(library, f"{name}Config")(num_labels=10, **options)
    task = "Sequence" if name == "Bert" else "Image"
    return getattr(library, f"{name}For{task}Classification")(config)


class UNet(nn.Module):
    """Joins what each level has on the way up to what it had on the way down."""

    def __init__(self):
        super().__init__()
        self.down1 = self.block(3, 8)
        self.down2 = self.block(8, 16)
        self.bottom = self.block(16, 16)
        self.up = nn.Upsample(scale_factor=2)
        self.up2 = self.block(32, 8)
        self.up1 = self.block(16, 8)
        self.head = nn.Linear(8, 10)

    @staticmethod
    def block(before, after):
        layers = (
            nn.Conv2d(before, after, 3, padding=1),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        )
        return nn.Sequential(*layers)

    def forward(self, x):
        first = self.down1(x)
        second = self.down2(nn.functional.max_pool2d(first, 2))
        x = self.bottom(nn.functional.max_pool2d(second, 2))
        x = self.up2(torch.cat((self.up(x), second), dim=1))
        x = self.up1(torch.cat((self.up(x), first), dim=1))
        return self.head(x.mean((2, 3)))


class GRUClassifier(nn.Module):
    """Reads words, from a first state that it makes for each batch."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 8)
        self.gru = nn.GRU(8, 16, num_layers=2, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, words):
        state = torch.zeros(2, words.size(0), 16, device=words.device)
        output, last = self.gru(self.embed(words), state)
        return self.fc(self.norm(output.mean(1) + last[-1]))


class Encoder(nn.Module):
    """Reads words with their places, by PyTorch's own transformer."""

    def __init__(self):
        super().__init__()
        self.embed, self.places = nn.Embedding(100, 8), nn.Embedding(50, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.fc = nn.Linear(8, 10)

    def forward(self, words):
        places = torch.arange(words.shape[1], device=words.device)
        return self.fc(self.encoder(self.embed(words) + self.places(places)).mean(1))


class Parametrized(nn.Module):
    """Has weights that are computed, from a norm and by a power iteration."""

    def __init__(self):
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        self.second = parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.second(self.first(x).relu()).mean((2, 3)))


IMAGES, WORDS = (3, 64, 64), (12,)
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]}
# How a network is made, the shape of an input, and cuts.
NETWORKS = {
    "tf_efficientnet_b0": (
        partial(timm, "tf_efficientnet_b0", drop_path_rate=0.2),
        IMAGES,
        ["conv_stem", "blocks.2.1.se.conv_reduce", "blocks.4"],
    ),
    "mobilevit_xxs": (
        partial(timm, "mobilevit_xxs"),
        IMAGES,
        ["stem", "stages.2.1", "stages.3.0.conv2_kxk"],
    ),
    "vit_tiny_patch16_224": (
        partial(timm, "vit_tiny_patch16_224", img_size=64, depth=2, proj_drop_rate=0.1),
        IMAGES,
        ["patch_embed", "blocks.0.attn.qkv", "blocks.0"],
    ),
    "swin_tiny_patch4_window7_224": (
        partial(
            timm,
            "swin_tiny_patch4_window7_224",
            img_size=64,
            depths=(1, 2, 1, 1),
            embed_dim=24,
        ),
        IMAGES,
        ["patch_embed", "layers.1.blocks.1.attn.qkv", "layers.2"],
    ),
    "coatnet_nano_rw_224": (
        partial(timm, "coatnet_nano_rw_224", img_size=64),
        IMAGES,
        ["stem", "stages.2.blocks.0.attn.qkv"],
    ),
    "xcit_nano_12_p16_224": (
        partial(timm, "xcit_nano_12_p16_224", depth=2),
        IMAGES,
        ["patch_embed", "blocks.0.attn", "cls_attn_blocks.0"],
    ),
    "ViT": (
        partial(hugging_face, "ViT", num_hidden_layers=2, image_size=64, **SMALL),
        IMAGES,
        ["vit.embeddings", "vit.layers.0.attention", "vit.layers.0"],
    ),
    "ResNet": (
        partial(hugging_face, "ResNet", embedding_size=8, **STAGES),
        IMAGES,
        ["resnet.embedder", "resnet.encoder.stages.1.layers.0.shortcut", "resnet"],
    ),
    "ConvNext": (
        partial(hugging_face, "ConvNext", drop_path_rate=0.2, **STAGES),
        IMAGES,
        [
            "convnext.embeddings",
            "convnext.encoder.stages.1.layers.0.pwconv1",
            "convnext",
        ],
    ),
    "Bert": (
        partial(hugging_face, "Bert", vocab_size=100, num_hidden_layers=2, **SMALL),
        WORDS,
        ["bert.embeddings", "bert.encoder.layer.0.attention", "bert.encoder.layer.0"],
    ),
    "UNet": (UNet, (3, 16, 16), ["down1", "down2.1", "bottom", "up2"]),
    "GRUClassifier": (GRUClassifier, WORDS, ["embed", "gru", "norm"]),
    "Encoder": (Encoder, WORDS, ["embed", "places", "encoder"]),
    "Parametrized": (Parametrized, (3, 8, 8), ["first", "second"]),
}


@lru_cache(maxsize=1)
def trained_network(name):
    make, shape, _ = NETWORKS[name]
    return trained(make, shape=shape)


@pytest.mark.parametrize(
    ("name", "cut_layer"),
    [
        pytest.param(name, cut_layer, id=f"{name}-{cut_layer}")
        for name, (_, _, cuts) in NETWORKS.items()
        for cut_layer in cuts
    ],
)
def test_network_trains_as_if_unsplit(name, cut_layer):
    check_split_equals_unsplit(trained_network(name), cut_layer)


@pytest.mark.parametrize("name", ["Bert", "xcit_nano_12_p16_224", "GRUClassifier"])
def test_each_layer_that_is_listed_can_be_cut(name):
    unsplit = trained_network(name)
    layers = cut_layers(unsplit.network)
    assert len(layers) > 2
    for cut_layer in layers[:: max(1, len(layers) // 5)]:
        check_split_equals_unsplit(unsplit, cut_layer)
