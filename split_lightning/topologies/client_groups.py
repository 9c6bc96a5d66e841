"""Groups of clients that have networks of their own, in front of one server's."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import nn

from split_lightning.models.segment import Segment
from split_lightning.topologies.client_network import ClientNetwork, shape_sent


def grouped(
    lower: nn.Module,
    networks: Sequence[ClientNetwork | None],
    image_shape: Sequence[int],
) -> tuple[list[nn.Module], list[int]]:
    """Returns the clients' segments of networks of their own.

    Entries that are equal are one group, which begins with the weights of the first.

    Args:
        lower: The network's own lower part.
        networks: The entries, for groups of clients; `None`: the network's lower part.
        image_shape: The shape of an image: `(C, H, W)`.

    Returns:
        The segment of each group, and the group of each entry.

    Raises:
        ValueError: If what a client sends does not fit.
    """
    taken = shape_sent(lower, image_shape, "the network (`network`)")
    groups: dict[str, nn.Module] = {}
    entries = []
    for entry in networks:
        own = lower if entry is None else entry.segment(image_shape, taken)
        groups.setdefault(_description(own), own)
        entries.append(list(groups).index(_description(own)))
    return list(groups.values()), entries


def _description(segment: nn.Module) -> str:
    """Returns a description that is equal for segments that differ only in weights."""
    state = segment.state_dict(keep_vars=True)
    shapes = {name: (tuple(t.shape), t.requires_grad) for name, t in state.items()}
    modules = list(segment.modules())
    code = [own.code for own in modules if isinstance(own, Segment)]
    settings = [_settings(own) for own in modules if not isinstance(own, Segment)]
    return f"{segment}\n{shapes}\n{code}\n{settings}"


def _settings(module: nn.Module) -> dict[str, str]:
    """Returns the class and the plain attributes of a module, which need not show."""
    kind = type(module)
    found = {"class": f"{kind.__module__}.{kind.__qualname__}"}
    for name, value in vars(module).items():
        if isinstance(value, bool | int | float | str | list | tuple | None):
            found[name] = repr(value)
        elif inspect.isroutine(value):  # such as `torch.relu`
            found[name] = value.__qualname__
    return found
