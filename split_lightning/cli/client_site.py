"""A client's process: builds its part of a configuration, and serves it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from split_lightning.cli.building import (
    build_data,
    build_module,
    choose_threads,
    metadata_of,
)
from split_lightning.cli.client_keys import KEYS, read_client
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.engines.answers import Answers
from split_lightning.engines.grpc_client import GrpcClient, Segments
from split_lightning.engines.hello import Hello
from split_lightning.engines.journal import Journal
from split_lightning.engines.remote import client_of_site
from split_lightning.engines.site import Site
from split_lightning.module import SplitLightningModule
from split_lightning.runs.artifacts import save_tensors
from split_lightning.training.fitness import check_network

_logger = logging.getLogger(__name__)


def serve(cfg: DictConfig, number: str) -> None:
    """Computes for a client, until the server ends the run.

    Args:
        cfg: The configuration.
        number: The client, such as `3`, or `3.1` for a holder of some features.
    """
    name, options = f"client-{number}", cfg.engine
    folder = Path(options.folder or Path("runs", cfg.name, name))
    client = client_of_site(name)
    sole_client = client if options.own_data else None
    site = new_site(cfg, [client], cfg.trainer.accelerator, sole_client)
    answers = Answers(site.site, Journal(folder))
    says = site.module.hello(site.data, [client])
    connection = GrpcClient(
        name, options.server, options.certificates, says, options.patience
    )
    metadata = metadata_of(cfg, site.data)

    def end(final: Segments) -> None:
        """Writes this client's part of the final network."""
        by_layers: dict[str, Segments] = {}
        for segment, party in final:
            layers = site.module.topology.names[segment]
            by_layers.setdefault(layers, []).append((segment, party))
        for layers, segments in by_layers.items():
            file = folder / f"{layers}.safetensors"
            save_tensors(site.site.weights_of(segments), file, metadata)
            _logger.info("The run is complete; the trained weights are in %s.", file)
        if not final:
            _logger.info("The run is complete; %s was absent at the end.", name)

    connection.serve(answers, end)


class NewSite(NamedTuple):
    """A site, and what it was built from."""

    site: Site
    module: SplitLightningModule
    data: SplitDataModule


def new_site(
    cfg: DictConfig,
    clients: Sequence[int],
    accelerator: str,
    sole_client: int | None = None,
) -> NewSite:
    """Builds a site.

    Args:
        cfg: The configuration of the run.
        clients: The clients that it computes for.
        accelerator: What it computes on: `auto`, `cpu` or `gpu`.
        sole_client: The client that has all samples of the source; `None`: they are
            partitioned.
    """
    data = build_data(cfg, sole_client=sole_client)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    module = build_module(cfg, None)
    check_network(module, data)
    protocol = instantiate(cfg.protocol, _convert_="all")
    device = _device(accelerator)
    site = module.as_site(data, protocol, len(clients), device)
    choose_threads(cfg, module, data)
    return NewSite(site, module, data)


def _device(accelerator: str) -> torch.device:
    """Returns what a site computes on, which has no Trainer.

    Raises:
        ValueError: If it is not there.
    """
    has_gpu = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not has_gpu:
        raise ValueError(
            f"Expected a GPU for `trainer.accelerator={accelerator}`, but torch finds "
            "none here. Set `trainer.accelerator=cpu`; for workers on a Ray cluster, "
            "reserve GPUs with `engine.num_gpus`."
        )
    names = ("auto", "cpu", "gpu", "cuda")
    if accelerator not in names:
        raise ValueError(
            "Expected `trainer.accelerator` of a client to be one of "
            f"{', '.join(names)}, but got {accelerator!r}."
        )
    return torch.device("cuda" if has_gpu and accelerator != "cpu" else "cpu")


def worker_answers(
    folder: str, name: str, clients: Sequence[int]
) -> tuple[Answers, Hello]:
    """Builds the site of a worker, from the folder of the run's sites.

    Args:
        folder: The folder, with the configuration.
        name: The worker.
        clients: The clients that it computes for.
    """
    cfg = read_client(Path(folder, KEYS))
    accelerator = cfg.trainer.accelerator
    if not cfg.engine.num_gpus:
        accelerator = "cpu"
    elif accelerator == "auto":
        accelerator = "gpu"
    site = new_site(cfg, clients, accelerator)
    says = site.module.hello(site.data, range(cfg.num_clients))
    return Answers(site.site, Journal(Path(folder, name))), says
