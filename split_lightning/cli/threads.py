"""Threads: how many a run computes with, and how they wait."""

from __future__ import annotations

import os

# Floating-point operations of a training step, from which on a second thread pays.
_WORTH_A_SECOND_THREAD = 2e9
_VARIABLE = "OMP_NUM_THREADS"


def wait_passively() -> None:
    """Lets idle threads of OpenMP sleep; they spin by default, and block other work.

    OpenMP reads this when torch is imported. A value that is set already stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def set_threads(threads: int | None, flops: float) -> str:
    """Sets the number of threads that torch computes with.

    Args:
        threads: The number; `None`: one for a small network, or else torch's default,
            which is the number of cores. `OMP_NUM_THREADS` overrides both.
        flops: Floating-point operations of a training step, which decide what is small.

    Returns:
        The number and its reason, as one line.
    """
    import torch

    variable = os.environ.get(_VARIABLE)
    if variable:
        reason = f"{_VARIABLE} is set"
        if threads is not None and str(threads) != variable:
            reason += f", and overrides threads={threads}"
    elif threads is not None:
        torch.set_num_threads(threads)
        reason = "as configured"
    elif flops < _WORTH_A_SECOND_THREAD:
        torch.set_num_threads(1)
        reason = f"the network is small: {flops / 1e9:.2g} GFLOPs a step"
    else:
        reason = f"all cores: {flops / 1e9:.2g} GFLOPs a step"
    return f"threads: {torch.get_num_threads()} ({reason})"
