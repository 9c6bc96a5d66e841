"""The final networks of a run, in its folder: one, or one per client.

A segment that is the same for all is `client.safetensors`, `server.safetensors` or
`network.safetensors`; one that differs is in `networks/CLIENT_ID`, for one client of
each network.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from split_lightning.models.weights import NETWORKS, differences, listed, read_state
from split_lightning.module import SplitLightningModule
from split_lightning.paths import absence
from split_lightning.runs.artifacts import save_segment
from split_lightning.store import State


def save_networks(
    module: SplitLightningModule,
    folder: Path,
    metadata: Mapping[str, str],
    role: str | None = None,
) -> None:
    """Writes the trained networks of a run; removes those that were there before.

    Args:
        module: The trained module.
        folder: The run's folder.
        metadata: What a reader must know: network, cut layer, classes, versions.
        role: The role of the parties whose layers are written; `None`: of all.

    Raises:
        OSError: If a file cannot be written.
    """
    shutil.rmtree(folder / NETWORKS, ignore_errors=True)
    clients = module.networks.representatives()
    apart = module.networks.names_apart(clients)
    first, layers_of = clients[0] if clients else None, module.networks.layers
    for name, layers in layers_of(first, role).items():
        if name in apart:
            (folder / f"{name}.safetensors").unlink(missing_ok=True)
        else:
            save_segment(layers, folder / f"{name}.safetensors", metadata)
    for client_id in clients:
        own = folder / NETWORKS / str(client_id)
        own.mkdir(parents=True)
        for name, layers in layers_of(client_id, role).items():
            if name in apart and name in module.networks.names_of(client_id):
                about = {**metadata, "client": str(client_id)}
                save_segment(layers, own / f"{name}.safetensors", about)


def load_networks(module: SplitLightningModule, folder: Path) -> None:
    """Loads the final networks of a run.

    Raises:
        ValueError: If a file is missing or damaged, or does not fit.
    """
    clients = sorted(int(path.name) for path in folder.glob(f"{NETWORKS}/*"))
    own: dict[str, dict[int, State]] = {}
    for name, layers in module.segments().items():
        common = folder / f"{name}.safetensors"
        if common.is_file() or not clients:
            state = _fitting(layers, common)
            layers.load_state_dict(state)
            own[name] = dict.fromkeys(clients, state)
            continue
        folders = {k: folder / NETWORKS / str(k) for k in clients}
        own[name] = {
            k: _fitting(layers, path / f"{name}.safetensors")
            for k, path in folders.items()
            if name in module.networks.names_of(k)
        }
    module.engine.forget()
    module.networks.put(own)


def _fitting(segment: nn.Module, file: Path) -> State:
    """Returns the weights in a file, after a look that they fit."""
    if not file.is_file():
        raise ValueError(
            f"Expected a run that has ended, but {absence(file)}. A checkpoint of "
            "it is named with checkpoint=last. A client with `engine.server` writes "
            "this file to its own folder: put it here."
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
