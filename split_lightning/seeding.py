"""Seeds: one independent stream of random numbers for each purpose and position."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """Returns the seed of one stream: a function of the run's seed and the position.

    So a position is all there is to resume: nothing depends on what was drawn before.

    Args:
        seed: The run's seed.
        purpose: What is drawn, in a word.
        position: Where in the run: round, client, ...

    >>> derive_seed(0, "order", 3, 1) == derive_seed(0, "order", 3, 1)
    True
    >>> derive_seed(0, "order", 3, 1) == derive_seed(0, "order", 1, 3)
    False
    """
    entropy = [seed, zlib.crc32(purpose.encode()), *position]
    (state,) = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return int(state) >> 1  # a positive int64


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """Returns a generator of one stream (see `derive_seed`)."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *position))
