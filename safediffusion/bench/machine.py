"""What the machine can do, and what it is: its best matrix product, its peak of memory, its name."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import torch


def product_rate(device: torch.device, dtype: str, seconds: float = 0.5) -> float:
    """FLOP per second of the best of several square matrix products in `dtype`; the roof that a share is of."""
    size = 8192 if device.type == "cuda" else 1024
    # Not of zeros, which a GPU multiplies at a higher clock.
    one = torch.rand(size, size, generator=torch.Generator().manual_seed(0)).to(device, getattr(torch, dtype))
    best, until = float("inf"), time.perf_counter() + seconds
    with torch.no_grad():
        one @ one  # warms up
        while best == float("inf") or time.perf_counter() < until:
            _wait(device)
            began = time.perf_counter()
            one @ one
            _wait(device)
            best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def forget_peak(device: torch.device) -> None:
    """Peaks are counted from here on, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most memory since `forget_peak`: of the device, or of this process, with everything else that it holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def machine(device: torch.device) -> dict[str, Any]:
    """Device, threads and how busy the machine is (processes that wanted to run in the last minute)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
