"""Noise levels against diffusers' tables, loss weights against their definitions, draws in law."""

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr as ddim_rescaling
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr as ddpm_rescaling
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vidfill.errors import BadInput
from vidfill.modeling.diffusion import add_noise, clean_of, target_of
from vidfill.modeling.noise import (
    alpha_bars,
    betas,
    cosine_betas,
    draw_timesteps,
    flow_times,
    level_weight,
    min_snr_weight,
    place_weight,
    timesteps_at,
    zero_terminal_snr,
)
from vidfill.modeling.settings import DiffusionConfig, LossConfig, Target, check_diffusion
from vidfill.options import check

BY_DIFFUSERS_NAME = {
    "linear": DiffusionConfig(),
    "scaled_linear": DiffusionConfig(beta_schedule="scaled_linear"),
    "squaredcos_cap_v2": DiffusionConfig(beta_schedule="cosine"),
}
OWN_RANGE = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (0, 0)}
TARGETS: tuple[Target, ...] = ("noise", "v", "clean", "flow")
GAMMA = 5.0


def test_no_settings_mean_ddpms_levels() -> None:
    config = DiffusionConfig()
    assert (config.process, config.target, config.timesteps) == ("ddpm", "noise", 1000)
    expected = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(betas(config), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", BY_DIFFUSERS_NAME)
def test_tables_equal_those_of_diffusers(name: str) -> None:
    config, (start, end) = BY_DIFFUSERS_NAME[name], OWN_RANGE[name]
    theirs = DDPMScheduler(beta_schedule=name, beta_start=start, beta_end=end)
    # Theirs are in float32, which at the cosine's last step keeps 1 − β = 0.001 to 1e-5.
    torch.testing.assert_close(betas(config), theirs.betas.double(), rtol=1e-6, atol=0)
    ours, cumulative = alpha_bars(config), theirs.alphas_cumprod.double()
    torch.testing.assert_close(ours, cumulative, rtol=5e-5, atol=0)
    torch.testing.assert_close(ours, cumulative, rtol=0, atol=1e-5)
    assert ours.dtype == torch.float64


def test_a_given_range_of_betas_takes_the_place_of_the_schedules_own() -> None:
    config = DiffusionConfig(beta_schedule="scaled_linear", beta_start=1e-3, beta_end=0.03)
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=1e-3, beta_end=0.03)
    torch.testing.assert_close(betas(config), theirs.betas.double(), rtol=1e-6, atol=0)


def test_cosine_levels_are_nichol_and_dhariwals_where_no_beta_is_clipped() -> None:
    def f(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [f((step + 1) / 1000) / f(0) for step in range(999)]
    ours = torch.cumprod(1 - cosine_betas(1000), dim=0)
    torch.testing.assert_close(ours[:-1], torch.tensor(expected, dtype=torch.float64))
    assert cosine_betas(1000)[-1] == 0.999


@pytest.mark.parametrize("theirs", [ddpm_rescaling, ddim_rescaling])
@pytest.mark.parametrize("config", BY_DIFFUSERS_NAME.values(), ids=BY_DIFFUSERS_NAME)
def test_zero_terminal_snr_equals_that_of_diffusers(theirs, config: DiffusionConfig) -> None:
    rescaled = torch.cumprod(1 - theirs(betas(config)), dim=0)
    ours = alpha_bars(dataclasses.replace(config, zero_terminal_snr=True, target="v"))
    torch.testing.assert_close(ours, rescaled, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(ours, zero_terminal_snr(alpha_bars(config)))


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_level() -> None:
    before, after = alpha_bars(DiffusionConfig()), zero_terminal_snr(alpha_bars(DiffusionConfig()))
    assert after[-1] == 0
    torch.testing.assert_close(after[0], before[0])


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_times_equal_the_sigmas_of_diffusers(shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    ours = flow_times(1000, shift)
    torch.testing.assert_close(ours.flip(0), theirs.sigmas.double(), rtol=1e-5, atol=0)
    assert ours[-1] == 1


@given(
    timesteps=st.integers(2, 400),
    changes=st.sampled_from(
        [
            {},
            {"beta_schedule": "scaled_linear"},
            {"beta_schedule": "cosine"},
            {"zero_terminal_snr": True, "target": "v"},
            {"process": "flow", "target": "flow"},
            {"process": "flow", "target": "v", "shift": 4.0},
        ]
    ),
)
def test_levels_fall_from_below_one_to_no_less_than_zero(timesteps: int, changes: dict) -> None:
    config = DiffusionConfig(timesteps=timesteps, **changes)
    check_diffusion(config)
    ab = alpha_bars(config)
    assert ab.shape == (timesteps,)
    assert ab[0] < 1
    assert (ab.diff() < 0).all()
    assert ab[-1] >= 0
    assert (ab[-1] == 0) == (config.zero_terminal_snr or config.process == "flow")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": 0}, "diffusion.timesteps is 0: give 1 or more"),
        ({"zero_terminal_snr": True}, "diffusion.target is 'noise': at zero SNR .* give 'v'"),
        (
            {"zero_terminal_snr": True, "target": "v", "timesteps": 1},
            "diffusion.timesteps is 1: zero_terminal_snr needs 2",
        ),
        ({"process": "flow"}, "diffusion.target is 'noise': a flow starts .* give 'flow'"),
        ({"process": "flow", "target": "flow", "shift": 0.0}, "diffusion.shift is 0.0: give more"),
        ({"process": "flow", "target": "flow", "shift": math.nan}, "diffusion.shift is nan: give"),
        (
            {"process": "flow", "target": "v", "zero_terminal_snr": True},
            "diffusion.zero_terminal_snr is True: a flow has no betas; leave it out",
        ),
        (
            {"process": "flow", "target": "v", "beta_schedule": "cosine"},
            "diffusion.beta_schedule is 'cosine': a flow has no betas",
        ),
        ({"ablate_scale": 5.49}, "diffusion.ablate_scale is 5.49: normalised latents"),
        ({"normalise": False, "ablate_scale": 0.0}, "diffusion.ablate_scale is 0.0: give"),
        ({"shift": 3.0}, "diffusion.shift is 3.0: only a flow has one; .* process 'flow'"),
        ({"beta_schedule": "cosine", "beta_end": 0.02}, "diffusion.beta_end is 0.02: cosine has"),
        ({"beta_start": 0.0}, "diffusion.beta_start is 0.0: give more than 0"),
        ({"beta_start": 0.03}, r"diffusion.beta_end is 0.02: .* from beta_start \(0.03\)"),
        ({"beta_end": 1.0}, "diffusion.beta_end is 1.0: give"),
        ({"beta_end": math.nan}, "diffusion.beta_end is nan: give"),
    ],
)
def test_a_process_that_cannot_be_is_refused_with_its_remedy(changes: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_diffusion(DiffusionConfig(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 0.0}, "loss.gamma is 0.0: give more than 0"),
        ({"hole": -1.0}, "loss.hole is -1.0: give"),
        ({"scale": math.inf}, "loss.scale is inf: give"),
        ({"location": math.nan}, "loss.location is nan: give a finite number"),
    ],
)
def test_a_loss_that_cannot_be_is_refused_with_its_remedy(changes: dict, message: str) -> None:
    check(LossConfig(), "loss.")
    with pytest.raises(BadInput, match=message):
        check(LossConfig(**changes), "loss.")


# What a training step visits


def sources(count: int) -> Sequence[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_uniform_quantiles_visit_every_timestep_alike() -> None:
    quantiles = (torch.arange(6000, dtype=torch.float64) + 0.5) / 6000
    counts = timesteps_at(quantiles, 1000, LossConfig()).bincount(minlength=1000)
    assert (counts == 6).all()


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_extreme_quantiles_stay_in_range(law: str) -> None:
    config = LossConfig(timesteps=law, location=30.0, scale=10.0)  # type: ignore[arg-type]
    ends = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert timesteps_at(ends, 7, config).tolist() == [0, 6]


@pytest.mark.parametrize(("location", "scale"), [(0.0, 1.0), (-0.8, 0.5), (1.2, 1.5)])
def test_drawn_logit_normal_timesteps_have_their_distribution(
    location: float, scale: float
) -> None:
    config = LossConfig(timesteps="logit_normal", location=location, scale=scale)
    count = 20_000
    drawn = draw_timesteps(sources(count), 1000, config)
    for timestep in (20, 100, 300, 500, 700, 900, 980):
        logit = math.log(timestep / (1000 - timestep))
        expected = 0.5 * (1 + math.erf((logit - location) / scale / math.sqrt(2)))
        error = math.sqrt(expected * (1 - expected) / count)
        assert abs(float((drawn < timestep).double().mean()) - expected) < 4 * error + 1e-12


def test_drawn_uniform_timesteps_have_their_distribution() -> None:
    drawn = draw_timesteps(sources(20_000), 1000, LossConfig()).double()
    assert abs(float(drawn.mean()) - 499.5) < 4 * 1000 / math.sqrt(12 * 20_000)
    assert (drawn.min(), drawn.max()) == (0, 999)


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_a_timestep_depends_on_its_own_generator_alone(law: str) -> None:
    config = LossConfig(timesteps=law)  # type: ignore[arg-type]
    together = draw_timesteps(sources(5), 1000, config)
    alone = [draw_timesteps([source], 1000, config) for source in sources(5)]
    assert torch.equal(together, torch.cat(alone))
    assert len(set(together.tolist())) > 1


# What an error counts


def test_min_snr_weights_equal_their_published_forms() -> None:
    ab = alpha_bars(DiffusionConfig())
    snr = ab / (1 - ab)
    capped = snr.clamp(max=GAMMA)
    published = {
        "noise": capped / snr,
        "v": capped / (snr + 1),
        "clean": capped,
        "flow": capped / (snr.sqrt() + 1) ** 2,
    }
    for target in TARGETS:
        torch.testing.assert_close(min_snr_weight(target, ab, GAMMA), published[target])


@given(
    target=st.sampled_from(TARGETS),
    share=st.floats(1e-4, 1 - 1e-4),
    gamma=st.floats(0.1, 100.0),
    seed=st.integers(0, 99),
)
def test_min_snr_weighs_the_clean_estimates_error_alike_for_every_target(
    target: Target, share: float, gamma: float, seed: int
) -> None:
    ab = torch.tensor(share, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    clean, noise, error = torch.randn((3, 1, 1, 1, 2, 2), generator=generator, dtype=torch.float64)
    noisy = add_noise(clean, noise, ab)
    prediction = target_of(target, clean, noise, ab) + error
    of_clean = (clean_of(target, prediction, noisy, ab) - clean).square()
    weighted = min_snr_weight(target, ab, gamma) * error.square()
    expected = (ab / (1 - ab)).clamp(max=gamma) * of_clean
    torch.testing.assert_close(weighted, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("target", "at_pure_noise", "at_clean"),
    [("noise", 1, 0), ("v", 0, 0), ("clean", 0, GAMMA), ("flow", 0, 0)],
)
def test_min_snr_is_finite_at_both_ends(target: Target, at_pure_noise: int, at_clean: int) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert min_snr_weight(target, ends, GAMMA).tolist() == [at_pure_noise, at_clean]


def test_uniform_weights_are_one_and_min_snr_is_chosen_by_name() -> None:
    ab = alpha_bars(DiffusionConfig())
    assert (level_weight("v", ab, LossConfig()) == 1).all()
    chosen = level_weight("v", ab, LossConfig(weighting="min_snr", gamma=2.0))
    assert torch.equal(chosen, min_snr_weight("v", ab, 2.0))


def mask(share: float) -> Tensor:
    hole = torch.zeros(2, 3, 1, 4, 5)
    hole[0, :, :, :2] = share
    hole[1, 1] = share
    return hole


def test_a_hole_of_weight_one_leaves_the_plain_mean() -> None:
    assert (place_weight(mask(1.0), 1.0) == 1).all()


@given(hole=st.floats(0.01, 100.0), share=st.floats(0.0, 1.0))
def test_place_weights_have_mean_one_in_each_example(hole: float, share: float) -> None:
    means = place_weight(mask(share), hole).mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(means, torch.ones(2))


def test_the_hole_counts_its_weight_times_the_rest() -> None:
    weight = place_weight(mask(1.0), 4.0)
    inside, outside = weight[0, 0, 0, 0, 0], weight[0, 0, 0, 3, 0]
    torch.testing.assert_close(inside, 4 * outside)
    halfway = place_weight(mask(0.5), 4.0)
    torch.testing.assert_close(halfway[0, 0, 0, 0, 0], 2.5 * halfway[0, 0, 0, 3, 0])
