"""diffusers' two video networks at the size of our preset `small`, called like ours.

Both keep the proportions of diffusers' widths and its kinds of blocks (attention at all levels but
the coarsest). Widths are a tenth of the defaults, with one layer per block, which makes about 10 M
parameters. The condition is joined to the noisy latents on channels, like the first frame in Stable
Video Diffusion. There is no text and no image to attend to: cross-attention gets one token of
zeros with few channels, to cost as little as possible, and `added_time_ids` (frame rate, motion,
augmentation) are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet3DConditionModel, UNetSpatioTemporalConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn

CONTEXT = 8  # channels of the token that cross-attention gets
HEAD = 32  # channels of an attention head, as in our preset
WIDTHS = (32, 64, 128, 128)  # diffusers' 320, 640, 1280, 1280 in tenths; groups of 32 divide them
TIME_IDS, TIME_ID_CHANNELS = 3, 32

Clip = Float[Tensor, "batch frames channels height width"]
Condition = Float[Tensor, "batch frames condition height width"]


class Convolving(nn.Module):
    """`UNet3DConditionModel`: ModelScope's network, with convolution and attention over time."""

    def __init__(
        self, latent_channels: int, condition_channels: int, widths: Sequence[int] = WIDTHS
    ) -> None:
        super().__init__()
        self.network = UNet3DConditionModel(
            in_channels=latent_channels + condition_channels,
            out_channels=latent_channels,
            block_out_channels=tuple(widths),
            down_block_types=("CrossAttnDownBlock3D",) * (len(widths) - 1) + ("DownBlock3D",),
            up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * (len(widths) - 1),
            layers_per_block=1,
            cross_attention_dim=CONTEXT,
            attention_head_dim=HEAD,
        )

    def forward(self, latents: Clip, timestep: Int[Tensor, " batch"], condition: Condition) -> Clip:
        seen = torch.cat([latents, condition], dim=2).transpose(1, 2)
        context = latents.new_zeros(len(latents), 1, CONTEXT)
        return self.network(seen, timestep, context).sample.transpose(1, 2)


class SpatioTemporal(nn.Module):
    """`UNetSpatioTemporalConditionModel`: Stable Video Diffusion's network."""

    def __init__(
        self, latent_channels: int, condition_channels: int, widths: Sequence[int] = WIDTHS
    ) -> None:
        super().__init__()
        down, up, finer = "DownBlockSpatioTemporal", "UpBlockSpatioTemporal", len(widths) - 1
        self.network = UNetSpatioTemporalConditionModel(
            in_channels=latent_channels + condition_channels,
            out_channels=latent_channels,
            block_out_channels=tuple(widths),
            down_block_types=(f"CrossAttn{down}",) * finer + (down,),
            up_block_types=(up,) + (f"CrossAttn{up}",) * finer,
            layers_per_block=1,
            cross_attention_dim=CONTEXT,
            num_attention_heads=tuple(width // HEAD for width in widths),
            addition_time_embed_dim=TIME_ID_CHANNELS,
            projection_class_embeddings_input_dim=TIME_IDS * TIME_ID_CHANNELS,
        )

    def forward(self, latents: Clip, timestep: Int[Tensor, " batch"], condition: Condition) -> Clip:
        seen = torch.cat([latents, condition], dim=2)
        context = latents.new_zeros(len(latents), 1, CONTEXT)
        time_ids = latents.new_zeros(len(latents), TIME_IDS)
        return self.network(seen, timestep, context, time_ids).sample


PEERS: dict[str, type[Convolving] | type[SpatioTemporal]] = {
    "UNet3DConditionModel": Convolving,
    "UNetSpatioTemporalConditionModel": SpatioTemporal,
}


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
