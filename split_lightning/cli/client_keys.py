"""The configuration of a client: its own keys, and those that its server tells."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from split_lightning.cli.config import check_classes, check_values, conf_folder
from split_lightning.cli.data_shape import leave_out_shape
from split_lightning.cli.engine_keys import check_client, check_engine, with_grpc
from split_lightning.cli.shared_keys import joined_words

# All keys of a run, for clients on the machine of the process with the Trainer.
KEYS = "keys.yaml"
_logger = logging.getLogger(__name__)


def compose_client(number: str, words: Sequence[str]) -> DictConfig:
    """Returns the configuration of a client; asks its server for the run's keys.

    Args:
        number: The client, such as `3`.
        words: What was typed for the client.

    Raises:
        ConnectionError: If the server does not answer.
        ValueError: If a key is wrong, or missing.
    """
    name, own = f"client-{number}", with_grpc(words, "client")
    cfg = _composed(own)
    check_engine(cfg)
    check_client(cfg, words, name)
    from split_lightning.engines.grpc_words import words_of_run  # imports torch

    engine = cfg.engine
    told = words_of_run(name, engine.server, engine.certificates, engine.patience)
    _logger.info("%s has the server's keys: %s", name, " ".join(told) or "none")
    joined = joined_words(told, own)
    cfg = _composed(joined)
    check_values(cfg, joined)
    leave_out_shape(cfg)
    check_classes(cfg)
    return cfg


def read_client(config: str | Path, words: Sequence[str] = ()) -> DictConfig:
    """Returns the configuration of a client that the process with the Trainer starts.

    Args:
        config: A file with all keys.
        words: Changes to them.
    """
    loaded = OmegaConf.load(config)
    merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(words)))
    assert isinstance(merged, DictConfig)
    return merged


def _composed(words: Sequence[str]) -> DictConfig:
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        return compose("train", ["output_dir=client", *words])
