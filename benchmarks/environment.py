"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
import torchvision


def describe() -> str:
    """Returns versions, processor, threads and load, in a few lines."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, pytorch-lightning {pl.__version__}\n"
        f"{_cpu_name()}, {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}; GPU: {device}\n"
        f"threads used: {torch.get_num_threads()}; "
        f"load average before the run: {load}"
    )


def _cpu_name() -> str:
    """Returns the processor's name, and whether it computes in bfloat16."""
    info = Path("/proc/cpuinfo")
    if not (sys.platform == "linux" and info.is_file()):
        return platform.processor() or platform.machine()
    text = info.read_text()
    names = [line for line in text.splitlines() if line.startswith("model name")]
    name = names[0].split(":", 1)[1].strip() if names else platform.machine()
    has_bf16 = "avx512_bf16" in text or "amx_bf16" in text
    return f"{name} ({'has' if has_bf16 else 'no'} bfloat16 instructions)"
