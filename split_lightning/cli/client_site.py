"""A client's process: builds its part of a configuration, and serves it."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors.torch import save_file

from split_lightning.cli.building import build_data, build_module, choose_threads
from split_lightning.cli.client_keys import read_client
from split_lightning.engines.answers import Answers
from split_lightning.engines.grpc_client import GrpcClient
from split_lightning.engines.journal import Journal


def serve(cfg: DictConfig, number: str) -> None:
    """Computes for a client, until the server ends the run.

    Args:
        cfg: The configuration.
        number: The client, such as `3`, or `3.1` for a holder of parts.
    """
    name, engine = f"client-{number}", cfg.engine
    folder = Path(engine.folder or Path("runs", cfg.name, name))
    answers, agreed = new_answers(cfg, folder)
    client = GrpcClient(
        name, engine.server, engine.certificates, agreed, engine.patience
    )
    client.serve(answers)
    weights = answers.site.weights_of(f"client/{number}")
    save_file(weights, folder / "client.safetensors")


def new_answers(cfg: DictConfig, folder: Path) -> tuple[Answers, dict[str, str]]:
    """Builds a site; returns what answers for it, and what it has to agree on.

    Args:
        cfg: The configuration of the run.
        folder: Where it saves its state.
    """
    cfg.module.engine = None
    data = build_data(cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    module = build_module(cfg)
    protocol = instantiate(cfg.protocol, _convert_="all")
    site = module.as_site(data, protocol)
    choose_threads(cfg, module, data)
    return Answers(site, Journal(folder)), module.agreed(data)


def worker_answers(folder: str, name: str) -> tuple[Answers, dict[str, str]]:
    """Builds the site of a worker, from the folder of the run's sites.

    Args:
        folder: The folder, with the configuration.
        name: The worker.
    """
    cfg = read_client(Path(folder, "config.yaml"))
    return new_answers(cfg, Path(folder, name))
