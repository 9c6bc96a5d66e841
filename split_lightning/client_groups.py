"""Groups of clients that have networks of their own, in front of one server's."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import nn

from split_lightning.client_network import ClientNetwork, shape_sent
from split_lightning.kinds import CLIENT, ClientKinds, Stop
from split_lightning.models.segment import Segment
from split_lightning.route import Party


def grouped(
    segments: dict[str, nn.Module],
    kinds: ClientKinds,
    networks: Sequence[ClientNetwork | None],
    image_shape: Sequence[int] | None,
    labels: Party,
) -> tuple[dict[str, nn.Module], ClientKinds]:
    """Puts clients' own networks in the place of the network's lower part.

    Entries that are equal are one group, which begins with the weights of the first.

    Args:
        segments: The pieces of the network that was cut, by name.
        kinds: Who computes which of them: all clients the same.
        networks: The entries, dealt out to clients; `None`: the network's lower part.
        image_shape: The shape of an image: `(C, H, W)`.
        labels: Who has the labels in training.

    Returns:
        The pieces by name, and the kinds of clients: one for each group.

    Raises:
        ValueError: If something does not go together, or does not fit.
    """
    if not networks or image_shape is None or kinds.are_several or labels == "client":
        raise ValueError(
            "Expected argument `client_networks` to have entries, with `image_shape` "
            "(C, H, W), one `cut_layer` for all (each entry has its own) and labels at "
            "the server (a head would be part of each client's network), but got "
            f"{len(networks)} entries, image_shape={image_shape}, labels={labels!r}"
            f"{', and several cuts' if kinds.are_several else ''}."
        )
    if kinds.routes[0][0].num_holders > 1:
        raise ValueError(
            "Expected argument `client_networks` to be null where each client is a "
            "group of holders, who have networks of their own (the bottoms of a "
            f"`VerticalNetwork`), but got {len(networks)} entries."
        )
    lower = segments[CLIENT]
    taken = shape_sent(lower, image_shape, "the network (`network`)")
    groups: dict[str, nn.Module] = {}
    entries = []
    for entry in networks:
        own = lower if entry is None else entry.segment(image_shape, taken)
        groups.setdefault(_description(own), own)
        entries.append(list(groups).index(_description(own)))
    names = [CLIENT, *(f"{CLIENT}_{i + 2}" for i in range(len(groups) - 1))]
    pieces = dict(zip(names, groups.values(), strict=True))
    _, *behind = kinds.routes[0]
    routes = [(Stop("client", name, 0, is_cut=True), *behind) for name in names]
    rest = {name: segment for name, segment in segments.items() if name != CLIENT}
    return pieces | rest, ClientKinds(routes, entries, "client_networks")


def _description(segment: nn.Module) -> str:
    """Returns what two segments have in common that differ in their weights alone."""
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
