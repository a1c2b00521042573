from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from vidfill import seeding
from vidfill.data.shards import Example
from vidfill.jobs import BadInput
from vidfill.modeling.autoencoder import Autoencoder
from vidfill.modeling.diffusion import Denoiser, DiffusionConfig, LatentSpace, alpha_bars, expand
from vidfill.modeling.unet import VideoUNet
from vidfill.sampling.sampler import Request, Result, condition_of, inpaint, sample
from vidfill.sampling.schedules import CLEAN, compile_schedule, parse

MakeExample = Callable[[str], Example]
MIXED = ["ddpm:5+resample(n=2)", "ddim:7", "ddpm:3(variance=large)", "ddim:2+resample(n=1)"]
CLIPS = ["a", "bb", "ccc"]


def run(denoiser: Denoiser, requests: Sequence[Request], capacity: int) -> dict[str, Result]:
    results = sample(denoiser, requests, capacity=capacity, seed=1)
    return {f"{result.request.clip} {result.request.name}": result for result in results}


def requests_for(
    denoiser: Denoiser, make_example: MakeExample, schedules: Sequence[str], clips: Sequence[str]
) -> list[Request]:
    return [
        Request(
            clip,
            schedule,
            compile_schedule(parse(schedule), denoiser.timesteps),
            functools.partial(condition_of, denoiser, make_example(clip)),
        )
        for clip in clips
        for schedule in schedules
    ]


def assert_same(ours: dict[str, Result], theirs: dict[str, Result]) -> None:
    assert ours.keys() == theirs.keys()
    for name, result in ours.items():
        torch.testing.assert_close(result.latents, theirs[name].latents, rtol=1e-4, atol=1e-4)


def test_batched_equals_alone(denoiser: Denoiser, make_example: MakeExample) -> None:
    requests = requests_for(denoiser, make_example, MIXED, CLIPS)
    alone: dict[str, Result] = {}
    for request in requests:
        alone |= run(denoiser, [request], capacity=1)
    assert len(alone) == len(requests)
    assert_same(run(denoiser, requests, capacity=5), alone)


def test_the_order_of_the_requests_does_not_matter(
    denoiser: Denoiser, make_example: MakeExample
) -> None:
    requests = requests_for(denoiser, make_example, MIXED, CLIPS)
    assert_same(run(denoiser, requests, capacity=4), run(denoiser, requests[::-1], capacity=4))


def test_a_schedule_that_runs_beside_changes_nothing(
    denoiser: Denoiser, make_example: MakeExample
) -> None:
    watched = requests_for(denoiser, make_example, MIXED[:1], CLIPS)
    beside = requests_for(denoiser, make_example, MIXED[1:], [*CLIPS, "dddd"])
    together = run(denoiser, [*beside, *watched], capacity=4)
    alone = run(denoiser, watched, capacity=4)
    assert_same({name: together[name] for name in alone}, alone)


def test_clips_seeds_and_schedules_have_results_of_their_own(
    denoiser: Denoiser, make_example: MakeExample
) -> None:
    same_condition = make_example("a")
    renamed = dataclasses.replace(same_condition, key="b")
    requests = [
        request
        for example in (same_condition, renamed)
        for request in requests_for(denoiser, lambda key, e=example: e, MIXED, [example.key])  # type: ignore[misc]
    ]
    results = [result.latents for result in run(denoiser, requests, capacity=8).values()]
    results += [r.latents for r in sample(denoiser, requests[:1], capacity=1, seed=2)]
    distances = [float((a - b).abs().max()) for i, a in enumerate(results) for b in results[:i]]
    assert min(distances) > 1e-2


def test_counted_network_evaluations_are_the_programs(
    denoiser: Denoiser, make_example: MakeExample, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    denoise = denoiser.denoise

    def counting(latents: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        calls.append(len(latents))
        return denoise(latents, timestep, condition)

    monkeypatch.setattr(denoiser, "denoise", counting)
    requests = requests_for(denoiser, make_example, MIXED, CLIPS)
    told: list[int] = []
    list(sample(denoiser, requests, capacity=5, seed=0, on_evaluations=told.append))
    assert sum(calls) == sum(request.program.nfe for request in requests) == 3 * (15 + 7 + 3 + 4)
    assert calls == told


def test_a_finished_trajectorys_slot_is_taken_by_the_next(
    denoiser: Denoiser, make_example: MakeExample
) -> None:
    # 15 evaluations beside 7 + 4 + 3: with the longest first, two slots need no more than 15 calls.
    requests = requests_for(denoiser, make_example, MIXED[::-1], ["a"])
    calls: list[int] = []
    list(sample(denoiser, requests, capacity=2, seed=0, on_evaluations=calls.append))
    assert len(calls) == 15
    assert calls == [2] * 14 + [1]


def test_seconds_are_shares_of_the_networks_time(
    denoiser: Denoiser, make_example: MakeExample
) -> None:
    requests = requests_for(denoiser, make_example, ["ddim:2", "ddim:20"], ["a"])
    short, long = (result.seconds for result in sample(denoiser, requests, capacity=2, seed=0))
    assert 0 < short < long


def test_values_that_are_not_finite_stop_the_run(
    denoiser: Denoiser, make_example: MakeExample
) -> None:
    denoiser.network.conv_out.weight.data.fill_(float("nan"))
    requests = requests_for(denoiser, make_example, ["ddim:2"], ["a"])
    with pytest.raises(BadInput, match="sampling a with ddim:2 gave values that are not finite"):
        run(denoiser, requests, capacity=1)


def test_what_the_hole_hides_does_not_change_the_result(
    denoiser: Denoiser, autoencoder: Autoencoder, make_example: MakeExample
) -> None:
    example = make_example("a")
    assert example.pixels is not None
    hidden = example.mask[..., None] == 1
    pixels = np.where(hidden, 255 - example.pixels, example.pixels)
    another = dataclasses.replace(example, latents=-example.latents, pixels=pixels)
    (_, first), (_, second) = (
        next(inpaint(denoiser, autoencoder, [e], "ddpm:4+resample(n=1)", seed=0, capacity=1))
        for e in (example, another)
    )
    assert (first == second).all()


def test_inpainting_keeps_visible_pixels_and_fills_every_example(
    denoiser: Denoiser, autoencoder: Autoencoder, make_example: MakeExample
) -> None:
    examples = [make_example(clip) for clip in CLIPS]
    filled = {
        example.key: (example, frames)
        for example, frames in inpaint(
            denoiser, autoencoder, examples, "ddim:3", seed=0, capacity=2
        )
    }
    assert sorted(filled) == CLIPS
    for example, frames in filled.values():
        assert frames.dtype == np.uint8
        assert (frames[example.mask == 0] == example.pixels[example.mask == 0]).all()  # type: ignore[index]
        assert (frames[example.mask == 1] != example.pixels[example.mask == 1]).any()  # type: ignore[index]


def test_an_example_without_pixels_is_refused_with_a_remedy(
    denoiser: Denoiser, autoencoder: Autoencoder, make_example: MakeExample
) -> None:
    bare = dataclasses.replace(make_example("a"), pixels=None)
    with pytest.raises(BadInput, match="encode again with --pixels all"):
        list(inpaint(denoiser, autoencoder, [bare], "ddim:1", seed=0, capacity=1))


# A Gaussian: every value of the data is N(MEAN, std²), so the denoiser is known in closed form.

MEAN = 0.7
SHAPE = (4, 4, 32, 32)
SAMPLES = math.prod(SHAPE)


class GaussianDenoiser(Denoiser):
    def __init__(self, std: float) -> None:
        space = LatentSpace(shape=[], mean=[0.0] * 4, std=[], autoencoder={})
        super().__init__(
            VideoUNet(block_out_channels=(32,)), DiffusionConfig(normalise=False), space
        )
        self.std = std

    def denoise(self, latents: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        ab = expand(self.alpha_bar(timestep))
        gain = ab.sqrt() * self.std**2 / (ab * self.std**2 + 1 - ab)
        return MEAN + gain * (latents - ab.sqrt() * MEAN)


def sample_gaussian(schedule: str, std: float) -> Tensor:
    program = compile_schedule(parse(schedule))
    request = Request("clip", schedule, program, lambda: torch.zeros(SHAPE, dtype=torch.float64))
    (result,) = sample(GaussianDenoiser(std), [request], capacity=1, seed=0)
    return result.latents


def test_the_programs_last_level_has_no_noise() -> None:
    assert GaussianDenoiser(std=1.0).alpha_bar(torch.tensor([CLEAN])) == 1


def assert_gaussian(values: Tensor, std: float, slack: float = 0.0) -> None:
    """Mean and deviation within four standard errors, and `slack` of the deviation."""
    error = std / math.sqrt(SAMPLES)
    assert float(values.mean()) == pytest.approx(MEAN, abs=4 * error)
    assert float(values.std()) == pytest.approx(std, abs=4 * error / math.sqrt(2) + slack * std)


@pytest.mark.parametrize("std", [0.5, 2.0])
@pytest.mark.parametrize("schedule", ["ddpm:250", "ddim:250", "ddim:250+resample(n=1)"])
def test_many_steps_reproduce_a_gaussians_distribution(schedule: str, std: float) -> None:
    assert_gaussian(sample_gaussian(schedule, std), std, slack=0.03)


@pytest.mark.parametrize(("steps", "n"), [(1, 0), (5, 0), (50, 0), (50, 4), (5, 10)])
def test_large_variance_is_exact_on_unit_gaussians_and_resampling_leaves_it_so(
    steps: int, n: int
) -> None:
    # The reverse step is then exact, and so is the forward one: no level's distribution changes.
    # Only the last DOWN gives the posterior mean in place of a draw: from a variance v of the clean
    # state, UP and DOWN at the last level make ab·(ab·v + 1 − ab).
    last = alpha_bars(DiffusionConfig())[round(1000 / steps) - 1].item()
    variance = last
    for _ in range(n):
        variance = last * (last * variance + 1 - last)
    values = sample_gaussian(f"ddpm:{steps}(variance=large)+resample(n={n})", std=1.0)
    assert float(values.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / SAMPLES))


@pytest.mark.parametrize("steps", [1, 10, 50, 500])
def test_ddim_is_diffusers_ddim(steps: int) -> None:
    denoiser = GaussianDenoiser(std=0.5)
    theirs = DDIMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        prediction_type="sample",
    )
    theirs.alphas_cumprod = alpha_bars(DiffusionConfig())  # theirs are in float32
    theirs.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    theirs.set_timesteps(steps)
    noise = torch.randn(SHAPE, generator=seeding.generator(0, "clip", 0))
    state = noise.double()[None]
    for timestep in theirs.timesteps:
        clean = denoiser.denoise(state, timestep[None], torch.empty(0))
        state = theirs.step(clean, int(timestep), state).prev_sample
    torch.testing.assert_close(
        sample_gaussian(f"ddim:{steps}", std=0.5), state[0], rtol=1e-5, atol=1e-5
    )


def test_draw_0_is_the_state_that_every_schedule_starts_from() -> None:
    # One DDIM step on a Gaussian is linear in its start, so the start can be read off its result.
    noise = torch.randn(SHAPE, generator=seeding.generator(0, "clip", 0)).double()
    ab = alpha_bars(DiffusionConfig())[999]
    gain = ab.sqrt() * 0.25 / (ab * 0.25 + 1 - ab)
    expected = MEAN + gain * (noise - ab.sqrt() * MEAN)
    torch.testing.assert_close(sample_gaussian("ddim:1", std=0.5), expected)
    torch.testing.assert_close(sample_gaussian("ddpm:1", std=0.5), expected)
