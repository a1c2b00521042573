"""The UNet's layers: their layout, their formulas, compilation, and memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from vidfill.modeling.blocks import (
    ClipNorm,
    FrameNorm,
    JointConv,
    SpatialConv,
    TemporalConv,
    group_norm_by_moments,
    halve,
)


@pytest.mark.parametrize(
    "layer",
    [
        SpatialConv(16, 24),
        SpatialConv(16, 24, stride=2),
        TemporalConv(16, 24),
        JointConv(16, 24),
        JointConv(16, 24, stride=2),
        FrameNorm(8, 16),
        ClipNorm(8, 16),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_see_channels_last_activations_and_give_them(layer: torch.nn.Module) -> None:
    assert layer(torch.randn(2, 3, 6, 5, 16)).is_contiguous()


def test_the_temporal_convolution_is_one_over_frames_alone() -> None:
    torch.manual_seed(0)
    layer = TemporalConv(6, 4)
    x = torch.randn(2, 5, 3, 2, 6)
    kernel = layer.weight.view(4, 3, 6).transpose(1, 2)[..., None, None]
    expected = torch.nn.functional.conv3d(x.movedim(-1, 1), kernel, layer.bias, padding=(1, 0, 0))
    torch.testing.assert_close(layer(x), expected.movedim(1, -1))


def test_normalisation_by_moments_is_torchs_group_norm() -> None:
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(4, 12)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 4, 12) * 3 + 2
    found, expected = x.clone().requires_grad_(), x.movedim(-1, 1).clone().requires_grad_()
    ours = group_norm_by_moments(norm, found)
    theirs = norm(expected)
    torch.testing.assert_close(ours, theirs.movedim(1, -1))
    ours.pow(3).sum().backward()
    theirs.pow(3).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad.movedim(1, -1), rtol=1e-4, atol=1e-3)


def test_halved_maps_are_means_of_the_places_under_the_networks_strides() -> None:
    x = torch.arange(15.0).view(1, 1, 3, 5, 1)
    assert halve(x).flatten().tolist() == [3, 5, 6.5, 10.5, 12.5, 14]
    assert SpatialConv(1, 1, stride=2)(x).shape == halve(x).shape


# Compilation, in a process of its own: what checks shapes in tests cannot be compiled. A C++
# compiler takes its time, so that is for one level; the whole network is traced.

COMPILED = """
import torch
from vidfill.modeling.blocks import Design, Level
from vidfill.modeling.unet import VideoUNet
torch.manual_seed(0)
if {whole}:
    module = VideoUNet(block_out_channels=(16,), head_channels=8, norm_groups=8,
        positions="axial", attention=("none", "joint"))
    video = torch.randn(1, 3, 4, 4, 4)
    given, backend = (video, torch.tensor([5]), video), "eager"
else:
    design = Design([16], [], 1, 8, 8, None, "adaptive", "split", "frame", "axial")
    module = Level(design, 16, 16, "time")
    video = torch.randn(1, 3, 4, 4, 16, requires_grad=True)
    given, backend = (video, torch.randn(1, 1, 64), video.detach()), "inductor"
for parameter in module.parameters():
    parameter.data += 0.05 * torch.randn_like(parameter)
def run(function):
    module.zero_grad()
    output = function(*given)
    output.square().mean().backward()
    return [output, *(parameter.grad for parameter in module.parameters())]
expected = run(module)
found = run(torch.compile(module, fullgraph=True, backend=backend))
for a, b in zip(found, expected, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["level", "network"])
def test_compiled_equals_eager_in_one_graph(whole: bool) -> None:
    if not whole and shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    script = COMPILED.replace("{whole}", repr(whole))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


GROWTH = """
import torch
from pathlib import Path
from vidfill.modeling.unet import VideoUNet
network = VideoUNet(
    block_out_channels=(32, 32), norm_groups=8, attention=("time", "joint", "joint"),
    positions="axial",
).eval()
def megabytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
def peak(frames):
    latents = torch.zeros(1, frames, 4, 32, 16)
    before = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    with torch.no_grad(): network(latents, torch.zeros(1), latents)
    return megabytes("VmHWM") - before
peak(2)
print(peak(48), peak(96))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux to read a peak of memory")
def test_memory_of_inference_grows_linearly_with_frames() -> None:
    """Doubled frames take 1.8 to 2.2 times the memory.

    The joint attention of the longer clip has 12288 tokens, whose scores would take 576 MiB.
    """
    done = subprocess.run(
        [sys.executable, "-c", GROWTH],
        capture_output=True,
        text=True,
        check=True,
        # What is freed leaves the process.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    short, long = (float(megabytes) for megabytes in done.stdout.split())
    assert short > 20
    assert 1.8 < long / short < 2.2
