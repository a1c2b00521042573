"""Named networks, and what each costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput
from .unet import VideoUNet


@dataclass(frozen=True)
class Preset:
    """A named network."""

    summary: str  # what it is for, in one line
    options: Mapping[str, Any]  # of VideoUNet


# RaMViD's network (Höppe et al. 2022, appendix): what its two sizes share.
_RAMVID = {
    "layers_per_block": 2,
    "norm_groups": 32,
    "heads": 4,
    "convolution": "joint",
    "positions": "none",
    "normalisation": "clip",
    "middle_blocks": 2,
    "upsample_convolution": True,
}

_BIG = {"layers_per_block": 2, "head_channels": 64, "norm_groups": 32, "positions": "axial"}

PRESETS = {
    "tiny": Preset(
        "for tests and laptops",
        {
            "block_out_channels": (32, 64, 128),
            "attention": ("time", "both", "joint", "joint"),
            "positions": "axial",
        },
    ),
    "mini": Preset(
        "below 10 MB at half precision: the model that the package carries",
        {
            "block_out_channels": (96, 96, 160),
            "attention": ("none", "time", "joint", "joint"),
            "positions": "axial",
        },
    ),
    "small": Preset(
        "for a single small GPU, or a patient CPU",
        {
            "block_out_channels": (128, 128, 256),
            "attention": ("none", "time", "joint", "joint"),
            "positions": "axial",
        },
    ),
    "base": Preset(
        "of the size of ramvid-32, at less than half its operations",
        {
            "block_out_channels": (128, 256, 512, 512),
            "attention": ("time", "both", "joint", "joint", "joint"),
            **_BIG,
        },
    ),
    "large": Preset(
        "for many GPUs and much data",
        {
            "block_out_channels": (256, 512, 768, 1024),
            "attention": ("time", "both", "joint", "joint", "joint"),
            **_BIG,
        },
    ),
    "ramvid-32": Preset(
        "the paper's network, for latents of 32×32",
        {
            "block_out_channels": (128, 256, 256, 256),
            "attention": ("none", "joint", "joint", "none", "joint"),
            **_RAMVID,
        },
    ),
    "ramvid-64": Preset(
        "the paper's network, for latents of 64×64",
        {
            "block_out_channels": (128, 256, 384, 512),
            "attention": ("none", "none", "joint", "joint", "joint"),
            **_RAMVID,
        },
    ),
}


def build(name: str, latent_channels: int, condition_channels: int, **changes: Any) -> VideoUNet:
    """A fresh network of a preset.

    Args:
        name: Of the preset.
        latent_channels: Channels of the latents, in and out.
        condition_channels: Channels of the condition, the mask among them where it is one.
        changes: Options of VideoUNet that are to differ from the preset's, such as conditioning.

    Raises:
        BadInput: There is no such preset.
    """
    if name not in PRESETS:
        raise BadInput(f"no preset {name!r}: give one of {', '.join(PRESETS)}")
    options = {**PRESETS[name].options, **changes}
    return VideoUNet(latent_channels, condition_channels, **options)
