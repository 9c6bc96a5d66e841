"""The networks that a run ends with, in its folder: one, or one for each client.

A segment that is the same for all is `client.safetensors`, `server.safetensors` or
`network.safetensors`; one that differs is in `networks/CLIENT_ID`, for one client of
each network.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from split_lightning.classifier import Classifier
from split_lightning.models.weights import NETWORKS, differences, listed, read_state
from split_lightning.paths import absence
from split_lightning.replicas import State
from split_lightning.runs.artifacts import save_segment


def save_networks(
    module: Classifier, folder: Path, metadata: Mapping[str, str]
) -> None:
    """Writes the trained networks of a run; removes those that were there before.

    Args:
        module: The trained module.
        folder: The run's folder.
        metadata: What a reader must know: network, cut layer, classes, versions.

    Raises:
        OSError: If a file cannot be written.
    """
    shutil.rmtree(folder / NETWORKS, ignore_errors=True)
    clients = module.parties.representatives()
    for name, segment in module.segments().items():
        if len(clients) > 1 and module.parties.differ_in(segment):
            (folder / f"{name}.safetensors").unlink(missing_ok=True)
            continue
        if clients:
            module.parties.show(clients[0])
        save_segment(segment, folder / f"{name}.safetensors", metadata)
    for client_id in clients if len(clients) > 1 else ():
        module.parties.show(client_id)
        _save_own(module, client_id, folder, metadata)
    module.parties.show_live()


def _save_own(
    module: Classifier, client_id: int, folder: Path, metadata: Mapping[str, str]
) -> None:
    """Writes what of a client's network, which is in place, is not that of all."""
    own = folder / NETWORKS / str(client_id)
    own.mkdir(parents=True)
    for name, segment in module.segments().items():
        parties = module.parties
        if parties.differ_in(segment) and parties.holds(client_id, segment):
            about = {**metadata, "client": str(client_id)}
            save_segment(segment, own / f"{name}.safetensors", about)


def load_networks(module: Classifier, folder: Path) -> None:
    """Puts the networks that a run ended with in place.

    Raises:
        ValueError: If a file is missing or torn, or does not fit.
    """
    clients = sorted(int(path.name) for path in folder.glob(f"{NETWORKS}/*"))
    own: dict[nn.Module, dict[int, State]] = {}
    for name, segment in module.segments().items():
        common = folder / f"{name}.safetensors"
        if common.is_file() or not clients:
            segment.load_state_dict(_fitting(segment, common))
            continue
        folders = {k: folder / NETWORKS / str(k) for k in clients}
        own[segment] = {
            k: _fitting(segment, path / f"{name}.safetensors")
            for k, path in folders.items()
            if module.parties.holds(k, segment)
        }
    module.parties.forget()
    module.parties.hold(clients, own)


def _fitting(segment: nn.Module, file: Path) -> State:
    """Returns the weights in a file, after a look that they fit."""
    if not file.is_file():
        raise ValueError(
            f"Expected a run that has ended, but {absence(file)}. A checkpoint of "
            "it is named with checkpoint=last."
        )
    state = read_state(file)
    require_fit(segment, state, file)
    return state


def require_fit(module: nn.Module, state: State, file: Path) -> None:
    """Stops where weights are not those of a module.

    Raises:
        ValueError: Names what differs.
    """
    if wrong := differences(module, state):
        raise ValueError(
            f"The weights in {file} do not fit the network and the cut of config.yaml: "
            f"{listed(text for _, text in wrong)}. They are of another run, or "
            "`model` was changed."
        )
