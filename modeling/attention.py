"""Attention over frames, places or both, without ever holding its scores.

Tokens are "batch tokens heads channels": views of "batch frames height width channels" activations,
whatever is attended over. Over time, the heads of each place count as heads of their own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import BadInput, say
from .settings import AttentionBackend

Tokens = Float[Tensor, "batch tokens heads channels"]
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
Backend = Literal["xformers", "sdpa", "reference"]

HEADS_PER_CALL = 65_535  # the most blocks along a CUDA grid's second and third axis
# What "auto" tries, in this order; on other devices sdpa.
AUTOMATIC: dict[str, tuple[Backend, ...]] = {"cuda": ("xformers", "sdpa")}


def attend(
    query: Tokens,
    key: Float[Tensor, "batch keys heads channels"],
    value: Float[Tensor, "batch keys heads channels"],
    choice: AttentionBackend = "auto",
) -> Tokens:
    """softmax(q · k / √channels) · v of each head (Vaswani et al. 2017, Eq. 1).

    Raises:
        BadInput: The chosen backend does not work here.
    """
    kernel = _KERNELS[attention_backend(query.device.type, query.dtype, choice)]
    if query.shape[2] <= HEADS_PER_CALL:
        return kernel(query, key, value)
    parts = zip(*(x.split(HEADS_PER_CALL, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([kernel(*part) for part in parts], dim=2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's own: flash, memory-efficient or cuDNN attention, whichever fits."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    # The CPU's bfloat16 kernel is many times slower than its float32 one on short sequences.
    with torch.autocast("cpu", enabled=False):
        q, k, v = (_at_least_float32(x) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v)
    return attended.to(value.dtype).transpose(1, 2)


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention  # slow, and warns where it cannot work

    return memory_efficient_attention(query, key, value)


def _reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The formula as written; it holds all scores in memory."""
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = (_at_least_float32(x) for x in (query, key, value))
        scores = torch.einsum("b q n d, b k n d -> b n q k", q, k) * q.shape[-1] ** -0.5
        attended = torch.einsum("b n q k, b k n d -> b q n d", scores.softmax(dim=-1), v)
    return attended.to(value.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


_KERNELS: dict[Backend, Kernel] = {
    "xformers": _xformers,
    "sdpa": _sdpa,
    "reference": _reference,
}


# Which kernel


@torch.compiler.assume_constant_result  # so that a compiled network never traces the probe
def attention_backend(
    device: str, dtype: torch.dtype, choice: AttentionBackend = "auto"
) -> Backend:
    """The backend that attention uses, found by a real forward and backward pass; printed once.

    Raises:
        BadInput: `choice` does not work on that type of device, or, if it is "auto", nothing does.
    """
    return _find_backend(device, dtype, choice)


@functools.cache
def _find_backend(device: str, dtype: torch.dtype, choice: AttentionBackend) -> Backend:
    candidates = AUTOMATIC.get(device, ("sdpa",)) if choice == "auto" else (choice,)
    faults: list[str] = []
    for backend in candidates:
        fault = None if device == "meta" else _fault(backend, device, dtype)
        if fault is None:
            if len(candidates) > 1:
                because = f" ({'; '.join(faults)})" if faults else ""
                say(f"vidfill: attention in {dtype} by {backend}{because}")
            return backend
        faults.append(f"{backend} does not work: {fault}")
    raise BadInput(f"attention on {device} in {dtype}: {'; '.join(faults)}: give another, or auto")


def _fault(backend: Backend, device: str, dtype: torch.dtype) -> str | None:
    try:
        found = _forward_and_backward(_KERNELS[backend], device, dtype)
    except Exception as error:  # each kernel raises its own kind where it cannot run
        return (str(error).splitlines() or [type(error).__name__])[0]
    expected = _forward_and_backward(_reference, device, dtype)
    # Values are near 1: a wrong layout is far off, rounding in bfloat16 is not.
    near = [torch.allclose(a, b, atol=0.05) for a, b in zip(found, expected, strict=True)]
    return None if all(near) else "its results differ from the reference's"


@torch.inference_mode(False)
@torch.enable_grad()
def _forward_and_backward(kernel: Kernel, device: str, dtype: torch.dtype) -> list[Tensor]:
    # Sines: a probe must not advance anyone's random numbers.
    waves = torch.arange(3 * 2 * 48 * 2 * 32, device=device).sin().to(dtype)
    inputs = list(rearrange(waves, "(x b t n d) -> x b t n d", x=3, b=2, t=48, n=2).unbind())
    inputs = [x.requires_grad_() for x in inputs]
    with torch.autocast(device, enabled=False):
        attended = kernel(*inputs)
        gradients = torch.autograd.grad(attended.float().square().sum(), inputs)
    return [x.detach().float() for x in (attended, *gradients)]


# Positions

ROTARY_BASE = 1000.0  # the ratio of the fastest frequency to the slowest


def angles(
    positions: Sequence[Float[Tensor, " _"]], channels: int
) -> Float[Tensor, "*grid 1 half"]:
    """Rotary angles of every point of a grid, given its positions along each axis.

    Each axis rotates an equal share of a head's `channels`, an even number; the first also the
    remainder (Su et al. 2021, Eq. 15, with a base that suits the lengths of clips).
    """
    share, rest = divmod(channels // 2, len(positions))
    grid = [len(position) for position in positions]
    turned = []
    for axis, position in enumerate(positions):
        count = share + rest if axis == 0 else share
        frequency = ROTARY_BASE ** -(torch.arange(count, device=position.device) / max(count, 1))
        shape = [-1 if other == axis else 1 for other in range(len(grid))]
        turned.append((position.view(*shape, 1) * frequency).expand(*grid, count))
    return torch.cat(turned, dim=-1).unsqueeze(-2)


def rotate(
    x: Float[Tensor, "*batch heads channels"], angle: Float[Tensor, "*grid 1 half"]
) -> Float[Tensor, "*batch heads channels"]:
    """Rotary position embedding (Su et al. 2021, Eq. 34): scores depend on distances alone.

    So clips of lengths not seen in training still work.
    """
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # faster than joining the two halves
    return torch.addcmul(x * torch.cat([cos, cos], dim=-1), swapped, torch.cat([-sin, sin], dim=-1))


# Layers

Activations = Float[Tensor, "batch frames height width channels"]
Heads = Float[Tensor, "batch frames height width heads head_channels"]
Over = Literal["time", "space", "joint"]
Layer = TypeVar("Layer", bound=nn.Module)
Positions = Literal["flat", "axial", "none"]

_TOKENS: dict[Over, str] = {
    "time": "b f (h w n) d",
    "space": "(b f) (h w) n d",
    "joint": "b (f h w) n d",
}
_AXES: dict[Over, slice] = {"time": slice(1, 2), "space": slice(2, 4), "joint": slice(1, 4)}


class Projections(nn.Linear):
    """Several projections of one input with one weight, each a tensor of its own.

    Slices of a single product would have gaps between places, so tokens over time would be copies.
    """

    def __init__(self, channels_in: int, channels_out: int, count: int, bias: bool) -> None:
        super().__init__(channels_in, count * channels_out, bias=bias)
        self.count = count

    def forward(  # type: ignore[override]  # a Linear gives one tensor
        self, x: Activations
    ) -> Sequence[Float[Tensor, "batch frames height width channels_out"]]:
        weights = self.weight.chunk(self.count)
        biases = [None] * self.count if self.bias is None else self.bias.chunk(self.count)
        return [F.linear(x, *parts) for parts in zip(weights, biases, strict=True)]


class SelfAttention(nn.Module):
    """Pre-normalised self-attention over some axes of a clip, added to its input.

    The output layer starts at zero, so that a new layer is the identity.

    Args:
        norm: Applied first; it belongs to this layer.
        heads: Parts of the channels, each of which attends separately.
        over: The frames at each place, the places of each frame, or all places of all frames.
        positions: Of the tokens along each axis ("axial"), in their sequence ("flat"), or none.
        bias: Whether query, key and value have one.
    """

    def __init__(
        self,
        channels: int,
        norm: nn.Module,
        heads: int,
        over: Over,
        positions: Positions,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.backend: AttentionBackend = "auto"
        self.heads, self.over, self.positions = heads, over, positions
        self.norm = norm
        self.to_qkv = Projections(channels, channels, 3, bias)
        self.to_out = zero(nn.Linear(channels, channels))

    def forward(self, x: Activations) -> Activations:
        query, key, value = (split_heads(part, self.heads) for part in self.to_qkv(self.norm(x)))
        if self.positions != "none":
            angle = self._angle(query)
            query, key = rotate(query, angle), rotate(key, angle)
        return x + self.to_out(attend_over(self.over, query, key, value, self.backend))

    def _angle(self, query: Heads) -> Float[Tensor, "*grid 1 half"]:
        grid, channels = query.shape[_AXES[self.over]], query.shape[-1]
        lengths = [math.prod(grid)] if self.positions == "flat" else grid
        positions = [
            torch.arange(length, device=query.device, dtype=torch.float32) for length in lengths
        ]
        angle = angles(positions, channels).view(*grid, 1, channels // 2)
        return angle[:, None, None] if self.over == "time" else angle


class CrossAttention(nn.Module):
    """Attention of every place of every frame to the condition's tokens, added to its input.

    Positions refer to the tokens' grid at every level, so that places keep their meaning.
    """

    def __init__(self, channels: int, norm: nn.Module, heads: int, condition: int) -> None:
        super().__init__()
        self.backend: AttentionBackend = "auto"
        self.heads = heads
        self.norm = norm
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_kv = Projections(condition, channels, 2, bias=False)
        self.to_out = zero(nn.Linear(channels, channels))

    def forward(
        self, x: Activations, condition: Float[Tensor, "batch frames rows columns condition"]
    ) -> Activations:
        query = split_heads(self.to_q(self.norm(x)), self.heads)
        key, value = (split_heads(part, self.heads) for part in self.to_kv(condition))
        grid = key.shape[1:4]
        query, key = rotate_on(query, grid), rotate_on(key, grid)
        return x + self.to_out(attend_over("joint", query, key, value, self.backend))


def attend_over(
    over: Over,
    query: Heads,
    key: Float[Tensor, "batch key_frames rows columns heads head_channels"],
    value: Float[Tensor, "batch key_frames rows columns heads head_channels"],
    choice: AttentionBackend,
) -> Activations:
    """Attention of a clip's places over some of its axes; the tokens are views."""
    tokens = _TOKENS[over]
    q, k, v = (rearrange(x, f"b f h w n d -> {tokens}") for x in (query, key, value))
    attended = attend(q, k, v, choice)
    _, f, h, w, n, _ = query.shape
    return rearrange(attended, f"{tokens} -> b f h w (n d)", f=f, h=h, w=w, n=n)


def rotate_on(x: Heads, grid: Sequence[int]) -> Heads:
    """Rotate by the places of `x` on a coarser or finer grid over the same clip."""
    positions = [
        (torch.arange(own, device=x.device, dtype=torch.float32) + 0.5) * (other / own)
        for own, other in zip(x.shape[1:4], grid, strict=True)
    ]
    return rotate(x, angles(positions, x.shape[-1]))


def split_heads(x: Activations, heads: int) -> Heads:
    """Channels split into heads of equal width; a view."""
    return rearrange(x, "b f h w (n d) -> b f h w n d", n=heads)


def zero(layer: Layer) -> Layer:
    """The same layer, all its parameters set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
