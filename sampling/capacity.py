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
from .sampler import Condition, Request, sample
from .schedules.language import parse
from .schedules.program import compile_schedule

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
    """The slots for one of several processes: no more than leave work for the others."""
    if processes == 1 or not requests:
        return capacity
    nfes = [request.program.nfe for request in requests]
    return min(capacity, math.ceil(sum(nfes) / max(nfes) / processes))


@torch.no_grad()
def largest_batch(denoiser: Denoiser, condition: Condition, most: int) -> int:
    """The most examples, 1 to `most`, that the network evaluates at once without running out.

    An eighth more are tried than are returned, to leave memory for everything else.

    Raises:
        BadInput: not even one fits.
    """
    frames, _, height, width = condition.shape
    channels = len(denoiser.space.mean)

    def fits(count: int) -> bool:
        tried = math.ceil(count * 9 / 8)
        latents = condition.new_zeros(tried, frames, channels, height, width)
        timestep = torch.zeros(tried, dtype=torch.long, device=condition.device)
        try:
            denoiser.denoise(latents, timestep, condition.repeat(tried, 1, 1, 1, 1))
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
    program = compile_schedule(parse("ddim:2"), denoiser.timesteps)
    requests = [Request(str(slot), "ddim:2", program, lambda: condition) for slot in range(slots)]
    moments: list[float] = []
    for _ in sample(
        denoiser,
        requests,
        capacity=slots,
        seed=0,
        on_evaluations=lambda count: moments.append(time.perf_counter()),
    ):
        pass
    return moments[1] - moments[0]
