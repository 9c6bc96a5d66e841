"""`Topology`: the segments of a network, and which party has which of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

from torch import nn

from split_lightning.models.joins import Missing
from split_lightning.models.parts import Parts
from split_lightning.models.segment import Layers
from split_lightning.models.split import CutLayer, in_order, listed, path_of, split
from split_lightning.models.vertical import parts_of
from split_lightning.placement import CLIENT, Layout, PartyType, Placement
from split_lightning.topologies.client_groups import grouped
from split_lightning.topologies.client_network import ClientNetwork

# The layer after which to cut, or several in order; the first may be a list of its own,
# which is dealt out to the clients. `None`: the network is not cut.
CutLayers: TypeAlias = CutLayer | Sequence[str | int | Sequence[str | int]] | None
# The party with the labels in training, and with the loss.
Labels: TypeAlias = Literal["client", "server"]


class Topology(NamedTuple):
    """The segments of a network, and their parties.

    Attributes:
        modules: The segments, in the order of the network.
        depths: The depth of each in the network, from 0. Those at one depth compute
            side by side (holders of parts), or for different clients.
        names: For each segment the name of the layers that it is saved with: `client`,
            `server`, or `between` where clients as well as servers may have it.
        placement: Which party has which segment.
        is_split: Whether the network is cut.
        parts: How samples are divided among a client's holders; `None`: they are whole.
        missing: The rule for holders that lack a sample; `None`: none does.
    """

    modules: list[nn.Module]
    depths: list[int]
    names: list[str]
    placement: Placement
    is_split: bool = True
    parts: Parts | None = None
    missing: Missing | None = None

    @property
    def has_client_networks(self) -> bool:
        """Whether clients differ in their networks, not only in where they cut."""
        return any(None in layout for layout in self.placement.layouts)

    def layers(self, modules: Sequence[nn.Module]) -> dict[str, nn.Module]:
        """Returns segments by name; those with one name as one module."""
        found: dict[str, list[nn.Module]] = {}
        for name, module in zip(self.names, modules, strict=True):
            found.setdefault(name, []).append(module)
        order = sorted(found, key=lambda name: (name != "client", name != "server"))
        return {
            k: found[k][0] if len(found[k]) == 1 else Layers(found[k]) for k in order
        }


def make_topology(
    network: nn.Module,
    cut_layer: CutLayers,
    labels: Labels = "server",
    label_holder: int = 0,
    client_networks: Sequence[ClientNetwork | None] | None = None,
    image_shape: Sequence[int] | None = None,
) -> Topology:
    """Cuts a network, and assigns its segments to parties.

    A client has the layers up to the first cut; a server computes from each cut to the
    next. The party with the labels computes what is behind the last cut: with one cut
    this is vanilla split learning, with two and labels at the client a U-shape
    (Vepakomma et al. 2018, https://arxiv.org/abs/1812.00564).

    Args:
        network: The unsplit network.
        cut_layer: Where to cut; see `CutLayers`.
        labels: The party with the labels.
        label_holder: Which of a client's holders has the labels, where the network is a
            `VerticalNetwork`.
        client_networks: Networks of the clients' own, in groups; `None` among them:
            the lower layers of `network`.
        image_shape: The shape of an image, which `client_networks` need.

    Raises:
        ValueError: If the network cannot be cut there, or arguments do not go together.
    """
    if labels not in get_args(Labels):
        raise ValueError(
            f"Expected argument `labels` to be one of {get_args(Labels)}, but got "
            f"{labels!r}."
        )
    parts, missing = parts_of(network)
    num_holders = 1 if parts is None else len(parts)
    if not 0 <= label_holder < num_holders:
        raise ValueError(
            "Expected argument `label_holder` to be one of a client's holders, from 0 "
            f"to {num_holders - 1}, but got {label_holder}."
        )
    if cut_layer is None:
        return _unsplit(network, labels, client_networks)
    first, rest = _listed(cut_layer)
    if labels == "client" and not rest:
        raise ValueError(
            "Expected argument `cut_layer` to name at least two layers where labels "
            "stay with the clients: the server's part is what is between the first and "
            "the last; but got 1."
        )
    entries = [0]
    if len(first) > 1:
        if num_holders > 1:
            raise ValueError(
                "Expected argument `cut_layer` to begin with one layer where a client "
                "is a group of holders, whose lower layers end there, but got "
                f"{first}."
            )
        ordered = in_order(network, first)
        entries = [ordered.index(path_of(network, layer)) for layer in first]
        first = ordered
    modules: list[nn.Module] = [*split(network, [*first, *rest], num_holders)]
    depths = [0] * (num_holders - 1) + list(range(len(modules) - num_holders + 1))
    layouts = [
        _layout(entry, len(first), len(rest), labels, num_holders, label_holder)
        for entry in range(len(first))
    ]
    argument = "cut_layer"
    if client_networks is not None:
        _check_networks(client_networks, image_shape, len(first), num_holders, labels)
        groups, entries = grouped(modules[0], client_networks, image_shape or ())
        number = len(groups)
        modules, depths = [*groups, *modules[1:]], [0] * (number - 1) + depths
        layouts = [
            (
                *(CLIENT if own == group else None for own in range(number)),
                *layouts[0][1:],
            )
            for group in range(number)
        ]
        argument = "client_networks"
    placement = Placement(
        layouts,
        entries,
        num_clients=len(entries),
        label_member=label_holder,
        argument=argument,
    )
    names = _names(placement, client_networks)
    return Topology(modules, depths, names, placement, True, parts, missing)


def _unsplit(
    network: nn.Module,
    labels: Labels,
    client_networks: Sequence[ClientNetwork | None] | None,
) -> Topology:
    if labels != "server" or client_networks is not None:
        raise ValueError(
            "Expected argument `cut_layer` to name a layer where `labels` or "
            "`client_networks` assign parts of the network, but got none."
        )
    placement = Placement([(PartyType("server"),)])
    return Topology([network], [0], ["network"], placement, is_split=False)


def _layout(
    entry: int,
    num_entries: int,
    num_rest: int,
    labels: Labels,
    num_holders: int,
    label_holder: int,
) -> Layout:
    """Returns the party of each segment for clients with one entry of the first cut."""
    lower = [PartyType("client", holder) for holder in range(num_holders)]
    between = [
        CLIENT if number <= entry else PartyType("server")
        for number in range(1, num_entries)
    ]
    upper = [PartyType("server", hop) for hop in range(num_rest + 1)]
    if labels == "client":
        upper[-1] = PartyType("client", label_holder)
    return (*lower, *between, *upper)


def _listed(cut_layer: object) -> tuple[list[str | int], list[str | int]]:
    """Returns the layers of the first cut, one for each entry, and the further cuts.

    Raises:
        ValueError: If other cuts than the first differ.
    """
    found = listed(cut_layer)  # type: ignore[arg-type]
    layers = [own if isinstance(own, list | tuple) else [own] for own in found]
    first, *others = layers
    if not first or any(len(several) != 1 for several in others):
        raise ValueError(
            "Expected argument `cut_layer` to be a layer, or several in order, of "
            "which the first may be a list of its own, one entry for each client or "
            f"group: only the first cut may differ; but got {cut_layer!r}."
        )
    return list(first), [layer for several in others for layer in several]


def _check_networks(
    networks: Sequence[ClientNetwork | None],
    image_shape: Sequence[int] | None,
    num_entries: int,
    num_holders: int,
    labels: Labels,
) -> None:
    if num_holders > 1:
        raise ValueError(
            "Expected argument `client_networks` to be null where each client is a "
            "group of holders with networks of their own (the bottoms of a "
            f"`VerticalNetwork`), but got {len(networks)} entries."
        )
    if not networks or image_shape is None or num_entries > 1 or labels == "client":
        raise ValueError(
            "Expected argument `client_networks` to have entries, with `image_shape` "
            "(C, H, W), one `cut_layer` for all (each entry has its own) and labels at "
            "the server (a head would be part of each client's network), but got "
            f"{len(networks)} entries, image_shape={image_shape}, labels={labels!r}"
            f"{', and several cuts' if num_entries > 1 else ''}."
        )


def _names(placement: Placement, client_networks: object) -> list[str]:
    """Returns the names that segments are saved with."""
    names: list[str] = []
    for segment in range(len(placement.layouts[0])):
        roles = placement.roles_of(segment)
        if len(roles) > 1:
            number = sum(name.startswith("between") for name in names)
            names.append(f"between_{number + 1}" if number else "between")
        elif client_networks is not None and "client" in roles and segment > 0:
            names.append(f"client_{segment + 1}")
        else:
            names.append(roles[0])
    return names
