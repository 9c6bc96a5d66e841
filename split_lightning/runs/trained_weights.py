"""The trained weights of a run, loaded from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from split_lightning.models.weights import read_torch
from split_lightning.module import SplitLightningModule
from split_lightning.paths import path_of
from split_lightning.runs.network_files import load_networks, require_fit
from split_lightning.training.resumption import num_live, require_format


def restore(
    module: SplitLightningModule, folder: str | Path, checkpoint: str | None
) -> None:
    """Loads the trained weights of all networks of a run.

    Raises:
        ValueError: If a file is missing or damaged, or does not fit.
    """
    folder = path_of(folder)
    if checkpoint is None:
        load_networks(module, folder)
        return
    file = checkpoint_file(folder, checkpoint)
    content = _content_of(file)
    require_format(content)
    module.engine.make_room(num_live(content))
    require_fit(module, content["state_dict"], file)
    module.load_state_dict(content["state_dict"])
    device = next(module.parameters()).device
    module.engine.load_state_dict(content["engine"], device)


def choose_network(module: SplitLightningModule, client: int | None) -> None:
    """Gives all clients the network of one.

    Args:
        module: The module of a run, restored.
        client: The client; `None` where there is one network for all.

    Raises:
        ValueError: If `client` is needed, or has no network of its own; lists those
            that have.
    """
    clients = module.networks.representatives()
    if len(clients) > 1 and client not in clients:
        raise ValueError(
            f"Expected argument `client` to be one of {', '.join(map(str, clients))}: "
            "clients of this run have networks of their own, and each of these stands "
            f"for one that differs; but got {'none' if client is None else client}."
        )
    if len(clients) <= 1 and client is not None:
        raise ValueError(
            f"`client={client}` would change nothing: all clients of this run have the "
            "same network. Leave it out."
        )
    module.networks.keep_only(module.engine.last_client if client is None else client)


def checkpoint_file(folder: Path, checkpoint: str) -> Path:
    """Returns the file of a checkpoint that is named as in the folder, or by its path.

    Raises:
        ValueError: If there is none.
    """
    kept = folder / "checkpoints"
    for file in (kept / f"{checkpoint}.ckpt", path_of(checkpoint)):
        if file.is_file():
            return file
    names = ", ".join(sorted(path.stem for path in kept.glob("*.ckpt"))) or "none"
    raise ValueError(
        f"Expected argument `checkpoint` to be a checkpoint of {folder} (it has: "
        f"{names}) or a file, but got {checkpoint!r}."
    )


def _content_of(file: Path) -> dict[str, Any]:
    content = read_torch(file)
    parts = ("state_dict", "engine")
    if isinstance(content, dict) and "state_dict" in content:
        require_format(content)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(part), dict) for part in parts
    ):
        raise ValueError(f"Expected {file} to be a checkpoint of a run.")
    return content
