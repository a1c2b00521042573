"""Named networks: options of `VideoUNet`. A new one is an entry of `PRESETS` and nothing else."""

from __future__ import annotations

from typing import Any

from ..errors import BadInput
from .unet import VideoUNet

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

PRESETS: dict[str, dict[str, Any]] = {
    # For tests and laptops.
    "tiny": {
        "block_out_channels": (32, 64, 128),
        "attention": ("time", "both", "joint", "joint"),
        "positions": "axial",
    },
    # Below 10 MB in half precision: the model that the package carries.
    "mini": {
        "block_out_channels": (96, 96, 160),
        "attention": ("none", "time", "joint", "joint"),
        "positions": "axial",
    },
    # For a single small GPU, or a patient CPU.
    "small": {
        "block_out_channels": (128, 128, 256),
        "attention": ("none", "time", "joint", "joint"),
        "positions": "axial",
    },
    # The size of ramvid-32, at less than half its operations.
    "base": {
        "block_out_channels": (128, 256, 512, 512),
        "attention": ("time", "both", "joint", "joint", "joint"),
        **_BIG,
    },
    # For many GPUs and much data.
    "large": {
        "block_out_channels": (256, 512, 768, 1024),
        "attention": ("time", "both", "joint", "joint", "joint"),
        **_BIG,
    },
    # The paper's network, for latents of 32×32.
    "ramvid-32": {
        "block_out_channels": (128, 256, 256, 256),
        "attention": ("none", "joint", "joint", "none", "joint"),
        **_RAMVID,
    },
    # The paper's network, for latents of 64×64.
    "ramvid-64": {
        "block_out_channels": (128, 256, 384, 512),
        "attention": ("none", "none", "joint", "joint", "joint"),
        **_RAMVID,
    },
}


def build(name: str, latent_channels: int, condition_channels: int, **changes: Any) -> VideoUNet:
    """A new network with random weights; `changes` are options that differ from the preset's.

    Raises:
        BadInput: There is no such preset.
    """
    if name not in PRESETS:
        raise BadInput(f"no preset {name!r}: give one of {', '.join(PRESETS)}")
    return VideoUNet(latent_channels, condition_channels, **PRESETS[name] | changes)
