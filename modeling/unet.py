"""The conditional video UNet: from noisy latents and a condition to a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import BadInput
from ..options import check
from .attention import Activations, CrossAttention, Positions, SelfAttention, zero
from .blocks import (
    Attention,
    ConditionMaps,
    ConditionTokens,
    Convolution,
    Design,
    Embedding,
    Level,
    Normalisation,
    ResidualBlock,
    make_conv,
    make_norm,
    timestep_embedding,
    upsample_to,
)
from .settings import PRESETS, AttentionBackend, Conditioning


class VideoUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' mixins disagree
    """A UNet over frames, rows and columns, for any number of frames, any height and any width.

    The defaults make the efficient network: convolutions split into space and time (R(2+1)D, Tran
    et al. 2018), attention over time at every level and over space at the coarsest. `presets` has
    named networks, among them the paper's.

    Args:
        latent_channels: Channels of the latents, in and out.
        condition_channels: Channels of the condition: masked latents, and the mask if it is used.
        block_out_channels: The width of each level; each level halves height and width.
        layers_per_block: Residual blocks of a level on the way down; one more on the way up.
        head_channels: The width of an attention head.
        norm_groups: Groups of the group normalisation.
        conditioning: How the condition enters. "concatenation": with the latents, on channels;
            "cross_attention": wherever there is attention, to tokens of its patches; "adaptive":
            as scale and shift of every place in every residual block.
        convolution: Over space and then time ("split"), or over all three axes ("joint").
        attention: For each level and then for the middle: "none", over "time", over "space", over
            "both", one after the other, or "joint" over all places of all frames. None means over
            time at every level, and over both at the coarsest and in the middle.
        heads: Attention heads at every level, instead of heads of equal width.
        positions: How attention knows where a token is: rotary positions along each axis
            ("axial"), in the tokens' sequence ("flat"), or not at all ("none").
        normalisation: Over each "frame" alone, or over the whole "clip".
        middle_blocks: Residual blocks in the middle, with attention after the first.
        upsample_convolution: Whether a convolution follows each upsampling.

    Raises:
        BadInput: A level's width is not a multiple of the heads or the groups, heads are too
            narrow for positions along three axes, or an option has an unknown value.
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
        conditioning: Conditioning = "concatenation",
        convolution: Convolution = "split",
        attention: Sequence[Attention] | None = None,
        heads: int | None = None,
        positions: Positions = "flat",
        normalisation: Normalisation = "frame",
        middle_blocks: int = 1,
        upsample_convolution: bool = False,
    ) -> None:
        super().__init__()
        depths = len(block_out_channels)
        design = Design(
            widths=block_out_channels,
            attention=[*(attention or ["time"] * (depths - 1) + ["both", "both"])],
            middle_blocks=middle_blocks,
            norm_groups=norm_groups,
            head_channels=head_channels,
            heads=heads,
            conditioning=conditioning,
            convolution=convolution,
            normalisation=normalisation,
            positions=positions,
        )
        check(design)
        _check_widths(design)
        _check_attention(design)
        self.gradient_checkpointing = False
        base = self.base = design.base
        self.layers = layers_per_block
        self.embed = nn.Sequential(
            nn.Linear(base, 4 * base), nn.SiLU(), nn.Linear(4 * base, 4 * base)
        )
        concatenated = condition_channels if conditioning == "concatenation" else 0
        self.conv_in = make_conv(design, latent_channels + concatenated, base)
        skips = self._make_descent(design)
        deepest = design.widths[-1]
        self.middle = Level(design, deepest, deepest, design.attention[-1])
        self._make_ascent(design, skips, upsample_convolution)
        self.norm_out = make_norm(design, base)
        self.conv_out = zero(make_conv(design, base, latent_channels))
        self.middle_rest = nn.ModuleList(
            ResidualBlock(design, deepest, deepest) for _ in range(middle_blocks - 1)
        )
        self.condition: nn.Module | None = None
        if conditioning == "cross_attention":
            self.condition = ConditionTokens(condition_channels, base, 2 ** (depths - 1))
        elif conditioning == "adaptive":
            self.condition = ConditionMaps(condition_channels, base, depths)

    def _make_descent(self, design: Design) -> list[int]:
        """Make the levels on the way down; return the channels of what is kept for the way up."""
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        channels = design.base
        skips = [channels]
        for depth, width in enumerate(design.widths):
            for _ in range(self.layers):
                self.down.append(Level(design, channels, width, design.attention[depth]))
                channels = width
                skips.append(channels)
            if depth < len(design.widths) - 1:
                self.downsample.append(make_conv(design, channels, channels, stride=2))
                skips.append(channels)
        return skips

    def _make_ascent(self, design: Design, skips: list[int], upsample_convolution: bool) -> None:
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        channels = design.widths[-1]
        for depth, width in reversed([*enumerate(design.widths)]):
            for _ in range(self.layers + 1):
                joined = channels + skips.pop()
                self.up.append(Level(design, joined, width, design.attention[depth]))
                channels = width
            if depth > 0:
                after = make_conv(design, channels, channels) if upsample_convolution else None
                self.upsample.append(after or nn.Identity())

    def forward(
        self,
        latents: Float[Tensor, "batch frames channels height width"],
        timestep: Num[Tensor, "batch *frames"],
        condition: Float[Tensor, "batch frames condition height width"],
    ) -> Float[Tensor, "batch frames channels height width"]:
        """Predict the target at each example's own timestep.

        Args:
            latents: Noisy, normalised latents.
            timestep: One diffusion timestep per example, or one per frame; 0 is the least noisy.
            condition: What is known: masked latents (and the mask), without noise.
        """
        embedding = self.embed(timestep_embedding(timestep, self.base).to(latents.dtype))
        if timestep.ndim == 1:
            embedding = embedding[:, None]
        conditions = self._conditions(condition)
        seen = latents if self.condition is not None else torch.cat([latents, condition], dim=2)
        x = self.conv_in(rearrange(seen, "b f c h w -> b f h w c").contiguous())
        x, skips = self._descend(x, embedding, conditions)
        x = self._run(self.middle, x, embedding, conditions[-1])
        for block in self.middle_rest:
            x = self._run(block, x, embedding, conditions[-1])
        x = self._ascend(x, skips, embedding, conditions)
        x = self.conv_out(nn.functional.silu(self.norm_out(x)))
        return rearrange(x, "b f h w c -> b f c h w")

    def _conditions(
        self, condition: Float[Tensor, "batch frames condition height width"]
    ) -> Sequence[Tensor | None]:
        """What each depth gets of the condition beside its input."""
        depths = len(self.downsample) + 1
        if self.condition is None:
            return [None] * depths
        features = self.condition(rearrange(condition, "b f c h w -> b f h w c").contiguous())
        return features if isinstance(features, list) else [features] * depths

    def _descend(
        self, x: Activations, embedding: Embedding, conditions: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor]]:
        skips = [x]
        for index, level in enumerate(self.down):
            depth, layer = divmod(index, self.layers)
            x = self._run(level, x, embedding, conditions[depth])
            skips.append(x)
            if layer == self.layers - 1 and depth < len(self.downsample):
                x = self.downsample[depth](x)
                skips.append(x)
        return x, skips

    def _ascend(
        self,
        x: Activations,
        skips: list[Tensor],
        embedding: Embedding,
        conditions: Sequence[Tensor | None],
    ) -> Tensor:
        for index, level in enumerate(self.up):
            risen, layer = divmod(index, self.layers + 1)
            skip = skips.pop()
            if risen > 0 and layer == 0:
                x = self.upsample[risen - 1](upsample_to(x, skip.shape[2], skip.shape[3]))
            joined = torch.cat([x, skip], dim=-1)
            x = self._run(level, joined, embedding, conditions[-1 - risen])
        return x

    def _run(
        self, block: nn.Module, x: Tensor, embedding: Tensor, condition: Tensor | None
    ) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return checkpoint(block, x, embedding, condition, use_reentrant=False)
        return block(x, embedding, condition)

    def set_attention_backend(self, backend: str) -> None:
        """Use "xformers", "sdpa" or "reference" for all attention, or "auto" for one that works.

        This replaces diffusers' method, which looks for diffusers' own layers. A backend that does
        not work is refused when it is first used.

        Raises:
            BadInput: There is no such backend.
        """
        if backend not in get_args(AttentionBackend):
            choices = ", ".join(get_args(AttentionBackend))
            raise BadInput(f"the attention backend is {backend!r}: give one of {choices}")
        for module in self.modules():
            if isinstance(module, SelfAttention | CrossAttention):
                module.backend = cast(AttentionBackend, backend)

    def reset_attention_backend(self) -> None:
        """Use one that works."""
        self.set_attention_backend("auto")

    def set_use_memory_efficient_attention_xformers(
        self, valid: bool, attention_op: Any = None
    ) -> None:
        """What diffusers' `enable_xformers_memory_efficient_attention` calls."""
        self.set_attention_backend("xformers" if valid else "auto")


def _check_attention(design: Design) -> None:
    given, levels = len(design.attention), len(design.widths)
    if given != levels + 1:
        raise BadInput(
            f"attention has {given} entries for {levels} levels: "
            f"give {levels + 1}, one for each level and one for the middle"
        )
    if design.conditioning == "cross_attention" and set(design.attention) == {"none"}:
        raise BadInput(
            "conditioning is 'cross_attention', but attention is 'none' everywhere: "
            "give a level attention, or another conditioning"
        )


def _check_widths(design: Design) -> None:
    divisors = {"norm_groups": design.norm_groups}
    divisors |= {"heads": design.heads} if design.heads else {"head_channels": design.head_channels}
    rotates_axes = design.positions == "axial" or design.conditioning == "cross_attention"
    for width in design.widths:
        for name, divisor in divisors.items():
            if width % divisor:
                raise BadInput(
                    f"block_out_channels has {width}, which is no multiple of {name} ({divisor}): "
                    f"give multiples of it, or another {name}"
                )
        channels = width // design.heads_of(width)
        if rotates_axes and (channels % 2 or channels < 6):
            raise BadInput(
                f"heads of {channels} channels cannot tell three axes apart: "
                "give an even head_channels of at least 6, or fewer heads"
            )


def build(name: str, latent_channels: int, condition_channels: int, **changes: Any) -> VideoUNet:
    """A new network with random weights; `changes` are options that differ from the preset's.

    Raises:
        BadInput: There is no such preset.
    """
    if name not in PRESETS:
        raise BadInput(f"no preset {name!r}: give one of {', '.join(PRESETS)}")
    return VideoUNet(latent_channels, condition_channels, **PRESETS[name] | changes)
