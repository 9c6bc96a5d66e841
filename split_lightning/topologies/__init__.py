"""Topologies: where the network is cut, and which party has which segment."""

from split_lightning.models.parts import Columns, Parts, Tiles
from split_lightning.topologies.client_network import ClientNetwork
from split_lightning.topologies.topology import (
    CutLayers,
    Labels,
    Topology,
    make_topology,
)

__all__ = [
    "ClientNetwork",
    "Columns",
    "CutLayers",
    "Labels",
    "Parts",
    "Tiles",
    "Topology",
    "make_topology",
]
