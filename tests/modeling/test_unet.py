"""The network's laws: shapes, reach, independence of examples, gradients, precision, layout."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vidfill.errors import BadInput
from vidfill.modeling.unet import VideoUNet

# Every option in at least one of them.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "axial": {"attention": ("both", "joint", "joint"), "positions": "axial"},
    "spatial": {"attention": ("space", "none", "time"), "layers_per_block": 2},
    "cross_attention": {"conditioning": "cross_attention"},
    "adaptive": {"conditioning": "adaptive"},
    "papers": {
        "attention": ("none", "joint", "joint"),
        "heads": 4,
        "convolution": "joint",
        "positions": "none",
        "normalisation": "clip",
        "middle_blocks": 2,
        "upsample_convolution": True,
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS)
CONDITIONINGS = ["plain", "cross_attention", "adaptive"]


def small_unet(kind: str = "plain", **changes: object) -> VideoUNet:
    """A small network whose zero-initialised layers were perturbed, so that all of it acts."""
    torch.manual_seed(0)
    options = {"block_out_channels": (16, 32), "head_channels": 8, "norm_groups": 8}
    network = VideoUNet(**options | KINDS[kind] | changes)  # type: ignore[arg-type]
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network


def inputs(
    batch: int = 2, frames: int = 5, height: int = 8, width: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, frames, 4, height, width, generator=generator)
    condition = torch.randn(batch, frames, 4, height, width, generator=generator)
    timestep = torch.randint(1000, (batch,), generator=generator)
    return latents, timestep, condition


def gradients(network: VideoUNet) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in network.named_parameters()}


# What goes in and comes out


@every_kind
@pytest.mark.parametrize(("frames", "height", "width"), [(20, 8, 8), (5, 11, 19), (1, 1, 3)])
def test_output_has_the_shape_of_the_latents(
    kind: str, frames: int, height: int, width: int
) -> None:
    latents, timestep, condition = inputs(1, frames, height, width)
    with torch.no_grad():
        assert small_unet(kind)(latents, timestep, condition).shape == latents.shape


@pytest.mark.parametrize("kind", CONDITIONINGS)
def test_the_mask_may_be_an_extra_channel_of_the_condition(kind: str) -> None:
    latents, timestep, condition = inputs(1)
    mask = torch.ones_like(condition[:, :, :1])
    network = small_unet(kind, condition_channels=5)
    with torch.no_grad():
        with_hole = network(latents, timestep, torch.cat([condition, mask], dim=2))
        without = network(latents, timestep, torch.cat([condition, 0 * mask], dim=2))
    assert with_hole.shape == latents.shape
    assert not torch.allclose(with_hole, without)


@every_kind
def test_every_output_frame_depends_on_every_input_frame(kind: str) -> None:
    network = small_unet(kind)
    latents, timestep, condition = inputs(1, frames=7)
    latents.requires_grad_()
    output = network(latents, timestep, condition)
    for frame in range(7):
        (gradient,) = torch.autograd.grad(
            output[:, frame].square().sum(), latents, retain_graph=True
        )
        assert (gradient.abs().amax(dim=(0, 2, 3, 4)) > 0).all()


@every_kind
def test_output_depends_on_timestep_and_condition(kind: str) -> None:
    network = small_unet(kind)
    latents, timestep, condition = inputs(1)
    with torch.no_grad():
        output = network(latents, timestep, condition)
        assert not torch.allclose(output, network(latents, timestep + 100, condition))
        assert not torch.allclose(output, network(latents, timestep, condition + 1))


@every_kind
def test_output_depends_on_the_condition_at_its_own_place(kind: str) -> None:
    network = small_unet(kind)
    latents, timestep, condition = inputs(1)
    condition.requires_grad_()
    output = network(latents, timestep, condition)
    for frame, row, column in [(0, 0, 0), (2, 3, 5), (4, 7, 7)]:
        (gradient,) = torch.autograd.grad(
            output[0, frame, :, row, column].square().sum(), condition, retain_graph=True
        )
        assert (gradient[0, frame, :, row, column] != 0).all()


@pytest.mark.parametrize("kind", CONDITIONINGS)
def test_what_the_condition_holds_matters_less_than_where(kind: str) -> None:
    """The same condition at other places is another condition."""
    network = small_unet(kind)
    latents, timestep, condition = inputs(1)
    latents = latents.mean().expand_as(latents)
    with torch.no_grad():
        output = network(latents, timestep, condition)
        for axis in (1, 3, 4):
            flipped = network(latents, timestep, condition.flip(axis))
            assert not torch.allclose(output, flipped, rtol=1e-3, atol=1e-3)


@every_kind
def test_a_timestep_for_each_frame_equals_one_for_all_where_they_are_equal(kind: str) -> None:
    network = small_unet(kind)
    latents, timestep, condition = inputs()
    of_frames = timestep[:, None].expand(-1, latents.shape[1]).clone()
    with torch.no_grad():
        output = network(latents, timestep, condition)
        torch.testing.assert_close(network(latents, of_frames, condition), output)
        of_frames[:, 0] += 300
        other = network(latents, of_frames, condition)
    assert not torch.allclose(other[:, 0], output[:, 0])


def test_normalisation_does_not_tie_a_frame_to_the_length_of_its_clip() -> None:
    """Without attention a frame knows as far as its temporal convolutions reach, and no further."""
    nothing = ("none", "none", "none")
    latents, timestep, condition = inputs(1, frames=24)
    for kind, same in (("plain", True), ("papers", False)):
        network = small_unet(kind, attention=nothing if same else KINDS[kind]["attention"])
        with torch.no_grad():
            long = network(latents, timestep, condition)
            short = network(latents[:, :16], timestep, condition[:, :16])
        assert torch.allclose(long[:, 0], short[:, 0], rtol=1e-4, atol=1e-5) == same


# Examples of a batch


@every_kind
def test_examples_do_not_see_each_other(kind: str) -> None:
    """Permuted, they give the permuted result; each alone gives what it gives in the batch."""
    network = small_unet(kind)
    latents, timestep, condition = inputs(3)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        together = network(latents, timestep, condition)
        permuted = network(latents[order], timestep[order], condition[order])
        torch.testing.assert_close(permuted, together[order], rtol=1e-4, atol=1e-5)
        for index in range(3):
            one = slice(index, index + 1)
            alone = network(latents[one], timestep[one], condition[one])
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


# Weights


@every_kind
def test_a_fresh_network_predicts_zero(kind: str) -> None:
    latents, timestep, condition = inputs()
    with torch.no_grad():
        network = VideoUNet(block_out_channels=(32, 64), **KINDS[kind])
        assert not network(latents, timestep, condition).any()


@every_kind
def test_a_saved_network_equals_the_loaded(kind: str, tmp_path) -> None:
    network = small_unet(kind).eval()
    network.save_pretrained(tmp_path)
    loaded = VideoUNet.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs()), network(*inputs()))


def test_models_saved_before_there_were_options_still_load() -> None:
    """Their configuration has six entries; these are their weights, by name and shape."""
    config = {
        "latent_channels": 4,
        "condition_channels": 5,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "head_channels": 16,
        "norm_groups": 8,
    }
    shapes = {n: tuple(w.shape) for n, w in VideoUNet.from_config(config).state_dict().items()}
    level = {
        "block.norm_in.weight": (96,),
        "block.norm_in.bias": (96,),
        "block.spatial.weight": (64, 96, 3, 3),
        "block.spatial.bias": (64,),
        "block.modulation.weight": (128, 128),
        "block.modulation.bias": (128,),
        "block.norm_mid.weight": (64,),
        "block.norm_mid.bias": (64,),
        "block.temporal.weight": (64, 192),
        "block.temporal.bias": (64,),
        "block.shortcut.weight": (64, 96),
        "block.shortcut.bias": (64,),
    }
    for axes in ("over_time", "over_space"):
        level |= {
            f"attention.{axes}.norm.weight": (64,),
            f"attention.{axes}.norm.bias": (64,),
            f"attention.{axes}.to_qkv.weight": (192, 64),
            f"attention.{axes}.to_out.weight": (64, 64),
            f"attention.{axes}.to_out.bias": (64,),
        }
    named = {name.removeprefix("up.1."): shape for name, shape in shapes.items()}
    assert {name: named[name] for name in named if name.startswith(("block", "att"))} == level
    parts = {name.split(".")[0] for name in shapes}
    assert parts == {
        "embed", "conv_in", "down", "downsample", "middle", "up", "norm_out", "conv_out"
    }  # fmt: skip
    assert "down.0.attention.over_space.to_out.bias" not in shapes
    assert "down.1.attention.over_space.to_out.bias" in shapes
    assert shapes["conv_in.weight"] == (32, 9, 3, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_out_channels": (48,), "head_channels": 32}, "no multiple of head_channels"),
        ({"block_out_channels": (40,), "heads": 3, "norm_groups": 8}, "no multiple of heads"),
        ({"block_out_channels": (32,), "norm_groups": 12}, "no multiple of norm_groups"),
        ({"head_channels": 4, "positions": "axial"}, "cannot tell three axes apart"),
        ({"attention": ("time",)}, "attention has 1 entries for 2 levels: give 3"),
        ({"middle_blocks": 0}, "middle_blocks is 0: give 1 or more"),
        (
            {"attention": ("none",) * 3, "conditioning": "cross_attention"},
            "attention is 'none' everywhere",
        ),
    ],
)
def test_a_network_that_cannot_be_is_refused_in_one_line(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said) as raised:
        VideoUNet(**options)
    assert "\n" not in str(raised.value)


# Gradients and precision


@every_kind
@pytest.mark.parametrize(
    "precision",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
)
def test_gradients_are_finite_and_reach_every_parameter(kind: str, precision: torch.dtype) -> None:
    network = small_unet(kind)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        output = network(*inputs())
    output.float().square().mean().backward()
    for name, gradient in gradients(network).items():
        assert gradient is not None and gradient.isfinite().all(), name
        assert gradient.any(), name


@every_kind
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_reduced_precision_stays_near_float32(kind: str, precision: torch.dtype) -> None:
    network = small_unet(kind)
    with torch.no_grad():
        expected = network(*inputs())
        with torch.autocast("cpu", precision):
            found = network(*inputs()).float()
    assert (found - expected).std() < 0.02 * expected.std()


@every_kind
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    network = small_unet(kind)
    network(*inputs()).square().mean().backward()
    expected = gradients(network)
    network.zero_grad()
    network.enable_gradient_checkpointing()
    network(*inputs()).square().mean().backward()
    for name, gradient in gradients(network).items():
        torch.testing.assert_close(gradient, expected[name])


def test_layers_after_frozen_ones_are_trained() -> None:
    network = small_unet()
    network.conv_in.requires_grad_(False)
    network(*inputs()).square().mean().backward()
    for name, gradient in gradients(network).items():
        assert (gradient is None) == name.startswith("conv_in"), name


@every_kind
def test_the_reference_attention_gives_the_same_network(kind: str) -> None:
    network = small_unet(kind)
    with torch.no_grad():
        expected = network(*inputs())
        network.set_attention_backend("reference")
        torch.testing.assert_close(network(*inputs()), expected, rtol=1e-4, atol=1e-5)


def test_diffusers_own_switches_of_attention_act(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)  # as if it were not installed
    network = small_unet()
    network.set_use_memory_efficient_attention_xformers(True)
    with pytest.raises(BadInput, match="xformers does not work"):
        network(*inputs())
    network.reset_attention_backend()
    network(*inputs())
    with pytest.raises(BadInput, match="backend is 'flash': give one of auto, xformers, sdpa"):
        network.set_attention_backend("flash")


# Layout


class Copies(TorchDispatchMode):
    """Counts the operations that only move numbers, and those that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


@every_kind
def test_a_forward_pass_copies_no_activations_to_lay_them_out_anew(kind: str) -> None:
    """One copy, from channels first to channels last at the entry (two where the condition enters
    by itself); and joins, where there is something to join."""
    network = small_unet(kind)
    with torch.no_grad(), Copies() as watched:
        network(*inputs())
    moved = {name: watched.counts[name] for name in ("clone", "copy_", "contiguous", "_to_copy")}
    entries = 2 if network.condition is not None else 1
    assert moved["clone"] == entries
    assert moved["copy_"] == moved["contiguous"] == 0
    assert moved["_to_copy"] <= 1  # the timestep's
