"""Which trajectories are sampled, with which noise, by which process."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from ..examples import condition_of, known_of
from ..sampler import Condition, Known, Request
from .inputs import Inputs
from .kept import (
    Task,
)


def make_requests(inputs: Inputs) -> list[Request]:
    """All that the sampler runs, the longest first, so that none is left running alone."""

    def condition(key: str) -> Condition:
        return condition_of(inputs.denoiser, inputs.dataset[inputs.clips[key]])

    def known(key: str) -> Known:
        return known_of(inputs.denoiser, inputs.dataset[inputs.clips[key]])

    requests = [
        Request(
            *(noise_key(key, completion), name, program, functools.partial(condition, key)),
            known=functools.partial(known, key),
        )
        for name, program in inputs.sampled.items()
        for key in inputs.clips
        for completion in range(inputs.completions)
    ]
    return sorted(requests, key=lambda request: -request.program.nfe)


def noise_key(clip: str, completion: int) -> str:
    """What the noise of a completion depends on: the first one's on the clip's own key alone.

    A dot stands in no clip's key.
    """
    return f"{clip}.{completion}" if completion else clip


def task_of(request: Request) -> Task:
    """What a request of `make_requests` does."""
    clip, _, completion = request.key.partition(".")
    return Task(request.name, clip, int(completion or 0))


def _share_of(capacity: int, requests: Sequence[Request], processes: int) -> int:
    """Slots of one of several processes: no more than leave work for the others."""
    if processes == 1 or not requests:
        return capacity
    nfes = [request.program.nfe for request in requests]
    return min(capacity, math.ceil(sum(nfes) / max(nfes) / processes))
