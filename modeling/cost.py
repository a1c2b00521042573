"""What a network costs: parameters, operations, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .attention import attention_backend
from .precision import autocast
from .settings import PRESETS, Precision
from .unet import VideoUNet, build


@dataclass(frozen=True)
class Cost:
    """What one clip costs in a network."""

    parameters: int
    multiply_adds: int  # of matrix products, convolutions and attention, in a forward pass
    kept_bytes: int  # of activations that a forward pass keeps for the backward pass

    @property
    def training_operations(self) -> int:
        """Of a forward and a backward pass, which costs as much as two forward passes."""
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
    """The cost of the network that `make` makes, on one clip; only shapes are computed."""
    attention_backend("cpu", getattr(torch, precision))  # its probe needs real tensors

    def forward(network: VideoUNet) -> Tensor:
        channels = network.config["latent_channels"], network.config["condition_channels"]
        latents, condition = (torch.empty(1, frames, c, height, width) for c in channels)
        return network(latents, torch.zeros(1), condition)

    with FakeTensorMode():
        network = make()
        kept = _kept_bytes(network, lambda: forward(network), precision)
    with torch.device("meta"):
        network = make()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward(network)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Cost(parameters, counter.get_total_flops() // 2, kept)


def _kept_bytes(network: VideoUNet, forward: Callable[[], Tensor], precision: Precision) -> int:
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
        output = forward()
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
