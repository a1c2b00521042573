"""The precision that a network's layers compute in; inputs and outputs are float32."""

from __future__ import annotations

import torch

from .settings import Precision


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which a network's layers compute in `precision`; weights stay as they are."""
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")
