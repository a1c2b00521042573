"""Attention's laws: all backends agree, scores depend on distances, memory is linear in tokens."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import types

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from vidfill.errors import BadInput
from vidfill.modeling import attention
from vidfill.modeling.attention import (
    CrossAttention,
    SelfAttention,
    angles,
    attend,
    attention_backend,
    rotate,
    rotate_on,
)


@pytest.fixture
def unprobed():
    """No backend is known before the test, nor after it."""
    attention._find_backend.cache_clear()
    yield
    attention._find_backend.cache_clear()


def queries(
    dtype: torch.dtype, tokens: int = 37, keys: int = 37, heads: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (tokens, keys, keys)
    query, key, value = (
        torch.randn(2, length, heads, 16, generator=generator).to(dtype).requires_grad_()
        for length in lengths
    )
    return query, key, value


def with_gradients(attended: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [attended, *torch.autograd.grad(attended.float().square().sum(), inputs)]


# A few roundings of each precision, of values near 1.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("keys", [37, 5])
def test_sdpa_equals_the_formula_and_so_do_its_gradients(dtype: torch.dtype, keys: int) -> None:
    inputs = queries(dtype, keys=keys)
    found = with_gradients(attend(*inputs, "sdpa"), inputs)
    expected = with_gradients(attend(*inputs, "reference"), inputs)
    tolerance = TOLERANCES[dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_attention_is_the_softmax_weighted_mean_of_the_values() -> None:
    query, key, value = (x.detach() for x in queries(torch.float64))
    scores = query[1, :, 2] @ key[1, :, 2].T / math.sqrt(16)
    expected = scores.softmax(dim=-1) @ value[1, :, 2]
    for choice in ("sdpa", "reference"):
        torch.testing.assert_close(attend(query, key, value, choice)[1, :, 2], expected)


def test_more_heads_than_a_kernel_takes_are_attended_in_parts(monkeypatch) -> None:
    inputs = queries(torch.float32, heads=7)
    expected = attend(*inputs)
    monkeypatch.setattr(attention, "HEADS_PER_CALL", 3)
    assert torch.equal(attend(*inputs), expected)


# The choice


def test_the_processor_takes_torchs_attention_and_can_be_told(unprobed: None) -> None:
    assert attention_backend("cpu", torch.float32) == "sdpa"
    assert attention_backend("cpu", torch.bfloat16) == "sdpa"
    assert attention_backend("cpu", torch.float32, "reference") == "reference"


def test_a_backend_that_cannot_work_is_refused_in_one_line(unprobed: None, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)  # as if it were not installed
    with pytest.raises(BadInput, match=r"xformers does not work: .*: give another") as raised:
        attend(*queries(torch.float32), "xformers")
    assert "\n" not in str(raised.value)


def wrong_layout(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    swapped = (x.transpose(1, 2) for x in (query, key, value))
    return attention._reference(*swapped).transpose(1, 2)


def raises(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise NotImplementedError("no operator for this input\nand much more")


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [(wrong_layout, "its results differ"), (raises, "no operator for this input")],
)
def test_a_backend_that_fails_its_probe_is_passed_over(
    unprobed: None, monkeypatch, capsys: pytest.CaptureFixture[str], kernel, fault: str
) -> None:
    monkeypatch.setitem(attention._KERNELS, "xformers", kernel)
    monkeypatch.setitem(attention.AUTOMATIC, "cpu", ("xformers", "sdpa"))
    assert attention_backend("cpu", torch.float32) == "sdpa"
    assert attention_backend("cpu", torch.float32) == "sdpa"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "by sdpa (xformers does not work" in said and fault in said


def test_xformers_is_given_its_own_layout(unprobed: None, monkeypatch) -> None:
    """A stand-in for a library that only runs on CUDA: [batch, tokens, heads, channels]."""

    def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.einsum("bqhc,bkhc->bhqk", query, key) / query.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), value)

    module = types.ModuleType("xformers.ops")
    module.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    inputs = queries(torch.float32)
    torch.testing.assert_close(attend(*inputs, "xformers"), attend(*inputs, "reference"))


def test_a_probe_draws_no_random_numbers_and_leaves_no_mode(unprobed: None) -> None:
    before = torch.get_rng_state()
    with torch.inference_mode():
        attention_backend("cpu", torch.float32)
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_whatever_is_chosen_equals_the_formula(unprobed: None, dtype: torch.dtype) -> None:
    """Also for more heads than one call of a kernel takes, as over time at many places."""
    for heads in (3, attention.HEADS_PER_CALL + 1):
        inputs = tuple(x.detach().cuda().requires_grad_() for x in queries(dtype, heads=heads))
        found = with_gradients(attend(*inputs), inputs)
        expected = with_gradients(attend(*inputs, "reference"), inputs)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


# Positions


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rotated_scores_depend_on_distances_alone(axes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 12, generator=generator, dtype=torch.float64).unbind()
    angle = angles([torch.arange(4.0)] * axes, 12)
    grid = [4] * axes
    rotated_query = rotate(query.expand(*grid, 1, 12), angle).view(*grid, 12)
    rotated_key = rotate(key.expand(*grid, 1, 12), angle).view(*grid, 12)

    def score(of: tuple[int, ...], to: tuple[int, ...]) -> Tensor:
        return rotated_query[of] @ rotated_key[to]

    origin, near, moved = (0,) * axes, (1,) * axes, (2,) * axes
    torch.testing.assert_close(score(origin, near), score(near, moved), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(score(origin, near), score(origin, moved))
    for axis in range(axes):  # every axis tells its own places apart
        step = tuple(int(axis == other) for other in range(axes))
        assert not torch.allclose(score(origin, origin), score(origin, step))


def test_rotation_turns_halves_of_the_channels_as_complex_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 16, generator=generator, dtype=torch.float64)
    angle = torch.rand(5, 1, 8, generator=generator, dtype=torch.float64) * 7
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * angle)
    torch.testing.assert_close(rotate(x, angle), torch.cat([turned.real, turned.imag], dim=-1))


def test_places_of_two_grids_of_one_clip_meet() -> None:
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(1, 8, generator=generator)
    fine = rotate_on(feature.expand(1, 3, 9, 6, 1, 8), (3, 3, 2))
    coarse = rotate_on(feature.expand(1, 3, 3, 2, 1, 8), (3, 3, 2))
    # The middle of each 3×3 places is where the coarse place is.
    torch.testing.assert_close(fine[:, :, 1::3, 1::3], coarse)


# Layout


@pytest.mark.parametrize("over", ["time", "space", "joint"])
def test_tokens_are_views_of_the_projections_and_results_of_the_output(
    monkeypatch, over: attention.Over
) -> None:
    linear = nn.functional.linear
    given: list[Tensor] = []
    products: list[Tensor] = []
    attended: list[Tensor] = []

    def watched_linear(x: Tensor, *weights: Tensor) -> Tensor:
        given.append(x)
        products.append(linear(x, *weights))
        return products[-1]

    def watched_attend(query: Tensor, key: Tensor, value: Tensor, choice: str) -> Tensor:
        for product, tokens in zip(products, (query, key, value), strict=True):
            assert tokens.data_ptr() == product.data_ptr() and tokens.is_contiguous()
        attended.append(attend(query, key, value))
        return attended[-1]

    layer = SelfAttention(16, nn.LayerNorm(16), 2, over, "none")
    monkeypatch.setattr(nn.functional, "linear", watched_linear)
    monkeypatch.setattr(attention, "attend", watched_attend)
    layer(torch.randn(2, 3, 4, 5, 16))
    assert given[-1].data_ptr() == attended[0].data_ptr() and given[-1].is_contiguous()


@pytest.mark.parametrize(
    ("over", "pattern"),
    [
        ("time", "b f h w c -> (b h w) f c"),
        ("space", "b f h w c -> (b f) (h w) c"),
        ("joint", "b f h w c -> b (f h w) c"),
    ],
)
def test_a_layer_attends_within_its_axes_and_nowhere_else(
    over: attention.Over, pattern: str
) -> None:
    torch.manual_seed(0)
    layer = SelfAttention(8, nn.LayerNorm(8), 2, over, "axial")
    nn.init.normal_(layer.to_out.weight)
    x = torch.randn(2, 3, 4, 2, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[1, 1, 2, 1].sum(), x)
    reached = gradient.abs().sum(dim=-1, keepdim=True) > 0
    places = torch.arange(2 * 3 * 4 * 2).view(2, 3, 4, 2, 1)
    row = (rearrange(places, pattern)[..., 0] == places[1, 1, 2, 1, 0]).any(dim=1)
    assert set(places[reached].tolist()) == set(rearrange(places, pattern)[row].flatten().tolist())


def test_cross_attention_tells_where_a_token_is() -> None:
    torch.manual_seed(0)
    layer = CrossAttention(16, nn.LayerNorm(16), 2, condition=6)
    nn.init.normal_(layer.to_out.weight)
    x, condition = torch.randn(1, 2, 4, 4, 16), torch.randn(1, 2, 2, 2, 6)
    for axis in (1, 2, 3):
        assert not torch.allclose(layer(x, condition), layer(x, condition.flip(axis)), atol=1e-4)


# Memory

PEAK = """
import torch
from pathlib import Path
from vidfill.modeling.attention import attend
def megabytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
def peak(tokens, choice):
    inputs = [torch.randn(1, tokens, 4, 32, requires_grad=True) for _ in range(3)]
    before = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    attend(*inputs, choice).square().mean().backward()
    return megabytes("VmHWM") - before
for choice in ("sdpa", "reference"): peak(64, choice)
print(peak(2560, "sdpa"), peak(2560, "reference"))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux to read a peak of memory")
def test_fused_attention_never_holds_its_scores() -> None:
    """Forward and backward over 2560 tokens and 4 heads, whose scores are 100 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK],
        capture_output=True,
        text=True,
        check=True,
        # What is freed leaves the process.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    fused, reference = (float(megabytes) for megabytes in done.stdout.split())
    assert reference > 200  # scores and their gradients
    assert 1 < fused < reference / 8
