"""The conditional video UNet: noisy latents and their condition in, a prediction out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..jobs import BadInput
from .blocks import FrameNorm, Level, SpatialConv, timestep_embedding, upsample_to


class VideoUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' mixins disagree
    """A UNet over frames, rows and columns, conditioned by concatenation on channels.

    Convolutions are split into space and time (R(2+1)D, Tran et al. 2018); every level attends
    over time, the coarsest also over space. Any number of frames and any height and width work.

    Args:
        latent_channels: Channels of the latents, in and out.
        condition_channels: Channels of the condition: masked latents, and the mask where used.
        block_out_channels: Width of each level; each level halves height and width.
        layers_per_block: Residual blocks of a level on the way down; one more on the way up.
        head_channels: Width of an attention head.
        norm_groups: Groups of the group normalisation.

    Raises:
        BadInput: A level's width is no multiple of the head's or of the groups.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        condition_channels: int = 4,
        block_out_channels: Sequence[int] = (64, 128),
        layers_per_block: int = 1,
        head_channels: int = 32,
        norm_groups: int = 16,
    ) -> None:
        super().__init__()
        _check_widths(block_out_channels, head_channels, norm_groups)
        base = block_out_channels[0]
        embedding = 4 * base
        self.gradient_checkpointing = False
        self.embed = nn.Sequential(
            nn.Linear(base, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.conv_in = SpatialConv(latent_channels + condition_channels, base)

        def level(channels_in: int, depth: int) -> Level:
            coarsest = depth == len(block_out_channels) - 1
            return Level(
                channels_in,
                block_out_channels[depth],
                embedding,
                norm_groups,
                head_channels,
                over_space=coarsest,
            )

        self.down = nn.ModuleList()
        self.downsample = nn.ModuleList()
        channels, skips = base, [base]
        for depth, width in enumerate(block_out_channels):
            for _ in range(layers_per_block):
                self.down.append(level(channels, depth))
                channels = width
                skips.append(channels)
            if depth < len(block_out_channels) - 1:
                self.downsample.append(SpatialConv(channels, channels, stride=2))
                skips.append(channels)
        self.middle = level(channels, len(block_out_channels) - 1)
        self.up = nn.ModuleList()
        for depth in reversed(range(len(block_out_channels))):
            for _ in range(layers_per_block + 1):
                self.up.append(level(channels + skips.pop(), depth))
                channels = block_out_channels[depth]
        self.norm_out = FrameNorm(norm_groups, channels)
        self.conv_out = SpatialConv(channels, latent_channels)
        nn.init.zeros_(self.conv_out.weight)
        if self.conv_out.bias is not None:
            nn.init.zeros_(self.conv_out.bias)

    def forward(
        self,
        latents: Float[Tensor, "batch frames channels height width"],
        timestep: Num[Tensor, " batch"],
        condition: Float[Tensor, "batch frames condition height width"],
    ) -> Float[Tensor, "batch frames channels height width"]:
        """Predict the target at each example's own timestep.

        Args:
            latents: Noisy, normalised latents.
            timestep: One diffusion timestep an example, 0 the least noisy.
            condition: What is known: masked latents (and the mask), never noised.
        """
        width = self.config["block_out_channels"][0]
        embedding = self.embed(timestep_embedding(timestep, width).to(latents.dtype))
        x = rearrange(torch.cat([latents, condition], dim=2), "b f c h w -> b f h w c")
        x = self.conv_in(x.contiguous())
        x, skips = self._descend(x, embedding)
        x = self._run(self.middle, x, embedding)
        x = self._ascend(x, skips, embedding)
        x = self.conv_out(nn.functional.silu(self.norm_out(x)))
        return rearrange(x, "b f h w c -> b f c h w")

    def _descend(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        layers = self.config["layers_per_block"]
        skips = [x]
        for index, level in enumerate(self.down):
            x = self._run(level, x, embedding)
            skips.append(x)
            depth, last = divmod(index + 1, layers)
            if last == 0 and depth <= len(self.downsample):
                x = self.downsample[depth - 1](x)
                skips.append(x)
        return x, skips

    def _ascend(self, x: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        for level in self.up:
            skip = skips.pop()
            if skip.shape[2:4] != x.shape[2:4]:
                x = upsample_to(x, skip.shape[2], skip.shape[3])
            x = self._run(level, torch.cat([x, skip], dim=-1), embedding)
        return x

    def _run(self, level: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return checkpoint(level, x, embedding, use_reentrant=False)
        return level(x, embedding)


def _check_widths(widths: Sequence[int], head_channels: int, norm_groups: int) -> None:
    for width in widths:
        for name, divisor in (("head_channels", head_channels), ("norm_groups", norm_groups)):
            if width % divisor:
                raise BadInput(
                    f"block_out_channels has {width}, no multiple of {name} ({divisor}): "
                    f"give multiples of it, or another {name}"
                )
