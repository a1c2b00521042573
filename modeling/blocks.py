"""The parts of the video UNet.

Activations are "batch frames height width channels", contiguous: spatial convolution sees them as
a channels-last image batch, temporal convolution and attention as token sequences, all as views.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Num
from torch import Tensor, nn

from .attention import SelfAttention

Activations = Float[Tensor, "batch frames height width channels"]
Widened = Float[Tensor, "batch frames height width channels_out"]


def timestep_embedding(
    timestep: Num[Tensor, " batch"], channels: int
) -> Float[Tensor, "batch channels"]:
    """Sinusoids of the timestep (Vaswani et al. 2017, section 3.5, as in DDPM)."""
    half = channels // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=timestep.device) / half)
    angle = timestep.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class FrameNorm(nn.GroupNorm):
    """GroupNorm over each frame alone: a frame's result is not tied to the clip's length."""

    def forward(self, x: Activations) -> Activations:
        batch = x.shape[0]
        frames = rearrange(x, "b f h w c -> (b f) c h w")
        return rearrange(super().forward(frames), "(b f) c h w -> b f h w c", b=batch)


class SpatialConv(nn.Conv2d):
    """A 3×3 convolution of every frame."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel_size=3, stride=stride, padding=1)

    def forward(
        self, x: Activations
    ) -> Float[Tensor, "batch frames height_out width_out channels_out"]:
        batch = x.shape[0]
        frames = rearrange(x, "b f h w c -> (b f) c h w")
        return rearrange(super().forward(frames), "(b f) c h w -> b f h w c", b=batch)


class TemporalConv(nn.Linear):
    """A convolution over three frames at each place, as one matrix product."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(3 * channels_in, channels_out)

    def forward(self, x: Activations) -> Widened:
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1))
        neighbours = torch.cat([padded[:, :-2], x, padded[:, 2:]], dim=-1)
        return super().forward(neighbours)


class ResidualBlock(nn.Module):
    """A spatial then a temporal convolution, modulated by the timestep, added to the input."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.norm_in = FrameNorm(groups, channels_in)
        self.spatial = SpatialConv(channels_in, channels_out)
        self.modulation = nn.Linear(embedding, 2 * channels_out)
        self.norm_mid = FrameNorm(groups, channels_out)
        self.temporal = TemporalConv(channels_out, channels_out)
        nn.init.zeros_(self.temporal.weight)
        nn.init.zeros_(self.temporal.bias)
        same = channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Linear(channels_in, channels_out)

    def forward(self, x: Activations, embedding: Float[Tensor, "batch embedding"]) -> Widened:
        hidden = self.spatial(F.silu(self.norm_in(x)))
        scale, shift = rearrange(
            self.modulation(F.silu(embedding)), "b (two c) -> two b 1 1 1 c", two=2
        )
        hidden = self.temporal(F.silu(self.norm_mid(hidden) * (1 + scale) + shift))
        return self.shortcut(x) + hidden


class SpaceTimeAttention(nn.Module):
    """Attention over the frames at each place and, where asked, over the places of each frame."""

    def __init__(self, channels: int, head_channels: int, over_space: bool) -> None:
        super().__init__()
        self.over_time = SelfAttention(channels, head_channels, rotary=True)
        self.over_space = (
            SelfAttention(channels, head_channels, rotary=True) if over_space else None
        )

    def forward(self, x: Activations) -> Activations:
        batch, frames, height, width, _ = x.shape
        tokens = self.over_time(rearrange(x, "b f h w c -> (b h w) f c"))
        x = rearrange(tokens, "(b h w) f c -> b f h w c", b=batch, h=height, w=width)
        if self.over_space is not None:
            tokens = self.over_space(rearrange(x, "b f h w c -> (b f) (h w) c"))
            x = rearrange(tokens, "(b f) (h w) c -> b f h w c", b=batch, f=frames, h=height)
        return x


class Level(nn.Module):
    """One residual block followed by attention: the unit from which the UNet is made."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        embedding: int,
        groups: int,
        head_channels: int,
        over_space: bool,
    ) -> None:
        super().__init__()
        self.block = ResidualBlock(channels_in, channels_out, embedding, groups)
        self.attention = SpaceTimeAttention(channels_out, head_channels, over_space)

    def forward(self, x: Activations, embedding: Float[Tensor, "batch embedding"]) -> Widened:
        return self.attention(self.block(x, embedding))


def upsample_to(
    x: Activations, height: int, width: int
) -> Float[Tensor, "batch frames height_out width_out channels"]:
    """Nearest-neighbour upsampling of every frame to a given size, odd ones included."""
    batch = x.shape[0]
    frames = rearrange(x, "b f h w c -> (b f) c h w")
    frames = F.interpolate(frames, size=(height, width), mode="nearest")
    return rearrange(frames, "(b f) c h w -> b f h w c", b=batch)
