"""`ray_engine`: the engine of a run whose clients are on a Ray cluster."""

from __future__ import annotations

from split_lightning.engine_options import check_options
from split_lightning.engines.engine import Engine
from split_lightning.engines.ray_sites import RaySites


def ray_engine(
    address: str | None = None,
    workers: int = 2,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> Engine:
    """Returns an engine whose clients are computed by the workers of a Ray cluster.

    Args:
        address: The cluster: `auto` or `HOST:PORT`; `None`: a new one on this machine.
        workers: Number of workers.
        num_cpus: Number of CPUs that Ray reserves for each worker.
        num_gpus: Number of GPUs; a part of one for workers that share it.

    Raises:
        ImportError: If Ray is not installed.
        ValueError: If an option is wrong.
    """
    check_options(
        {
            "address": address,
            "workers": workers,
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
        }
    )
    return Engine(sites=RaySites(address, workers, num_cpus, num_gpus))
