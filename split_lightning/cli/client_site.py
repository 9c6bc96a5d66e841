"""A client's process: builds its part of a configuration, and serves it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from split_lightning.cli.building import build_data, build_module, choose_threads
from split_lightning.cli.config import check_classes, check_values, conf_folder
from split_lightning.cli.data_shape import leave_out_shape
from split_lightning.engines.answers import Answers
from split_lightning.engines.grpc_client import GrpcClient
from split_lightning.engines.journal import Journal


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
    cfg = compose_client(str(Path(folder, "config.yaml")), [])
    return new_answers(cfg, Path(folder, name))
