"""A client's process: builds its part of a configuration, and serves it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from split_lightning.cli.building import (
    build_data,
    build_module,
    choose_threads,
    metadata_of,
)
from split_lightning.cli.config import check_classes, check_values, conf_folder
from split_lightning.cli.data_shape import leave_out_shape
from split_lightning.data.datamodule import SplitDataModule
from split_lightning.engines.answers import Answers
from split_lightning.engines.grpc_client import GrpcClient
from split_lightning.engines.hello import Hello
from split_lightning.engines.journal import Journal
from split_lightning.engines.remote import client_of_site
from split_lightning.engines.site import Site
from split_lightning.module import SplitLightningModule
from split_lightning.runs.artifacts import save_tensors
from split_lightning.training.fitness import check_network

_logger = logging.getLogger(__name__)


def compose_client(config: str | None, words: Sequence[str]) -> DictConfig:
    """Returns the configuration of a client.

    Args:
        config: A file with all keys; `None`: those of `conf`.
        words: What was typed.
    """
    if config is not None:
        loaded = OmegaConf.load(config)
        changes = OmegaConf.from_dotlist(list(words))
        merged = OmegaConf.merge(loaded, changes)
        assert isinstance(merged, DictConfig)
        return merged
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        cfg = compose("train", ["output_dir=client", *words])
    check_values(cfg, list(words))
    leave_out_shape(cfg)
    check_classes(cfg)
    return cfg


def serve(cfg: DictConfig, number: str) -> None:
    """Computes for a client, until the server ends the run.

    Args:
        cfg: The configuration.
        number: The client, such as `3`, or `3.1` for a holder of parts.

    Raises:
        ValueError: If a key is missing.
    """
    for key in ("server", "certificates"):
        if not cfg.engine.get(key):
            raise ValueError(f"Expected `engine.{key}` to be set for a client.")
    name, options = f"client-{number}", cfg.engine
    folder = Path(options.folder or Path("runs", cfg.name, name))
    client = client_of_site(name)
    owner = client if options.own_data else None
    site = new_site(cfg, [client], owner)
    answers = Answers(site.site, Journal(folder))
    says = site.module.hello(site.data, [client])
    connection = GrpcClient(
        name, options.server, options.certificates, says, options.patience
    )
    final = connection.serve(answers)
    metadata = metadata_of(cfg, site.data)
    by_layers: dict[str, list[tuple[int, str]]] = {}
    for segment, party in final:
        layers = site.module.topology.names[segment]
        by_layers.setdefault(layers, []).append((segment, party))
    for layers, segments in by_layers.items():
        file = folder / f"{layers}.safetensors"
        save_tensors(site.site.weights_of(segments), file, metadata)
        _logger.info("The run is complete; the trained weights are in %s.", file)


class NewSite(NamedTuple):
    """A site, and what it was built from."""

    site: Site
    module: SplitLightningModule
    data: SplitDataModule


def new_site(
    cfg: DictConfig, clients: Sequence[int], owner: int | None = None
) -> NewSite:
    """Builds a site.

    Args:
        cfg: The configuration of the run.
        clients: The clients that it computes for.
        owner: The client that has all samples of the source; `None`: they are
            partitioned.
    """
    data = build_data(cfg, owner=owner)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    module = build_module(cfg, None)
    protocol = instantiate(cfg.protocol, _convert_="all")
    site = module.as_site(data, protocol, len(clients))
    check_network(module, data)
    choose_threads(cfg, module, data)
    return NewSite(site, module, data)


def worker_answers(
    folder: str, name: str, clients: Sequence[int]
) -> tuple[Answers, Hello]:
    """Builds the site of a worker, from the folder of the run's sites.

    Args:
        folder: The folder, with the configuration.
        name: The worker.
        clients: The clients that it computes for.
    """
    cfg = compose_client(str(Path(folder, "config.yaml")), [])
    site = new_site(cfg, clients)
    says = site.module.hello(site.data, range(cfg.num_clients))
    return Answers(site.site, Journal(Path(folder, name))), says
