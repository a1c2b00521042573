"""The diffusion process against diffusers' schedulers and against its own definitions."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from vidfill.jobs import BadInput
from vidfill.modeling.diffusion import (
    Denoiser,
    DiffusionConfig,
    LatentSpace,
    add_noise,
    alpha_bars,
    clean_of,
    ddim_step,
    ddpm_step,
    posterior_mean,
    posterior_variance,
    renoise,
    target_of,
    velocity,
)
from vidfill.modeling.unet import VideoUNet

CONFIG = DiffusionConfig()
PROCESS = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}


def random_pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 4, 5, 6)
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64),
        torch.randn(shape, generator=generator, dtype=torch.float64),
    )


def small_denoiser(**changes: object) -> Denoiser:
    torch.manual_seed(0)
    config = DiffusionConfig(**changes)  # type: ignore[arg-type]
    network = VideoUNet(
        block_out_channels=(16, 16),
        head_channels=8,
        norm_groups=8,
        condition_channels=5 if config.mask_channel else 4,
    )
    space = LatentSpace([3, 4, 4, 4], [0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 0.5, 3.0], {"name": "x"})
    return Denoiser(network, config, space)


def diffusers_float64(scheduler: DDPMScheduler | DDIMScheduler) -> DDPMScheduler | DDIMScheduler:
    """Diffusers keeps its tables in float32; with ours in their place only the formulas differ."""
    scheduler.alphas_cumprod = alpha_bars(CONFIG)
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def test_alpha_bars_equal_those_of_diffusers() -> None:
    theirs = DDPMScheduler(**PROCESS).alphas_cumprod.double()
    torch.testing.assert_close(alpha_bars(CONFIG), theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("timestep", [999, 998, 500, 100, 1, 0])
def test_ddpm_posterior_equals_that_of_diffusers(timestep: int) -> None:
    scheduler = diffusers_float64(DDPMScheduler(**PROCESS))
    noisy, predicted = random_pair()
    ab = torch.cat([alpha_bars(CONFIG), torch.ones(1, dtype=torch.float64)])
    clean = clean_of("noise", predicted, noisy, ab[timestep])
    theirs = scheduler.step(
        predicted, timestep, noisy, generator=torch.Generator().manual_seed(7)
    ).prev_sample
    # Diffusers adds no noise at timestep 0, and neither do we on the way to clean latents.
    noise = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(7), dtype=noisy.dtype)
    ours = ddpm_step(noisy, clean, ab[timestep], ab[timestep - 1], noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("timestep", [999, 499, 99, 49])
def test_ddim_step_equals_that_of_diffusers(timestep: int) -> None:
    scheduler = diffusers_float64(DDIMScheduler(**PROCESS, timestep_spacing="trailing"))
    scheduler.set_timesteps(20)
    noisy, predicted = random_pair()
    ab = torch.cat([alpha_bars(CONFIG), torch.ones(1, dtype=torch.float64)])
    clean = clean_of("noise", predicted, noisy, ab[timestep])
    to = timestep - 50
    ours = ddim_step(noisy, clean, ab[timestep], ab[max(to, -1)])
    theirs = scheduler.step(predicted, timestep, noisy).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_velocity_equals_that_of_diffusers() -> None:
    scheduler = diffusers_float64(DDPMScheduler(**PROCESS))
    clean, noise = random_pair()
    timestep = torch.tensor([3, 700])
    ab = alpha_bars(CONFIG)[timestep][:, None, None, None, None]
    torch.testing.assert_close(
        velocity(clean, noise, ab), scheduler.get_velocity(clean, noise, timestep)
    )


@pytest.mark.parametrize("kind", ["noise", "v"])
def test_clean_estimate_of_the_true_target_is_the_clean_latents(kind: str) -> None:
    clean, noise = random_pair()
    for ab in alpha_bars(CONFIG)[[0, 10, 500, 999]]:
        noisy = add_noise(clean, noise, ab)
        estimate = clean_of(kind, target_of(kind, clean, noise, ab), noisy, ab)
        torch.testing.assert_close(estimate, clean, rtol=0, atol=1e-9)


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


def test_normalising_is_undone_by_denormalising() -> None:
    latents, _ = random_pair()
    denoiser = small_denoiser()
    normalised = denoiser.normalise(latents)
    assert not torch.equal(normalised, latents)
    torch.testing.assert_close(denoiser.denormalise(normalised), latents)
    plain = small_denoiser(normalise=False)
    assert torch.equal(plain.normalise(latents), latents)


def test_the_mask_is_a_channel_of_the_condition_only_where_asked() -> None:
    masked = torch.zeros(1, 2, 4, 3, 3)
    hole = torch.ones(1, 2, 1, 3, 3)
    assert small_denoiser().condition(masked, hole).shape[2] == 4
    with_mask = small_denoiser(mask_channel=True).condition(masked, hole)
    assert torch.equal(with_mask[:, :, 4:], hole)


@pytest.mark.parametrize("target", ["noise", "v"])
def test_saved_denoiser_equals_loaded(target: str, tmp_path) -> None:
    denoiser = small_denoiser(target=target, mask_channel=True)
    torch.nn.init.normal_(denoiser.network.conv_out.weight)
    denoiser.save(tmp_path / "model")
    loaded = Denoiser.load(tmp_path / "model")
    latents = torch.randn(2, 3, 4, 4, 4)
    condition = torch.randn(2, 3, 5, 4, 4)
    timestep = torch.tensor([999, 3])
    with torch.no_grad():
        expected = denoiser.denoise(latents, timestep, condition)
        assert torch.equal(loaded.denoise(latents, timestep, condition), expected)
    assert loaded.autoencoder == denoiser.autoencoder


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path) -> None:
    with pytest.raises(BadInput, match="holds no model"):
        Denoiser.load(tmp_path)
