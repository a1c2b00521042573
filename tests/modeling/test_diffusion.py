"""The diffusion process against diffusers' schedulers and against its own definitions."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vidfill.errors import BadInput
from vidfill.modeling.denoiser import Denoiser, LatentSpace
from vidfill.modeling.diffusion import (
    Variance,
    add_noise,
    clean_of,
    convert,
    ddim_step,
    ddpm_step,
    expand,
    noise_of,
    posterior_log_variances,
    posterior_mean,
    posterior_variance,
    renoise,
    target_of,
    to_flow,
)
from vidfill.modeling.noise import (
    DiffusionConfig,
    LossConfig,
    Target,
    alpha_bars,
    flow_times,
    min_snr_weight,
)
from vidfill.modeling.unet import VideoUNet

CONFIG = DiffusionConfig()
ZERO_SNR = DiffusionConfig(zero_terminal_snr=True, target="v")
FLOW = DiffusionConfig(process="flow", target="flow")
CONFIGS = {
    "linear": CONFIG,
    "scaled linear": DiffusionConfig(beta_schedule="scaled_linear", target="clean"),
    "cosine": DiffusionConfig(beta_schedule="cosine", target="v"),
    "ddpm's flow": DiffusionConfig(target="flow"),
    "zero SNR": ZERO_SNR,
    "zero SNR, clean": DiffusionConfig(zero_terminal_snr=True, target="clean"),
    "zero SNR, flow": DiffusionConfig(zero_terminal_snr=True, target="flow"),
    "flow": FLOW,
    "flow, shifted": DiffusionConfig(process="flow", target="flow", shift=3.0),
    "flow, v": DiffusionConfig(process="flow", target="v"),
    "flow, clean": DiffusionConfig(process="flow", target="clean"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
with_betas = pytest.mark.parametrize(
    "config", [CONFIG, CONFIGS["scaled linear"], CONFIGS["cosine"], ZERO_SNR]
)
TARGETS: tuple[Target, ...] = ("noise", "v", "clean", "flow")
THEIR_TARGETS = {"noise": "epsilon", "v": "v_prediction", "clean": "sample"}
EVERY = torch.arange(1000)


def random_pair(batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, batch, 3, 4, 5, 6), generator=generator, dtype=torch.float64)


def small_denoiser(**changes: Any) -> Denoiser:
    torch.manual_seed(0)
    config = DiffusionConfig(**changes)
    network = VideoUNet(
        block_out_channels=(16, 16),
        head_channels=8,
        norm_groups=8,
        condition_channels=5 if config.mask_channel else 4,
    )
    space = LatentSpace([3, 4, 4, 4], [0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 0.5, 3.0], {"name": "x"})
    return Denoiser(network, config, space)


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


# Against diffusers, at every timestep


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
    for timestep in range(1000):
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
    for timestep in range(1, 1000):
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
    for timestep in scheduler.timesteps.tolist():
        clean = clean_of(config.target, predicted, noisy, ab[timestep])
        ours = ddim_step(noisy, clean, ab[timestep], ab[timestep - 1000 // steps])
        theirs = scheduler.step(predicted, timestep, noisy).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flows_network_sees_the_noised_latents_of_diffusers(shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    clean, noise = random_pair(batch=1000)
    denoiser = small_denoiser(process="flow", target="flow", shift=shift)
    seen, target = denoiser.training_pair(clean, noise, EVERY)
    expected = theirs.scale_noise(clean, theirs.timesteps.flip(0), noise)
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target, noise - clean)


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


@given(
    kind=st.sampled_from(TARGETS),
    wanted=st.sampled_from(TARGETS),
    share=st.floats(1e-6, 1 - 1e-6),
    seed=st.integers(0, 99),
)
def test_the_true_target_converts_to_every_other(
    kind: Target, wanted: Target, share: float, seed: int
) -> None:
    ab = torch.tensor(share, dtype=torch.float64)
    clean, noise = random_pair(seed=seed)
    noisy = add_noise(clean, noise, ab)
    converted = convert(kind, wanted, target_of(kind, clean, noise, ab), noisy, ab)
    expected = target_of(wanted, clean, noise, ab)
    torch.testing.assert_close(converted, expected, rtol=0, atol=1e-10)


@given(
    kind=st.sampled_from(TARGETS),
    through=st.sampled_from(TARGETS),
    share=st.floats(1e-6, 1 - 1e-6),
    seed=st.integers(0, 99),
)
def test_any_prediction_is_itself_after_a_conversion_there_and_back(
    kind: Target, through: Target, share: float, seed: int
) -> None:
    ab = torch.tensor(share, dtype=torch.float64)
    prediction, noisy = random_pair(seed=seed)
    there = convert(kind, through, prediction, noisy, ab)
    back = convert(through, kind, there, noisy, ab)
    torch.testing.assert_close(back, prediction, rtol=0, atol=1e-8)


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


@with_betas
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_log_variances_are_clipped_at_the_first_step(
    config: DiffusionConfig, variance: Variance
) -> None:
    scheduler = in_float64(DDPMScheduler, config)
    ours = posterior_log_variances(alpha_bars(config), variance)
    theirs = [scheduler._get_variance(t, variance_type=variance).log() for t in range(1000)]
    torch.testing.assert_close(ours[1:], torch.stack(theirs[1:]), rtol=1e-5, atol=1e-5)
    small = posterior_log_variances(alpha_bars(config), "fixed_small")
    assert ours[0] == small[0] == small[1]


def test_a_flows_state_is_the_straight_line_between_clean_and_noise() -> None:
    clean, noise = random_pair(batch=1000)
    time = expand(flow_times(1000))
    ab = expand(alpha_bars(FLOW))
    line = (1 - time) * clean + time * noise
    torch.testing.assert_close(to_flow(add_noise(clean, noise, ab), ab), line)


def test_each_frame_may_have_a_level_of_its_own() -> None:
    clean, noise = random_pair()
    denoiser = small_denoiser(process="flow", target="v")
    timestep = torch.tensor([[3, 500, 999], [0, 1, 2]])
    seen, target = denoiser.training_pair(clean, noise, timestep)
    for frame in range(3):
        alone = denoiser.training_pair(clean[:, [frame]], noise[:, [frame]], timestep[:, frame])
        torch.testing.assert_close((seen[:, [frame]], target[:, [frame]]), alone)


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
    unscaled = small_denoiser(normalise=False, ablate_scale=4.0)
    assert torch.equal(unscaled.normalise(latents), 4 * latents)
    assert torch.equal(unscaled.denormalise(4 * latents), latents)


def test_the_mask_is_a_channel_of_the_condition_only_where_asked() -> None:
    masked = torch.zeros(1, 2, 4, 3, 3)
    hole = torch.ones(1, 2, 1, 3, 3)
    assert small_denoiser().condition(masked, hole).shape[2] == 4
    with_mask = small_denoiser(mask_channel=True).condition(masked, hole)
    assert torch.equal(with_mask[:, :, 4:], hole)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target": "v", "zero_terminal_snr": True, "beta_schedule": "cosine"},
        {"process": "flow", "target": "flow", "shift": 2.0},
    ],
)
def test_saved_denoiser_equals_loaded(changes: dict, tmp_path) -> None:
    denoiser = small_denoiser(mask_channel=True, **changes)
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
    assert loaded.config == denoiser.config


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path) -> None:
    with pytest.raises(BadInput, match="holds no model"):
        Denoiser.load(tmp_path)


# Training and denoising


@every_config
def test_what_the_network_sees_and_should_predict_gives_back_the_clean_latents(
    config: DiffusionConfig,
) -> None:
    clean, noise = random_pair(batch=1000)
    denoiser = Denoiser(small_denoiser().network, config, LatentSpace([], [], [], {}))
    seen, target = denoiser.training_pair(clean, noise, EVERY)
    denoiser.network = lambda latents, timestep, condition: target  # type: ignore[assignment]
    ab = expand(denoiser.alpha_bar(EVERY))
    noisy = add_noise(clean, noise, ab)
    torch.testing.assert_close(denoiser.denoise(noisy, EVERY, clean), clean)
    torch.testing.assert_close(seen, to_flow(noisy, ab) if config.process == "flow" else noisy)


def test_a_pair_in_float32_has_no_more_than_its_own_rounding() -> None:
    clean, noise = random_pair(batch=1000)
    denoiser = small_denoiser(process="flow", target="v")
    exact = denoiser.training_pair(clean.float().double(), noise.float().double(), EVERY)
    for ours, theirs in zip(
        denoiser.training_pair(clean.float(), noise.float(), EVERY), exact, strict=True
    ):
        assert torch.equal(ours, theirs.float())


def test_the_plain_loss_is_the_mean_squared_error() -> None:
    target, prediction = random_pair().float()
    ours = small_denoiser().loss(
        prediction.bfloat16(), target, torch.tensor([1, 7]), torch.ones(2, 3, 1, 5, 6), LossConfig()
    )
    expected = (prediction.bfloat16().float() - target).square().mean(dim=(1, 2, 3, 4))
    assert torch.equal(ours, expected)


def test_a_weighted_loss_is_the_product_of_its_weights() -> None:
    target, prediction = random_pair()
    hole = torch.zeros(2, 3, 1, 5, 6)
    hole[:, :, :, :2] = 1
    config = LossConfig(weighting="min_snr", gamma=3.0, hole=4.0)
    timestep = torch.tensor([3, 900])
    ours = small_denoiser(target="v").loss(prediction, target, timestep, hole, config)
    errors = (prediction - target).square()
    inside, outside = (
        each.mean(dim=(1, 2, 3, 4)) for each in (errors[..., :2, :], errors[..., 2:, :])
    )
    of_level = min_snr_weight("v", alpha_bars(CONFIG)[timestep], 3.0)
    expected = of_level * (4 * 2 * inside + 3 * outside) / (4 * 2 + 3)
    torch.testing.assert_close(ours, expected)


# A Gaussian: every value of the data is N(MEAN, STD²), so the best prediction is known.

MEAN, STD = 0.7, 0.5


class GaussianNetwork(VideoUNet):
    """Predicts E[target | what it sees], which is a · x_0 + s · ε in the process's own scales."""

    process: DiffusionConfig

    def forward(self, latents: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        ab = expand(alpha_bars(self.process)[timestep])
        signal, spread = ab.sqrt(), (1 - ab).sqrt()
        if self.process.process == "flow":
            time = expand(flow_times(self.process.timesteps, self.process.shift)[timestep])
            signal, spread = 1 - time, time
        surprise = (latents - signal * MEAN) / (signal**2 * STD**2 + spread**2)
        clean, noise = MEAN + signal * STD**2 * surprise, spread * surprise
        return target_of(self.process.target, clean, noise, ab)


def gaussian_denoiser(config: DiffusionConfig) -> Denoiser:
    network = GaussianNetwork(block_out_channels=(16,), head_channels=8, norm_groups=8)
    network.process = config
    return Denoiser(network, config, LatentSpace([], [], [], {}))


@every_config
def test_denoising_a_gaussian_gives_its_posterior_mean(config: DiffusionConfig) -> None:
    denoiser = gaussian_denoiser(config)
    noisy, _ = random_pair(batch=1000)
    ab = expand(denoiser.alpha_bar(EVERY))
    gain = ab.sqrt() * STD**2 / (ab * STD**2 + 1 - ab)
    expected = MEAN + gain * (noisy - ab.sqrt() * MEAN)
    torch.testing.assert_close(denoiser.denoise(noisy, EVERY, noisy), expected)


@pytest.mark.parametrize("name", ["linear", "zero SNR", "flow", "flow, shifted"])
@pytest.mark.parametrize("solver", ["fixed_small", "fixed_large", "ddim"])
def test_sampling_a_gaussian_with_its_exact_denoiser_gives_the_gaussian(
    name: str, solver: str
) -> None:
    denoiser = gaussian_denoiser(dataclasses.replace(CONFIGS[name], timesteps=400))
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, 4, 50, 50)
    # From the noised data, since DDPM's last level is not quite pure noise.
    data, noise = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    latents = add_noise(MEAN + STD * data, noise, alpha_bars(denoiser.config)[-1])
    for level in range(399, -1, -1):
        timestep = torch.tensor([level])
        here, below = (expand(denoiser.alpha_bar(at)) for at in (timestep, timestep - 1))
        clean = denoiser.denoise(latents, timestep, latents)
        if solver == "ddim":
            latents = ddim_step(latents, clean, here, below)
        else:
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            latents = ddpm_step(latents, clean, here, below, noise, solver)  # type: ignore[arg-type]
    count = latents.numel()
    assert abs(latents.mean() - MEAN) < 4 * STD / math.sqrt(count)
    # Steps of a finite size keep the deviation to about a percent.
    assert abs(latents.std() / STD - 1) < 4 / math.sqrt(2 * count) + 0.01


# Models kept


def test_a_record_without_later_fields_loads_with_their_defaults(tmp_path) -> None:
    small_denoiser().save(tmp_path)
    record = json.loads((tmp_path / "denoiser.json").read_text())
    earlier = {"timesteps", "beta_start", "beta_end", "target", "normalise", "mask_channel"}
    record["diffusion"] = {name: record["diffusion"][name] for name in earlier}
    record["diffusion"] |= {"beta_start": 1e-4, "beta_end": 0.02}
    (tmp_path / "denoiser.json").write_text(json.dumps(record))
    loaded = Denoiser.load(tmp_path)
    assert torch.equal(loaded.alpha_bar(EVERY), alpha_bars(CONFIG))


def test_a_record_of_an_impossible_process_is_refused_with_its_folder(tmp_path) -> None:
    small_denoiser().save(tmp_path)
    path = tmp_path / "denoiser.json"
    path.write_text(path.read_text().replace('"process": "ddpm"', '"process": "flow"'))
    with pytest.raises(BadInput, match=r"is damaged: diffusion.target is 'noise': a flow"):
        Denoiser.load(tmp_path)


def test_a_denoiser_of_an_impossible_process_is_refused() -> None:
    with pytest.raises(BadInput, match=r"diffusion\.target is 'noise'"):
        small_denoiser(process="flow")
