"""The presets: the paper's counts, and its network written out plainly beside ours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vidfill.errors import BadInput
from vidfill.modeling.blocks import timestep_embedding
from vidfill.modeling.cost import cost_table, measure
from vidfill.modeling.settings import PRESETS
from vidfill.modeling.unet import VideoUNet, build


# The paper's with 8 channels in and 4 out; ours as documented.
@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [
        ("ramvid-32", 99.5, 0.005),
        ("ramvid-64", 235.1, 0.005),
        ("tiny", 2.0, 0.05),
        ("small", 10.0, 0.05),
        ("base", 83.0, 0.05),
        ("large", 276.0, 0.05),
    ],
)
def test_parameter_counts(name: str, millions: float, tolerance: float) -> None:
    with torch.device("meta"):
        network = build(name, 4, 4)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "conditioning"),
    [(name, "concatenation") for name in PRESETS]
    + [(name, way) for name in ("tiny", "ramvid-32") for way in ("cross_attention", "adaptive")],
)
def test_every_preset_takes_clips_of_any_size_conditioned_in_any_way(
    name: str, conditioning: str
) -> None:
    with torch.device("meta"):
        network = build(name, 4, 5, conditioning=conditioning)
        latents = torch.empty(1, 3, 4, 11, 19)
        condition = torch.empty(1, 3, 5, 11, 19)
        assert network(latents, torch.zeros(1), condition).shape == latents.shape


def test_an_unknown_preset_is_refused_with_those_that_are() -> None:
    with pytest.raises(BadInput, match=r"no preset 'huge': give one of tiny, mini, small"):
        build("huge", 4, 4)


@pytest.mark.slow
def test_multiply_adds_are_those_of_the_layers_counted_by_hand() -> None:
    """A preset's first convolution, 9 products a place, channel in and channel out, is a part."""
    whole, half = measure("tiny", 8, 8, 8), measure("tiny", 4, 8, 8)
    assert whole.parameters == half.parameters
    assert whole.multiply_adds > 8 * 8 * 8 * 9 * 8 * 32
    # All but attention and the timestep's layers are linear in the frames.
    assert 2 * half.multiply_adds < whole.multiply_adds + 2e6 < 2.2 * half.multiply_adds
    assert 1.9 * half.kept_bytes < whole.kept_bytes < 2.1 * half.kept_bytes


@pytest.mark.slow
def test_the_cost_table_has_a_row_for_each_preset_asked_for() -> None:
    names = ["tiny", "small"]
    rows = cost_table(names).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == names
    assert "| 1.97 M |" in rows[0] and "| 9.80 M |" in rows[1]


# RaMViD's network as its authors describe it, channels first and without any of our modules. It
# reads our weights by name and halves rows and columns between levels.


class Plain:
    def __init__(self, network: VideoUNet, heads: int) -> None:
        self.weights = network.state_dict()
        self.heads = heads

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.conv3d(x, weight, bias, stride=(1, stride, stride), padding=1)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def residual(self, name: str, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.conv(f"{name}.spatial", F.silu(self.norm(f"{name}.norm_in", x)))
        scale, shift = self.linear(f"{name}.modulation", F.silu(embedding)).chunk(2, dim=1)
        hidden = self.norm(f"{name}.norm_mid", hidden) * (1 + scale[..., None, None, None])
        hidden = self.conv(f"{name}.temporal", F.silu(hidden + shift[..., None, None, None]))
        if f"{name}.shortcut.weight" in self.weights:
            x = self.linear(f"{name}.shortcut", x.movedim(1, -1)).movedim(-1, 1)
        return x + hidden

    def attention(self, name: str, x: Tensor) -> Tensor:
        tokens = self.norm(f"{name}.norm", x).flatten(2).mT
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.linear(f"{name}.to_qkv", tokens).chunk(3, dim=-1)
        )
        scores = query @ key.mT / query.shape[-1] ** 0.5
        attended = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        return x + self.linear(f"{name}.to_out", attended).mT.view(x.shape)

    def level(self, name: str, x: Tensor, embedding: Tensor, attends: bool) -> Tensor:
        x = self.residual(f"{name}.block", x, embedding)
        return self.attention(f"{name}.attention.over_all", x) if attends else x

    def __call__(self, x: Tensor, timestep: Tensor, base: int, attends: list[bool]) -> Tensor:
        embedding = self.linear("embed.0", timestep_embedding(timestep, base).to(x.dtype))
        embedding = self.linear("embed.2", F.silu(embedding))
        x = self.conv("conv_in", x)
        skips = [x]
        for depth in range(4):
            for block in range(2):
                x = self.level(f"down.{2 * depth + block}", x, embedding, attends[depth])
                skips.append(x)
            if depth < 3:
                x = self.conv(f"downsample.{depth}", x, stride=2)
                skips.append(x)
        x = self.level("middle", x, embedding, attends=True)
        x = self.residual("middle_rest.0", x, embedding)
        for risen in range(4):
            for block in range(3):
                joined = torch.cat([x, skips.pop()], dim=1)
                name = f"up.{3 * risen + block}"
                x = self.level(name, joined, embedding, attends[3 - risen])
            if risen < 3:
                doubled = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")
                x = self.conv(f"upsample.{risen}", doubled)
        return self.conv("conv_out", F.silu(self.norm("norm_out", x)))


@pytest.mark.parametrize(
    ("name", "attends"),
    [("ramvid-32", [False, True, True, False]), ("ramvid-64", [False, False, True, True])],
)
def test_the_papers_preset_is_the_network_that_its_authors_describe(
    name: str, attends: list[bool]
) -> None:
    torch.manual_seed(0)
    network = build(name, 4, 4, block_out_channels=(32, 32, 64, 64)).double()
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    latents, condition = torch.randn(2, 2, 3, 4, 16, 16, dtype=torch.float64).unbind()
    timestep = torch.tensor([3, 800])
    with torch.no_grad():
        found = network(latents, timestep, condition)
        seen = torch.cat([latents, condition], dim=2).transpose(1, 2)
        expected = Plain(network, heads=4)(seen, timestep, 32, attends).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
