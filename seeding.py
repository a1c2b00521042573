"""Randomness derived from what it is for, never from global state."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed that is a pure function of `parts`, the same on every machine and version.

    By convention the parts are the user's seed, what is drawn for (a clip's key, a position), and
    the purpose: `derive_seed(config.seed, position, "timestep")`.
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: str | int) -> torch.Generator:
    """A CPU `torch.Generator` seeded by `derive_seed(*parts)`.

    Draw on the CPU and move the result, so that a draw does not depend on the device.
    """
    import torch

    return torch.Generator().manual_seed(derive_seed(*parts))
