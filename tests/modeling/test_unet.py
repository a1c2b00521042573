"""The network's laws: shapes, reach, independence of examples, gradients, checkpointing."""

import pytest
import torch
from vidfill.jobs import BadInput
from vidfill.modeling.attention import rotate_by_position
from vidfill.modeling.unet import VideoUNet


def small_unet(**changes: object) -> VideoUNet:
    """A small network whose zero-initialised layers were perturbed, so that all of it acts."""
    torch.manual_seed(0)
    options = {"block_out_channels": (16, 32), "head_channels": 8, "norm_groups": 8} | changes
    network = VideoUNet(**options)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("frames, height, width", [(20, 8, 8), (19, 23, 41), (1, 4, 6)])
def test_output_has_the_shape_of_the_latents(frames: int, height: int, width: int) -> None:
    latents, timestep, condition = inputs(1, frames, height, width)
    with torch.no_grad():
        assert small_unet()(latents, timestep, condition).shape == latents.shape


def test_every_output_frame_depends_on_every_input_frame() -> None:
    network = small_unet()
    latents, timestep, condition = inputs(1, frames=7)
    latents.requires_grad_()
    output = network(latents, timestep, condition)
    for frame in range(7):
        (gradient,) = torch.autograd.grad(
            output[:, frame].square().sum(), latents, retain_graph=True
        )
        assert (gradient.abs().amax(dim=(0, 2, 3, 4)) > 0).all()


def test_output_depends_on_timestep_and_condition() -> None:
    network = small_unet()
    latents, timestep, condition = inputs(1)
    with torch.no_grad():
        output = network(latents, timestep, condition)
        assert not torch.allclose(output, network(latents, timestep + 100, condition))
        assert not torch.allclose(output, network(latents, timestep, condition + 1))


def test_an_example_in_a_batch_equals_the_example_alone() -> None:
    network = small_unet()
    latents, timestep, condition = inputs(3)
    with torch.no_grad():
        together = network(latents, timestep, condition)
        for index in range(3):
            one = slice(index, index + 1)
            alone = network(latents[one], timestep[one], condition[one])
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


def test_a_fresh_network_predicts_zero() -> None:
    latents, timestep, condition = inputs()
    with torch.no_grad():
        assert not VideoUNet(block_out_channels=(32, 64))(latents, timestep, condition).any()


def test_widths_that_heads_do_not_divide_are_refused_in_one_line() -> None:
    with pytest.raises(BadInput, match="no multiple of head_channels"):
        VideoUNet(block_out_channels=(48,), head_channels=32)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_and_reach_every_parameter(precision: torch.dtype) -> None:
    network = small_unet()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        output = network(*inputs())
    output.float().square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_gradient_checkpointing_changes_nothing() -> None:
    network = small_unet()
    network(*inputs()).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    network.enable_gradient_checkpointing()
    network(*inputs()).square().mean().backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_saved_network_equals_loaded(tmp_path) -> None:
    network = small_unet().eval()
    network.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = network(*inputs())
        assert torch.equal(VideoUNet.from_pretrained(tmp_path)(*inputs()), expected)


def test_rotary_scores_depend_on_distances_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8).unbind()
    scores = (
        rotate_by_position(query.expand(1, 1, 6, 8)) @ rotate_by_position(key.expand(1, 1, 6, 8)).mT
    )[0, 0]
    for distance in range(-4, 5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(scores[0, 0], scores[0, 3])
