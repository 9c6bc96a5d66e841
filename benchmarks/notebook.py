"""The source notebook's networks and loop, as printed: the benchmarks' reference.

Its two halves hold a whole ResNet-18 each, send `detach().clone()` across the cut and
take the softmax twice. Only what torch has renamed since is written anew.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn, optim
from torch.autograd import Variable
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
config = {"cut_layer": 3, "logits": 10}

transform = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
)
criterion = nn.CrossEntropyLoss()


class ResNet18Client(nn.Module):
    """A whole ResNet-18, of which only the layers up to the cut run."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        self.cut_layer = config["cut_layer"]
        self.model = models.resnet18(weights=None)
        self.model = nn.ModuleList(self.model.children())
        self.model = nn.Sequential(*self.model)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the activations at the cut."""
        for i, l in enumerate(self.model):  # noqa: E741
            if i > self.cut_layer:
                break
            x = l(x)
        return x


class ResNet18Server(nn.Module):
    """A whole ResNet-18, of which only the layers after the cut run."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        self.logits = config["logits"]
        self.cut_layer = config["cut_layer"]
        self.model = models.resnet18(weights=None)
        num_ftrs = self.model.fc.in_features
        self.model.fc = nn.Sequential(nn.Flatten(), nn.Linear(num_ftrs, self.logits))
        self.model = nn.ModuleList(self.model.children())
        self.model = nn.Sequential(*self.model)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the classes' probabilities."""
        for i, l in enumerate(self.model):  # noqa: E741
            if i <= self.cut_layer:
                continue
            x = l(x)
        return nn.functional.softmax(x, dim=1)


def sgd(model: nn.Module) -> optim.SGD:
    """Returns the notebook's optimizer of a model."""
    return optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def train_step(
    client_model: nn.Module,
    server_model: nn.Module,
    client_optimizer: optim.SGD,
    server_optimizer: optim.SGD,
    inputs: Tensor,
    labels: Tensor,
) -> float:
    """Trains on a batch, line by line as the notebook does; returns the loss."""
    client_optimizer.zero_grad()
    server_optimizer.zero_grad()

    activation = client_model(inputs)
    server_inputs = activation.detach().clone()

    server_inputs = Variable(server_inputs, requires_grad=True)
    outputs = server_model(server_inputs)
    loss = criterion(outputs, labels)
    loss.backward()

    server_optimizer.step()

    activation.backward(server_inputs.grad)
    client_optimizer.step()
    return loss.item()


def train(trainset: Dataset, tick: Callable[[], bool]) -> None:
    """Trains one client on a data set, until `tick`, called each batch, says enough."""
    client_model = ResNet18Client(config).to(device)
    server_model = ResNet18Server(config).to(device)
    client_optimizer, server_optimizer = sgd(client_model), sgd(server_model)
    parties = (client_model, server_model, client_optimizer, server_optimizer)
    trainloader = DataLoader(trainset, batch_size=128, shuffle=True, num_workers=2)
    running_loss = 0.0
    for data in trainloader:
        inputs, labels = data[0].to(device), data[1].to(device)
        running_loss += train_step(*parties, inputs, labels)
        if tick():
            break
