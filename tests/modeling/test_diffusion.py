"""The diffusion process against diffusers' schedulers and against its own definitions."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vidfill.modeling.diffusion import (
    Variance,
    add_noise,
    clean_of,
    ddim_step,
    ddpm_step,
    expand,
    noise_of,
    posterior_mean,
    posterior_variance,
    renoise,
    target_of,
    to_flow,
)
from vidfill.modeling.noise import alpha_bars, flow_times
from vidfill.modeling.settings import DiffusionConfig, Target

CONFIG = DiffusionConfig()
ZERO_SNR = DiffusionConfig(zero_terminal_snr=True, target="v")
FLOW = DiffusionConfig(process="flow", target="flow")
SCALED = DiffusionConfig(beta_schedule="scaled_linear", target="clean")
COSINE = DiffusionConfig(beta_schedule="cosine", target="v")
with_betas = pytest.mark.parametrize("config", [CONFIG, SCALED, COSINE, ZERO_SNR])
TARGETS: tuple[Target, ...] = ("noise", "v", "clean", "flow")
THEIR_TARGETS = {"noise": "epsilon", "v": "v_prediction", "clean": "sample"}
EVERY = torch.arange(1000)


def random_pair(batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, batch, 3, 4, 5, 6), generator=generator, dtype=torch.float64)


def levels(config: DiffusionConfig) -> Tensor:
    """ᾱ of every timestep, and of −1 at the index −1."""
    return torch.cat([alpha_bars(config), torch.ones(1, dtype=torch.float64)])


def in_float64(
    theirs: type[DDPMScheduler] | type[DDIMScheduler], config: DiffusionConfig, **changes: Any
) -> Any:
    """Diffusers keeps its tables in float32; with ours in their place only the formulas differ."""
    target = THEIR_TARGETS[config.target]
    scheduler = theirs(clip_sample=False, prediction_type=target, **changes)
    ab = levels(config)
    scheduler.alphas_cumprod = ab[:-1]
    scheduler.alphas = ab[:-1] / ab.roll(1)[:-1]
    scheduler.betas = 1 - scheduler.alphas
    scheduler.one = scheduler.final_alpha_cumprod = ab[-1]
    return scheduler


# Against diffusers


@with_betas
def test_noising_and_v_equal_those_of_diffusers(config: DiffusionConfig) -> None:
    clean, noise = random_pair(batch=1000)
    ab = expand(alpha_bars(config))
    for theirs in (in_float64(DDPMScheduler, config), in_float64(DDIMScheduler, config)):
        noisy = theirs.add_noise(clean, noise, EVERY)
        v = theirs.get_velocity(clean, noise, EVERY)
        torch.testing.assert_close(add_noise(clean, noise, ab), noisy, rtol=1e-5, atol=1e-5)
        ours = target_of("v", clean, noise, ab)
        torch.testing.assert_close(ours, v, rtol=1e-5, atol=1e-5)


@with_betas
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_steps_equal_those_of_diffusers(config: DiffusionConfig, variance: Variance) -> None:
    scheduler = in_float64(DDPMScheduler, config, variance_type=variance)
    noisy, predicted = random_pair(batch=1)
    ab = levels(config)
    for timestep in [*range(0, 1000, 50), 1, 2, 998, 999]:
        source = torch.Generator().manual_seed(timestep)
        theirs = scheduler.step(predicted, timestep, noisy, generator=source).prev_sample
        # Diffusers adds no noise at timestep 0, and neither do we on the way to clean latents.
        source = torch.Generator().manual_seed(timestep)
        noise = torch.randn(noisy.shape, generator=source, dtype=noisy.dtype)
        clean = clean_of(config.target, predicted, noisy, ab[timestep])
        ours = ddpm_step(noisy, clean, ab[timestep], ab[timestep - 1], noise, variance)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@with_betas
def test_posterior_variances_equal_those_of_diffusers(config: DiffusionConfig) -> None:
    scheduler, ddim = in_float64(DDPMScheduler, config), in_float64(DDIMScheduler, config)
    ab = levels(config)
    small = posterior_variance(ab[1:-1], ab[:-2], "fixed_small")
    large = posterior_variance(ab[1:-1], ab[:-2], "fixed_large")
    for timestep in [*range(50, 1000, 50), 1, 2, 998, 999]:
        ours_small, ours_large = small[timestep - 1], large[timestep - 1]
        theirs = scheduler._get_variance(timestep, variance_type="fixed_small")
        torch.testing.assert_close(ours_small, theirs, rtol=1e-5, atol=0)
        theirs = scheduler._get_variance(timestep, variance_type="fixed_large")
        torch.testing.assert_close(ours_large, theirs, rtol=1e-5, atol=0)
        theirs = ddim._get_variance(timestep, timestep - 1)
        torch.testing.assert_close(ours_small, theirs, rtol=1e-5, atol=0)


@with_betas
@pytest.mark.parametrize("steps", [1000, 20])
def test_ddim_steps_equal_those_of_diffusers(config: DiffusionConfig, steps: int) -> None:
    scheduler = in_float64(DDIMScheduler, config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    noisy, predicted = random_pair(batch=1)
    ab = levels(config)
    for timestep in scheduler.timesteps.tolist()[:: steps // 20]:
        clean = clean_of(config.target, predicted, noisy, ab[timestep])
        ours = ddim_step(noisy, clean, ab[timestep], ab[timestep - 1000 // steps])
        theirs = scheduler.step(predicted, timestep, noisy).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ddim_along_a_flow_is_the_euler_step_of_diffusers(shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    time = flow_times(1000, shift)
    theirs.set_timesteps(sigmas=time.flip(0).tolist())
    ab = levels(DiffusionConfig(process="flow", target="flow", shift=shift))
    noisy, predicted = random_pair(batch=1)
    for timestep, their_timestep in zip(range(999, -1, -1), theirs.timesteps, strict=True):
        here, below = ab[timestep], ab[timestep - 1]
        ours = ddim_step(noisy, clean_of("flow", predicted, noisy, here), here, below)
        expected = theirs.step(predicted, their_timestep, to_flow(noisy, here)).prev_sample
        torch.testing.assert_close(to_flow(ours, below), expected, rtol=1e-5, atol=1e-5)


# Targets


@settings(max_examples=20)
@given(kind=st.sampled_from(TARGETS), share=st.floats(1e-6, 1 - 1e-6), seed=st.integers(0, 99))
def test_any_prediction_stands_for_the_clean_latents_and_noise_that_make_it(
    kind: Target, share: float, seed: int
) -> None:
    ab = torch.tensor(share, dtype=torch.float64)
    clean, noise = random_pair(seed=seed)
    noisy, target = add_noise(clean, noise, ab), target_of(kind, clean, noise, ab)
    torch.testing.assert_close(clean_of(kind, target, noisy, ab), clean, rtol=0, atol=1e-10)
    torch.testing.assert_close(noise_of(kind, target, noisy, ab), noise, rtol=0, atol=1e-10)
    # Any two tensors: the noisy latents need not be of this prediction.
    estimates = clean_of(kind, clean, noise, ab), noise_of(kind, clean, noise, ab)
    torch.testing.assert_close(target_of(kind, *estimates, ab), clean, rtol=0, atol=1e-8)
    torch.testing.assert_close(add_noise(*estimates, ab), noise, rtol=0, atol=1e-8)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("kind", TARGETS)
def test_both_ends_of_the_levels_are_exact_but_for_what_they_do_not_hold(
    kind: Target, share: float
) -> None:
    ab = torch.tensor(share, dtype=torch.float64)
    clean, noise = random_pair()
    noisy = add_noise(clean, noise, ab)
    assert torch.equal(noisy, clean if share else noise)
    target = target_of(kind, clean, noise, ab)
    estimates = clean_of(kind, target, noisy, ab), noise_of(kind, target, noisy, ab)
    if (kind, share) != ("noise", 0.0):
        torch.testing.assert_close(estimates[0], clean)
    else:
        assert estimates[0].isnan().all()
    if (kind, share) != ("clean", 1.0):
        torch.testing.assert_close(estimates[1], noise)
    else:
        assert estimates[1].isnan().all()


# Levels


def test_a_step_from_pure_noise_takes_the_clean_estimate_alone() -> None:
    clean, noisy = random_pair()
    zero, ab = alpha_bars(ZERO_SNR)[[-1, 500]]
    assert zero == 0
    torch.testing.assert_close(posterior_mean(clean, noisy, zero, ab), ab.sqrt() * clean)
    torch.testing.assert_close(posterior_variance(zero, ab, "fixed_small"), 1 - ab)
    assert posterior_variance(zero, ab, "fixed_large") == 1
    torch.testing.assert_close(ddim_step(noisy, clean, zero, ab), add_noise(clean, noisy, ab))
    assert torch.equal(renoise(clean, ab, zero, noisy), noisy)


def test_a_flows_state_is_the_straight_line_between_clean_and_noise() -> None:
    clean, noise = random_pair(batch=1000)
    time = expand(flow_times(1000))
    ab = expand(alpha_bars(FLOW))
    line = (1 - time) * clean + time * noise
    torch.testing.assert_close(to_flow(add_noise(clean, noise, ab), ab), line)


def test_renoising_what_was_noised_less_has_the_noise_of_the_higher_level() -> None:
    """√(α) x_b + √(1−α) ε has the mean √ᾱ_a x_0 and the variance 1 − ᾱ_a."""
    ab = alpha_bars(CONFIG)
    low, high = ab[100], ab[400]
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, 1, 1, 400_000)
    clean = torch.full(shape, 3.0, dtype=torch.float64)
    first, second = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    up = renoise(add_noise(clean, first, low), low, high, second)
    deviation = (1 - high).sqrt()
    assert abs(up.mean() - high.sqrt() * 3.0) < 5 * deviation / up.numel() ** 0.5
    assert abs(up.std() / deviation - 1) < 0.01


def test_posterior_of_a_noised_gaussian_follows_bayes() -> None:
    """Sampling x_b given x_a and x_0 has the marginal of x_b, for any two levels."""
    ab = alpha_bars(CONFIG)
    a, b = ab[600], ab[200]
    clean = torch.tensor(2.0, dtype=torch.float64).expand(1, 1, 1, 1, 1)
    mean_of_mean = posterior_mean(clean, a.sqrt() * clean, a, b)
    torch.testing.assert_close(mean_of_mean, b.sqrt() * clean)
    of_noisy = ((a / b).sqrt() * (1 - b) / (1 - a)) ** 2 * (1 - a)
    torch.testing.assert_close(of_noisy + posterior_variance(a, b, "fixed_small"), 1 - b)


def test_the_large_variance_is_beta_and_no_noise_is_added_at_the_end() -> None:
    ab = alpha_bars(CONFIG)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(posterior_variance(ab[9], ab[8], "fixed_large"), beta[9])
    assert posterior_variance(ab[0], torch.ones_like(ab[0]), "fixed_large") == 0
