"""The parts of the video UNet.

Activations are "batch frames height width channels", contiguous. Spatial convolution sees them as a
channels-last batch of images, temporal convolution as images of frames by places, and attention as
token sequences; all of these are views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Num
from torch import Tensor, nn

from ..options import PositiveInt
from .attention import Activations, CrossAttention, Over, Positions, SelfAttention, zero
from .settings import Conditioning

ChannelsLast = Float[Tensor, "batch rows columns channels"]
Widened = Float[Tensor, "batch frames height width channels_out"]
Resized = Float[Tensor, "batch frames height_out width_out channels"]
Convolved = Float[Tensor, "batch frames height_out width_out channels_out"]
Embedding = Float[Tensor, "batch frames_or_1 embedding"]

Attention = Literal["none", "time", "space", "both", "joint"]
Convolution = Literal["split", "joint"]
Normalisation = Literal["frame", "clip"]


@dataclass(frozen=True)
class Design:
    """What all levels of a network share; see `VideoUNet`."""

    widths: Sequence[PositiveInt]  # of the levels
    attention: Sequence[Attention]  # at each level, and in the middle
    middle_blocks: PositiveInt
    norm_groups: PositiveInt
    head_channels: PositiveInt
    heads: int | None
    conditioning: Conditioning
    convolution: Convolution
    normalisation: Normalisation
    positions: Positions

    @property
    def base(self) -> int:
        """Channels of the first level and of a condition's features; an embedding has 4 times."""
        return self.widths[0]

    def heads_of(self, channels: int) -> int:
        """Attention heads at a level of that width."""
        return self.heads or channels // self.head_channels


def timestep_embedding(
    timestep: Num[Tensor, "batch *frames"], channels: int
) -> Float[Tensor, "batch *frames channels"]:
    """Sinusoids of the timestep (Vaswani et al. 2017, section 3.5, as in DDPM)."""
    half = channels // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=timestep.device) / half)
    angle = timestep.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


# Normalisation


class FrameNorm(nn.GroupNorm):
    """GroupNorm over each frame alone: its result does not depend on the clip's length."""

    images = "(b f) h w c"

    def forward(self, x: Activations) -> Activations:
        images = rearrange(x, f"b f h w c -> {self.images}")
        return group_norm(self, images).view(x.shape)


class ClipNorm(FrameNorm):
    """GroupNorm over all frames of a clip together, as in the paper's network."""

    images = "b f (h w) c"


def group_norm(norm: nn.GroupNorm, x: ChannelsLast) -> ChannelsLast:
    """Group normalisation of channels-last images (Wu & He 2018, Eq. 1 and 7)."""
    # On CUDA torch's own kernel copies to channels-first and back. On the CPU its backward pass
    # crashes if the weight needs a gradient and the input does not, as after frozen layers.
    after_frozen = torch.is_grad_enabled() and norm.weight.requires_grad and not x.requires_grad
    if x.is_cuda or after_frozen:
        return group_norm_by_moments(norm, x)
    channels_first = rearrange(x, "b h w c -> b c h w")
    normed = F.group_norm(channels_first, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return rearrange(normed, "b c h w -> b h w c").contiguous()


def group_norm_by_moments(norm: nn.GroupNorm, x: ChannelsLast) -> ChannelsLast:
    """The same from mean and variance in float32: compiled, one reduction and one map."""
    grouped = rearrange(x.float(), "b h w (g c) -> b h w g c", g=norm.num_groups)
    variance, mean = torch.var_mean(grouped, dim=(1, 2, 4), correction=0, keepdim=True)
    normed = ((grouped - mean) * torch.rsqrt(variance + norm.eps)).view(x.shape)
    return (normed * norm.weight + norm.bias).to(x.dtype)


def make_norm(design: Design, channels: int) -> nn.GroupNorm:
    """The normalisation before a convolution."""
    kind = ClipNorm if design.normalisation == "clip" else FrameNorm
    return kind(design.norm_groups, channels)


# Convolution


def framewise(function: Callable[[Tensor], Tensor], x: Activations) -> Convolved:
    """Apply a function of channels-last images to every frame."""
    images = function(rearrange(x, "b f h w c -> (b f) c h w"))
    return rearrange(images, "(b f) c h w -> b f h w c", b=x.shape[0])


class SpatialConv(nn.Conv2d):
    """A 3×3 convolution of every frame."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel_size=3, stride=stride, padding=1)

    def forward(self, x: Activations) -> Convolved:
        return framewise(super().forward, x)


class TemporalConv(nn.Linear):
    """A convolution over three frames at each place, with the weight of one matrix product."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(3 * channels_in, channels_out)

    def forward(self, x: Activations) -> Widened:
        height = x.shape[2]
        # Kernels for two dimensions, frames by places, are faster than those for three.
        image = rearrange(x, "b f h w c -> b c f (h w)")
        kernel = rearrange(self.weight, "o (k i) -> o i k 1", k=3)
        image = F.conv2d(image, kernel, self.bias, padding=(1, 0))
        return rearrange(image, "b c f (h w) -> b f h w c", h=height)


class JointConv(nn.Conv3d):
    """A 3×3×3 convolution over frames, rows and columns."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        strides = (1, stride, stride)
        super().__init__(channels_in, channels_out, kernel_size=3, stride=strides, padding=1)

    def forward(self, x: Activations) -> Convolved:
        clip = super().forward(rearrange(x, "b f h w c -> b c f h w"))
        return rearrange(clip, "b c f h w -> b f h w c")


def make_conv(
    design: Design, channels_in: int, channels_out: int, stride: int = 1
) -> SpatialConv | JointConv:
    """A convolution over space, or over all three axes."""
    kind = JointConv if design.convolution == "joint" else SpatialConv
    return kind(channels_in, channels_out, stride)


# Levels


class ResidualBlock(nn.Module):
    """Two convolutions, modulated by the timestep between them, added to the input.

    The first is over space and the second over time, or both over all three axes. An adaptive
    condition's features modulate each place too: spatially adaptive normalisation (Park et al.
    2019, Eq. 1).
    """

    def __init__(self, design: Design, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm_in = make_norm(design, channels_in)
        self.spatial = make_conv(design, channels_in, channels_out)
        self.modulation = nn.Linear(4 * design.base, 2 * channels_out)
        self.norm_mid = make_norm(design, channels_out)
        kind = TemporalConv if design.convolution == "split" else JointConv
        self.temporal: nn.Module = zero(kind(channels_out, channels_out))
        same = channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Linear(channels_in, channels_out)
        self.place_modulation = None
        if design.conditioning == "adaptive":
            self.place_modulation = zero(nn.Linear(design.base, 2 * channels_out))

    def forward(
        self,
        x: Activations,
        embedding: Embedding,
        condition: Float[Tensor, "batch frames _ _ condition"] | None = None,
    ) -> Widened:
        hidden = self.spatial(F.silu(self.norm_in(x)))
        modulation = rearrange(self.modulation(F.silu(embedding)), "b f c -> b f 1 1 c")
        if self.place_modulation is not None:
            modulation = modulation + self.place_modulation(condition)
        scale, shift = modulation.chunk(2, dim=-1)
        hidden = self.temporal(F.silu(self.norm_mid(hidden) * (1 + scale) + shift))
        return self.shortcut(x) + hidden


class SpaceTimeAttention(nn.Module):
    """Attention over time, space or both, and then to the condition's tokens if it has any."""

    def __init__(self, design: Design, channels: int, over: Attention) -> None:
        super().__init__()
        heads, clip = design.heads_of(channels), design.normalisation == "clip"

        def attention(axes: Over) -> SelfAttention:
            norm = ClipNorm(design.norm_groups, channels) if clip else nn.LayerNorm(channels)
            return SelfAttention(channels, norm, heads, axes, design.positions, bias=clip)

        self.over_time = attention("time") if over in ("time", "both") else None
        self.over_space = attention("space") if over in ("space", "both") else None
        self.over_all = attention("joint") if over == "joint" else None
        self.over_condition = None
        if design.conditioning == "cross_attention" and over != "none":
            norm = nn.LayerNorm(channels)
            self.over_condition = CrossAttention(channels, norm, heads, design.base)

    def forward(
        self, x: Activations, condition: Float[Tensor, "batch frames _ _ condition"] | None = None
    ) -> Activations:
        for attention in (self.over_time, self.over_space, self.over_all):
            if attention is not None:
                x = attention(x)
        return x if self.over_condition is None else self.over_condition(x, condition)


class Level(nn.Module):
    """One residual block followed by attention: the unit that the UNet is made of."""

    def __init__(
        self, design: Design, channels_in: int, channels_out: int, attention: Attention
    ) -> None:
        super().__init__()
        self.block = ResidualBlock(design, channels_in, channels_out)
        self.attention = SpaceTimeAttention(design, channels_out, attention)

    def forward(
        self,
        x: Activations,
        embedding: Embedding,
        condition: Float[Tensor, "batch frames _ _ condition"] | None = None,
    ) -> Widened:
        return self.attention(self.block(x, embedding, condition), condition)


def upsample_to(x: Activations, height: int, width: int) -> Resized:
    """Nearest-neighbour upsampling of every frame to a given size, which may be odd."""
    return framewise(lambda images: F.interpolate(images, size=(height, width)), x)


# The condition


class ConditionTokens(nn.Module):
    """The condition's frames as tokens of patches, for cross-attention."""

    def __init__(self, channels_in: int, channels_out: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv2d(channels_in, channels_out, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(channels_out)

    def forward(self, x: Activations) -> Convolved:
        _, _, height, width, _ = x.shape
        whole = F.pad(x, (0, 0, 0, -width % self.patch, 0, -height % self.patch))
        return self.norm(framewise(self.embed, whole))


class ConditionMaps(nn.Module):
    """The condition's features at the size of each level, for adaptive normalisation."""

    def __init__(self, channels_in: int, channels_out: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.embed = SpatialConv(channels_in, channels_out)

    def forward(self, x: Activations) -> list[Float[Tensor, "batch frames _ _ channels_out"]]:
        maps = [F.silu(self.embed(x))]
        for _ in range(self.levels - 1):
            maps.append(halve(maps[-1]))
        return maps


def halve(x: Activations) -> Resized:
    """Means of 2×2 places; an odd height or width is rounded up, as in the UNet's own steps."""
    pool = nn.AvgPool2d(kernel_size=2, ceil_mode=True, count_include_pad=False)
    return framewise(pool, x)
