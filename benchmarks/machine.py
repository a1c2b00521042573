"""What every benchmark shares: the machine it runs on, clocks, peak memory, and spreads."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import diffusers
import torch
import vidfill

Result = TypeVar("Result")
Spread = tuple[float, float, float]  # median, least, most

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LIBC = ctypes.CDLL(None)


def processor() -> str:
    """The processor's model."""
    listed = Path("/proc/cpuinfo")
    text = listed.read_text() if listed.is_file() else ""
    named = re.search(r"model name\s*: (.+)", text)
    return named[1] if named else platform.processor() or platform.machine()


def describe(device: torch.device) -> str:
    """Versions and hardware."""
    versions = (
        f"vidfill {vidfill.__version__}, diffusers {diffusers.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    hardware = f"{processor()}, {torch.get_num_threads()} thread(s)"
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)}; {hardware}"
    return f"{versions}\n{hardware}"


def clock(device: torch.device, processor_time: bool) -> float:
    """Wall or processor seconds, once all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if processor_time else time.perf_counter()


def summarise(values: Sequence[float]) -> Spread:
    """Median, least, most."""
    return statistics.median(values), min(values), max(values)


def spread(values: Spread, style: str) -> str:
    middle, least, most = (style.format(value) for value in values)
    return f"{middle} ({least}–{most})"


# Memory


def in_new_process(function: Callable[..., Result], *given: object) -> Result:
    """The result of a module-level function, called in a new process where nothing ran before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_return_freed_memory) as pool:
        return pool.submit(function, *given).result()


def _return_freed_memory() -> None:
    """At once, so that a peak counts only what is held; like glibc's MALLOC_MMAP_THRESHOLD_."""
    _LIBC.mallopt(M_MMAP_THRESHOLD, 65536)


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """The most bytes that `work` adds to what was held before it.

    On a GPU, bytes of tensors; on the CPU, resident bytes, which needs Linux.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    _LIBC.malloc_trim(0)  # otherwise free memory would be reused, and not counted
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    work()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
