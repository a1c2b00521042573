"""How many trajectories a device samples at a time."""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Sequence

import torch

from ..errors import BadInput
from ..modeling.denoiser import Denoiser
from .sampler import Condition, Request

CAPACITY = 16  # slots on the CPU


def find_capacity(denoiser: Denoiser, requests: Sequence[Request]) -> int:
    """The number of slots that samples the requests fastest.

    As many as an accelerator's memory holds, found by trying; `CAPACITY` on the CPU. Never more
    than it takes to end with the longest program, as more would not end sooner.
    """
    nfes = [request.program.nfe for request in requests]
    fewest = math.ceil(sum(nfes) / max(nfes))
    useful = next(slots for slots in itertools.count(fewest) if _calls(nfes, slots) == max(nfes))
    condition = requests[0].condition()
    if condition.device.type == "cpu":
        return min(useful, CAPACITY)
    return largest_batch(denoiser, condition, useful)


def _calls(nfes: Sequence[int], slots: int) -> int:
    """Network calls until all have ended, if the longest start first."""
    ends = [0] * slots
    for nfe in sorted(nfes, reverse=True):
        heapq.heapreplace(ends, ends[0] + nfe)
    return max(ends)


def share_capacity(capacity: int, requests: Sequence[Request], processes: int) -> int:
    """The slots for a process: no more than it needs, and than leave work for the others."""
    capacity = min(capacity, max(1, len(requests)))
    if processes == 1 or not requests:
        return capacity
    nfes = [request.program.nfe for request in requests]
    return min(capacity, math.ceil(sum(nfes) / max(nfes) / processes))


def largest_batch(denoiser: Denoiser, condition: Condition, most: int) -> int:
    """The most examples, 1 to `most`, that the network evaluates at once without running out.

    An eighth more are tried than are returned, to leave memory for everything else.

    Raises:
        BadInput: not even one fits.
    """

    def fits(count: int) -> bool:
        try:
            _evaluate(denoiser, condition, math.ceil(count * 9 / 8))
        except torch.OutOfMemoryError:
            return False
        return True

    fitting, failing = 0, most + 1
    while failing - fitting > 1:
        tried = min(max(1, 2 * fitting), (fitting + failing) // 2)
        fitting, failing = (tried, failing) if fits(tried) else (fitting, tried)
    if not fitting:
        raise BadInput(
            f"one example does not fit into the memory of {condition.device}: "
            "take a larger device, or precision bfloat16"
        )
    return fitting


def time_evaluation(denoiser: Denoiser, condition: Condition, slots: int) -> float:
    """Wall seconds of one network call on `slots` trajectories, the second of two."""
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        _evaluate(denoiser, condition, slots)
        if condition.device.type == "cuda":
            torch.cuda.synchronize(condition.device)
        seconds = time.perf_counter() - began
    return seconds


@torch.no_grad()
def _evaluate(denoiser: Denoiser, condition: Condition, count: int) -> None:
    """Call the network once on `count` trajectories."""
    frames, _, height, width = condition.shape
    latents = condition.new_zeros(count, frames, len(denoiser.space.mean), height, width)
    timestep = torch.zeros(count, dtype=torch.long, device=condition.device)
    denoiser.denoise(latents, timestep, condition.repeat(count, 1, 1, 1, 1))
