"""Named networks, and what each costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..jobs import BadInput
from .attention import attention_backend
from .precision import Precision, autocast
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


# What a network costs


@dataclass(frozen=True)
class Cost:
    """What one clip costs a network."""

    parameters: int
    multiply_adds: int  # of matrix products, convolutions and attention, in a forward pass
    kept_bytes: int  # of activations that a forward pass keeps for the backward pass

    @property
    def training_operations(self) -> int:
        """Of a forward and a backward pass, which takes two forward passes' operations."""
        return 3 * 2 * self.multiply_adds


def measure(name: str, frames: int, height: int, width: int) -> Cost:
    """The cost of a preset on one clip of 4-channel latents and a condition of as many."""
    return cost_of(lambda: build(name, 4, 4), frames, height, width)


def cost_of(
    make: Callable[[], VideoUNet],
    frames: int,
    height: int,
    width: int,
    precision: Precision = "float32",
) -> Cost:
    """The cost of the network that `make` makes, on one clip.

    Nothing is computed: shapes alone are followed.
    """
    # Probes with real tensors, which it finds here alone.
    attention_backend("cpu", getattr(torch, precision))
    with FakeTensorMode():
        kept = _kept_bytes(make(), (1, frames, height, width), precision)
    with torch.device("meta"):
        network = make()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            _forward(network, (1, frames, height, width))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Cost(parameters, counter.get_total_flops() // 2, kept)


def _forward(network: VideoUNet, shape: tuple[int, int, int, int]) -> Tensor:
    batch, frames, height, width = shape
    latents = torch.empty(batch, frames, network.config["latent_channels"], height, width)
    condition = torch.empty(batch, frames, network.config["condition_channels"], height, width)
    return network(latents, torch.zeros(batch), condition)


def _kept_bytes(network: VideoUNet, shape: tuple[int, int, int, int], precision: Precision) -> int:
    """Bytes of the distinct tensors that a backward pass needs, without the parameters."""
    owned = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in owned:
            kept[storage] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        autocast(torch.device("cpu"), precision),
    ):
        output = _forward(network, shape)
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def cost_table(names: Sequence[str] = tuple(PRESETS)) -> str:
    """Presets and their costs for 20 frames, as a Markdown table."""
    rows = [
        "| preset | parameters | 16×16: multiply-adds | kept | 32×32: multiply-adds | kept |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        costs = [measure(name, 20, side, side) for side in (16, 32)]
        cells = [f"{c.multiply_adds / 1e9:.1f} G | {c.kept_bytes / 2**20:.0f} MiB" for c in costs]
        rows.append(f"| `{name}` | {costs[0].parameters / 1e6:.2f} M | {' | '.join(cells)} |")
    return "\n".join(rows)
