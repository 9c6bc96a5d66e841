"""A case in a process of its own, and the memory of a process."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

MIB = 2**20


def peak_rss(whose: int = resource.RUSAGE_SELF) -> int:
    """Returns the largest resident set of this process, in bytes, or of `whose`."""
    peak = resource.getrusage(whose).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def run_alone(script: str, case: list[str]) -> list[float]:
    """Runs a case in a process of its own; returns its figures."""
    # NOTE Linux hands the parent's peak down: this process must only ever import.
    command = [sys.executable, script, *case]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    figures: list[float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def reset_peak() -> None:
    """Lets the next `peak_since_reset` begin at what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_since_reset() -> int:
    """Returns this process's largest resident set since `reset_peak`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) * 1024
