"""Memory-efficient self-attention with rotary positions, over any one axis or group of axes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Pre-normalised multi-head self-attention over the token axis, added to its input.

    The output layer starts at zero, so that a fresh block is the identity. Scores are never
    materialised: `scaled_dot_product_attention` picks the fused kernel of the device.
    """

    def __init__(self, channels: int, head_channels: int, rotary: bool) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.rotary = rotary
        self.norm = nn.LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(
        self, tokens: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch tokens channels"]:
        query, key, value = rearrange(
            self.to_qkv(self.norm(tokens)),
            "b n (three heads d) -> three b heads n d",
            three=3,
            d=self.head_channels,
        )
        if self.rotary:
            query, key = rotate_by_position(query), rotate_by_position(key)
        attended = attend(query, key, value)
        return tokens + self.to_out(rearrange(attended, "b heads n d -> b n (heads d)"))


def attend(
    query: Float[Tensor, "batch heads tokens channels"],
    key: Float[Tensor, "batch heads tokens channels"],
    value: Float[Tensor, "batch heads tokens channels"],
) -> Float[Tensor, "batch heads tokens channels"]:
    """Scaled dot-product attention by the fused kernel that suits the device."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value)
    # The CPU's bfloat16 kernel is many times slower than its float32 one on short sequences.
    with torch.autocast("cpu", enabled=False):
        attended = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    return attended.to(value.dtype)


def rotate_by_position(
    x: Float[Tensor, "batch heads tokens channels"], base: float = 1000.0
) -> Float[Tensor, "batch heads tokens channels"]:
    """Rotary position embedding (Su et al. 2021, Eq. 34): scores then depend on distances alone.

    A clip of a length not seen in training therefore still works.
    """
    tokens, half = x.shape[-2], x.shape[-1] // 2
    frequency = base ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    position = torch.arange(tokens, device=x.device, dtype=torch.float32)
    angle = position[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
