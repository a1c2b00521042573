"""The precision that a network's layers compute in; inputs and outputs are float32."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["float32", "bfloat16", "float16"]


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which a network's layers compute in `precision`; weights stay as they are."""
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")
