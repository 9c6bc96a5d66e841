"""Small networks, each with one habit of real code that a split must survive.

All take images `(B, 3, 8, 8)` and return logits `(B, 10)`. Those that no cut, or not
each cut, suits stand last.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Small(nn.Module):
    """Layers that the networks below put together, each in its own way."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, kernel_size=3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, kernel_size=3, padding=1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = self.relu(self.bn(self.conv1(x)))
        return self.head(self.conv2(x))

    def head(self, x):
        return self.fc(x.mean(dim=(2, 3)))


class Functional(Small):
    """Calls functions between its children, one of them in place."""

    def forward(self, x):
        x = F.relu(self.conv1(x), inplace=True)
        x = F.dropout(x, 0.5, training=self.training)
        x = F.max_pool2d(F.relu(self.conv2(x)), 8)
        return self.fc(torch.flatten(x, 1))


class Branching(Small):
    """Does more in train mode than in eval mode."""

    def forward(self, x):
        x = self.conv1(x)
        if self.training:
            x = x + self.bn(x)
        return self.head(self.conv2(x))


class Skip(Small):
    """Adds the stem's output far behind it."""

    def forward(self, x):
        stem = self.conv1(x)
        return self.head(self.conv2(self.bn(stem)) + stem)


class InPlaceResidual(Small):
    """Adds in place, scales in place, and rectifies in place."""

    def forward(self, x):
        x = self.conv1(x)
        out = self.bn(self.conv2(x))
        out += x
        out.mul_(2)
        return self.head(self.relu(out))


class InPlaceAugmented(Small):
    """Adds in place with `+=` to what it has under a second name."""

    def forward(self, x):
        x = self.bn(self.conv1(x))
        skip = x
        x += 1
        return self.head(self.conv2(x) + skip)


class PreActivated(Small):
    """Takes its shortcut through an identity, then rectifies in place.

    The rectification shows in the shortcut: both are one tensor.
    """

    def __init__(self):
        super().__init__()
        self.shortcut = nn.Identity()

    def forward(self, x):
        x = self.bn(self.conv1(x))
        shortcut = self.shortcut(x)
        return self.head(self.conv2(self.relu(x)) + shortcut)


class InPlaceOnView(Small):
    """Rectifies in place what it has flattened: the flat one is a view of it."""

    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten(2)

    def forward(self, x):
        x = self.bn(self.conv1(x))
        flat = self.flatten(x)  # (B, 8, 64)
        return self.head(self.conv2(self.relu(x))) + self.fc(flat.mean(2))


class UsedTwice(Small):
    """Runs one rectification, and one dropout, on both sides of a cut."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = self.dropout(self.relu(self.conv1(x)))
        return self.head(self.dropout(self.relu(self.conv2(x))))


class Scaled(Small):
    """Uses a parameter directly, which it touches before its first layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((8, 1, 1), 1.5))

    def forward(self, x):
        scale = self.scale
        return self.head(self.conv2(self.conv1(x)) * scale)


class Buffered(Small):
    """Reads buffers: one in the state dict, one not."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([[[0.1]], [[0.2]], [[0.3]]]))
        self.register_buffer("ramp", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, x):
        x = self.conv1(x - self.mean) * self.ramp
        return self.head(self.conv2(x) * self.ramp)


class BufferedTwice(Small):
    """Reads a buffer of its state dict twice."""

    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.tensor(0.1))

    def forward(self, x):
        x = self.conv1(x - self.offset)
        return self.head(self.conv2(x) - self.offset)


class Normalising(Buffered):
    """Computes with its buffers alone, before its first layer."""

    def forward(self, x):
        inverse = 1 / (self.mean.flatten() + 1)
        ramp = self.ramp.view(8, 1)
        x = self.conv1((x - self.mean[None]) * inverse.view(3, 1, 1))
        return self.head(self.conv2(x) * ramp)


class Constant(Small):
    """Makes a tensor in its forward."""

    def forward(self, x):
        x = self.conv1(x) * torch.tensor([0.5, 2.0] * 4)
        return self.head(self.conv2(x) + torch.linspace(0, 1, 8))


class Tied(Small):
    """Runs two convolutions with one weight."""

    def __init__(self):
        super().__init__()
        self.conv3 = nn.Conv2d(8, 8, kernel_size=3, padding=1)
        self.conv3.weight = self.conv2.weight

    def forward(self, x):
        return self.head(self.conv3(self.bn(self.conv2(self.conv1(x)))))


class TwoNames(Small):
    """Has a layer, and a block, under a second name."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(8, 8, kernel_size=1), nn.BatchNorm2d(8))
        self.stem = self.conv1
        self.last_block = self.block

    def forward(self, x):
        return self.head(self.last_block(self.conv2(self.stem(x))))


class NeverRun(Small):
    """Owns layers, a parameter and a buffer that it never uses."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.token = nn.Parameter(torch.zeros(4))
        self.register_buffer("table", torch.ones(4))


class Sizes(Small):
    """Needs, late, the size of an early tensor."""

    def forward(self, x):
        x = self.conv1(x)
        batch, channels = x.shape[0], x.size(1)
        x = self.bn(x).permute(0, 2, 3, 1).reshape(batch, 8, -1, channels)
        x = self.conv2(x.permute(0, 3, 1, 2)).reshape(batch, channels, -1)
        return self.fc(x.sum(2) / x.numel())


class Counted(Small):
    """Needs, late, the number of elements of an early tensor."""

    def forward(self, x):
        x = self.conv1(x)
        count = x.nelement()
        return self.head(self.conv2(x) / count)


class Pair(nn.Module):
    """Two convolutions of one input, returned as a tuple."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(8, 8, kernel_size=1)
        self.right = nn.Conv2d(8, 8, kernel_size=1)

    def forward(self, x):
        return self.left(x), self.right(x)


class Pairs(Small):
    """Has a layer of its own that returns a tuple."""

    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def forward(self, x):
        left, right = self.pair(self.conv1(x))
        return self.head(self.conv2(left) * right.sigmoid())


class Recurrent(Small):
    """Has an LSTM, a layer of PyTorch's that returns a tuple, and its output."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        output, _ = self.lstm(self.rows(x))  # (B, 8, 8)
        return self.fc(output[:, -1])

    def rows(self, x):
        return self.conv1(x).mean(3).transpose(1, 2)  # (B, 8, 8)


class LastState(Recurrent):
    """Reads an LSTM's last state: a tuple in the tuple."""

    def forward(self, x):
        _, (state, _) = self.lstm(self.rows(x))
        return self.fc(state[-1])


class EncoderDecoder(Recurrent):
    """Gives one LSTM's last state, whole, to another."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        output, state = self.lstm(self.rows(x))
        output, _ = self.decoder(output, state)
        return self.fc(output[:, -1])


class Chunks(Small):
    """Joins again, whole, the tuple that it cut a tensor into."""

    def forward(self, x):
        chunks = self.conv1(x).chunk(2, dim=1)
        x = self.bn(torch.cat(chunks, dim=1))
        return self.head(self.conv2(x) + torch.cat(chunks[::-1], dim=1))


class Attentive(Small):
    """Has an attention layer, with dropout, and a token of its own."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def forward(self, x):
        x = self.conv1(x)
        token = self.token.expand(x.shape[0], -1, -1)
        x = torch.cat((token, x.flatten(2).transpose(1, 2)), dim=1)  # (B, 65, 8)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.fc(x[:, 0])


class WithOptions(Small):
    """Takes options, which training leaves at their defaults."""

    def forward(self, x, mask=None, return_features=False):
        x = self.conv1(x)
        if mask is not None:
            x = x * mask
        features = self.conv2(x)
        return features if return_features else self.head(features)


class AllOptions(WithOptions):
    """Takes nothing but options: the first is the input."""

    def forward(self, x=None, mask=None, **others):
        return super().forward(x, mask, **others)


class Counting(Small):
    """Counts its forward passes in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        x = self.conv1(x)
        self.passes.add_(1)
        return self.head(self.conv2(x))


class Noisy(Small):
    """Draws noise of a fixed size in its forward."""

    def forward(self, x):
        return self.head(self.conv2(self.conv1(x) + torch.randn(8, 8)))


class FrozenMiddle(Small):
    """Switches gradients off in a part of its forward."""

    def forward(self, x):
        x = self.conv1(x)
        with torch.no_grad():
            scale = self.conv2(x).sigmoid()
        return self.head(self.bn(x * scale))


class HalfPrecision(Small):
    """Switches autocast on in a part of its forward."""

    def forward(self, x):
        x = self.conv1(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.conv2(x)
        return self.head(x.float())


class GlobalSkip(Small):
    """Joins its input to what its second convolution returns."""

    def forward(self, x):
        out = self.conv2(self.conv1(x))
        out = torch.cat((x, out[:, :5]), dim=1)  # (B, 8, 8, 8)
        return self.head(self.relu(self.bn(out)))


class TiedByHand(Small):
    """Uses a layer's weight again, by a function."""

    def forward(self, x):
        x = self.bn(self.conv2(self.conv1(x)))
        return self.head(F.conv2d(x, self.conv2.weight, padding=1))


class ScaledTwice(Scaled):
    """Uses one parameter directly, twice."""

    def forward(self, x):
        return self.head(self.conv2(self.conv1(x) * self.scale) * self.scale)


class Reordered(Small):
    """Runs its layers in another order in eval mode."""

    def __init__(self):
        super().__init__()
        self.conv3 = nn.Conv2d(8, 8, kernel_size=3, padding=1)

    def forward(self, x):
        x = self.conv1(x)
        if self.training:
            return self.head(self.conv3(self.conv2(x)))
        return self.head(self.conv2(self.conv3(x)))


class Gate(nn.Module):
    """Looks at its input: a branch that depends on data."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


class Gated(Small):
    """Has a layer that `torch.fx` cannot trace."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(self.conv2, Gate())

    def forward(self, x):
        return self.head(self.block(self.conv1(x)))


# The networks that can be split, and cuts that they must allow.
OWN = {
    Small: ["conv1", "bn", "relu", "conv2"],
    Functional: ["conv1", "conv2"],
    Branching: ["conv1", "conv2"],
    Skip: ["conv1", "bn", "conv2"],
    InPlaceAugmented: ["conv1", "bn", "conv2"],
    InPlaceResidual: ["conv1", "conv2", "bn", "relu"],
    PreActivated: ["conv1", "bn", "relu", "conv2"],
    InPlaceOnView: ["conv1", "bn", "relu"],
    UsedTwice: ["conv1", "conv2", "relu", "dropout"],
    Scaled: ["conv1", "conv2"],
    Buffered: ["conv1", "conv2"],
    BufferedTwice: ["conv1", "conv2"],
    Normalising: ["conv1", "conv2"],
    Constant: ["conv1", "conv2"],
    Tied: ["conv1", "conv3"],
    TwoNames: ["conv1", "stem", "block.0", "last_block"],
    NeverRun: ["conv1", "bn", "conv2"],
    Sizes: ["conv1", "bn", "conv2"],
    Counted: ["conv1", "conv2"],
    Pairs: ["conv1", "pair.left", "pair", "conv2"],
    Recurrent: ["conv1", "lstm"],
    LastState: ["conv1", "lstm"],
    Attentive: ["conv1", "attention"],
    WithOptions: ["conv1", "conv2"],
    AllOptions: ["conv1", "conv2"],
    Noisy: ["conv1", "conv2"],
    Counting: ["conv1", "conv2"],
}
