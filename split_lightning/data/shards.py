"""Shards of sorted labels that lose no sample."""

from __future__ import annotations

from typing import Any

from flwr_datasets.partitioner import Partitioner, ShardPartitioner


class EvenShardPartitioner(Partitioner):  # type: ignore[misc]  # has no types
    """Sorts the samples by label, and gives each client shards of equal size.

    The scheme of McMahan et al. 2016 (https://arxiv.org/abs/1602.05629), by
    `flwr_datasets.partitioner.ShardPartitioner`. That one rounds the shards' size down
    and drops what is left over; here it is rounded up, and the last shard is smaller.

    Args:
        num_partitions: Number of clients.
        num_shards_per_partition: Number of shards of each client.
        seed: Seeds which client gets which shards.

    Raises:
        ValueError: If `num_shards_per_partition` is not positive.
    """

    def __init__(
        self, num_partitions: int, num_shards_per_partition: int = 2, seed: int = 0
    ) -> None:
        super().__init__()
        if num_shards_per_partition < 1:
            raise ValueError(
                "Expected argument `num_shards_per_partition` to be a positive "
                f"integer, but got {num_shards_per_partition}."
            )
        self._num_partitions = num_partitions
        self._num_shards = num_partitions * num_shards_per_partition
        self._seed = seed
        self._partitioner: ShardPartitioner | None = None

    def load_partition(self, partition_id: int) -> Any:
        """Returns the samples of a client, a `datasets.Dataset`."""
        if self._partitioner is None:
            self._partitioner = ShardPartitioner(
                self._num_partitions,
                partition_by="label",
                shard_size=-(-len(self.dataset) // self._num_shards),
                keep_incomplete_shard=True,
                seed=self._seed,
            )
            self._partitioner.dataset = self.dataset
        return self._partitioner.load_partition(partition_id)

    @property
    def num_partitions(self) -> int:
        """Number of clients."""
        return self._num_partitions
