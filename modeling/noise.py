"""Noise levels: their table, which of them a training step visits, and their weights.

A level is its ᾱ, the signal's share of a state's variance: 1 is clean, 0 is pure noise, and the
signal-to-noise ratio is SNR = ᾱ / (1 − ᾱ) (Kingma et al. 2021, "Variational Diffusion Models",
section 3.1). A timestep is an index into the table, 0 the least noisy. Tables are float64: 1 − ᾱ is
1e-6 at the lowest level of a flow, of which float32 keeps one digit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from jaxtyping import Float, Int
from pydantic import ConfigDict
from torch import Tensor

from .. import options
from ..errors import BadInputEverywhere
from ..options import FiniteFloat, PositiveFloat

Process = Literal["ddpm", "flow"]
Target = Literal["noise", "v", "clean", "flow"]
BetaSchedule = Literal["linear", "scaled_linear", "cosine"]
Beta = Annotated[float, Interval(gt=0, lt=1)]
PerTimestep = Float[Tensor, " timesteps"]

NO_OTHERS = ConfigDict(extra="forbid")  # a model's record has no unknown fields
BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The noise levels, what the network predicts, and how its latents are scaled."""

    __pydantic_config__ = NO_OTHERS

    timesteps: Annotated[int, Interval(ge=1, le=1_000_000)] = 1000
    """Diffusion steps T."""
    process: Process = "ddpm"
    """How latents become noise: ddpm, by betas (Ho et al. 2020); or flow, along a straight line, a
    rectified flow (Liu et al. 2022; Lipman et al. 2022)."""
    beta_schedule: BetaSchedule = "linear"
    """How the betas of ddpm rise: linear, as in DDPM; scaled_linear, as in Stable Diffusion; or
    cosine (Nichol & Dhariwal 2021)."""
    beta_start: Beta | None = None
    """Beta of the first step; null takes the schedule's own: linear 1e-4, scaled_linear 0.00085.
    Cosine takes none."""
    beta_end: Beta | None = None
    """Beta of the last step; null takes the schedule's own: linear 0.02, scaled_linear 0.012.
    Cosine takes none."""
    zero_terminal_snr: bool = False
    """Rescale the levels of ddpm so that the last one is pure noise (Lin et al. 2024), as a flow's
    always is. Then the target cannot be the noise."""
    shift: PositiveFloat = 1.0
    """Shifts the levels of flow towards noise (Esser et al. 2024): √(m / n) for latents of m values
    if evenly spaced levels suit n values; 1 leaves them evenly spaced."""
    target: Target = "noise"
    """What the network predicts: the noise (the paper's Eq. 7), v (Salimans & Ho 2022), the clean
    latents, or the flow from them to the noise, noise − clean. A flow takes any but the noise."""
    normalise: bool = True
    """Shift and scale latents to mean 0 and deviation 1 a channel; false is the paper's setting."""
    ablate_scale: PositiveFloat = 1.0
    """For ablation: multiplies latents that are not normalised. 5.49 has the effect of forgetting
    the factor 0.18215 of Stable Diffusion's autoencoder."""
    mask_channel: bool = False
    """Give the network the mask as one more channel; false is the paper's setting."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which timesteps a training step visits, and the weight of each error."""

    weighting: Literal["uniform", "min_snr"] = "uniform"
    """The weight of an error at each timestep: uniform, the same for the target at all of them (the
    paper's Eq. 7); min_snr, min(SNR, gamma) for the clean estimate (Hang et al. 2023), 0 at pure
    noise."""
    gamma: PositiveFloat = 5.0
    """For min_snr: the largest weight of a clean estimate's error."""
    hole: PositiveFloat = 1.0
    """The weight of an error inside the hole, relative to 1 outside. A clip's loss is the weighted
    mean of its errors, so its scale does not depend on the weight or on the hole's size."""
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    """How timesteps are drawn: uniformly, or middle ones more often (Esser et al. 2024)."""
    location: FiniteFloat = 0.0
    """For logit_normal: the logit of the median of timestep / T; above 0 favours noisier levels."""
    scale: PositiveFloat = 1.0
    """For logit_normal: the standard deviation of that logit."""


def check_diffusion(config: DiffusionConfig) -> None:
    """Refuse an impossible process.

    Raises:
        BadInputEverywhere: It names the field, its value and the remedy.
    """
    options.check(config, "diffusion.")
    if config.normalise:
        own_scale = "normalised latents have their own scale; give normalise false with it"
        _refuse_changed(config, ["ablate_scale"], own_scale)
    if config.process == "ddpm":
        _check_betas(config)
        return
    if config.target == "noise":
        remedy = "a flow starts at pure noise, from which clean latents do not follow; give 'flow'"
        _refuse("target", config.target, remedy)
    of_betas = ["beta_schedule", "beta_start", "beta_end", "zero_terminal_snr"]
    _refuse_changed(config, of_betas, "a flow has no betas; leave it out, or give process 'ddpm'")


def _check_betas(config: DiffusionConfig) -> None:
    _refuse_changed(config, ["shift"], "only a flow has one; leave it out, or give process 'flow'")
    if config.beta_schedule == "cosine":
        _refuse_changed(config, ["beta_start", "beta_end"], "cosine has its own; leave it out")
    else:
        start, end = _beta_range(config)
        if start > end:
            _refuse("beta_end", end, f"give a number from beta_start ({start}) to below 1")
    if config.zero_terminal_snr and config.target == "noise":
        remedy = "at zero SNR clean latents do not follow from the noise; give 'v' or 'clean'"
        _refuse("target", config.target, remedy)
    if config.zero_terminal_snr and config.timesteps < 2:
        _refuse("timesteps", config.timesteps, "zero_terminal_snr needs 2 or more")


def _refuse_changed(config: DiffusionConfig, names: Sequence[str], remedy: str) -> None:
    for name in names:
        if (value := getattr(config, name)) != getattr(DiffusionConfig, name):
            _refuse(name, value, remedy)


def _refuse(name: str, value: object, remedy: str) -> None:
    raise BadInputEverywhere(f"diffusion.{name} is {value!r}: {remedy}")


# The table


def alpha_bars(config: DiffusionConfig) -> PerTimestep:
    """ᾱ of each timestep, falling, in float64."""
    if config.process == "flow":
        return flow_alpha_bars(flow_times(config.timesteps, config.shift))
    ab = torch.cumprod(1 - betas(config), dim=0)  # Ho et al. 2020, section 2
    return zero_terminal_snr(ab) if config.zero_terminal_snr else ab


def betas(config: DiffusionConfig) -> PerTimestep:
    """β of each timestep of ddpm: the variance of the noise that its step adds, in float64."""
    if config.beta_schedule == "cosine":
        return cosine_betas(config.timesteps)
    start, end = _beta_range(config)
    if config.beta_schedule == "linear":  # β rises linearly (Ho et al. 2020, section 4)
        return torch.linspace(start, end, config.timesteps, dtype=torch.float64)
    # √β rises linearly (Rombach et al. 2022, as in their code)
    return torch.linspace(start**0.5, end**0.5, config.timesteps, dtype=torch.float64) ** 2


def _beta_range(config: DiffusionConfig) -> tuple[float, float]:
    start, end = BETAS[config.beta_schedule]
    return (
        start if config.beta_start is None else config.beta_start,
        end if config.beta_end is None else config.beta_end,
    )


def cosine_betas(timesteps: int) -> PerTimestep:
    """ᾱ = f(t)/f(0), f(t) = cos²((t/T + s)/(1 + s) · π/2) (Nichol & Dhariwal 2021, Eq. 17).

    With their s = 0.008, and β at most 0.999: at the last step it would be 1.
    """
    time = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    f = torch.cos((time + 0.008) / 1.008 * torch.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def zero_terminal_snr(ab: PerTimestep) -> PerTimestep:
    """√ᾱ shifted and scaled so that its last is 0 and its first stays (Lin et al., Algorithm 1)."""
    first, last = ab[0].sqrt(), ab[-1].sqrt()
    return ((ab.sqrt() - last) * first / (first - last)) ** 2


def flow_times(timesteps: int, shift: float = 1.0) -> PerTimestep:
    """t = (i + 1)/T of timestep i: the last is pure noise, and t of the clean state's −1 is 0.

    A shift s turns it into s·t/(1 + (s − 1)·t) (Esser et al. 2024, Eq. 23).
    """
    time = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    return shift * time / (1 + (shift - 1) * time)


def flow_alpha_bars(time: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """ᾱ of (1 − t) · x_0 + t · ε: (1 − t)² / ((1 − t)² + t²)."""
    return (1 - time) ** 2 / ((1 - time) ** 2 + time**2)


# What a training step visits


def timesteps_at(
    quantile: Float[Tensor, " batch"], timesteps: int, config: LossConfig
) -> Int[Tensor, " batch"]:
    """The timesteps at quantiles of their distribution: uniform draws in [0, 1) give a sample.

    Uniform: ⌊u·T⌋. Logit-normal: ⌊σ(m + s·Φ⁻¹(u))·T⌋ (Esser et al. 2024, Eq. 19), so that a draw u
    stands for the normal draw Φ⁻¹(u).
    """
    time = quantile.double()
    if config.timesteps == "logit_normal":
        time = torch.sigmoid(config.location + config.scale * torch.special.ndtri(time))
    return (time * timesteps).long().clamp(max=timesteps - 1)


def draw_timesteps(
    sources: Sequence[torch.Generator], timesteps: int, config: LossConfig
) -> Int[Tensor, " batch"]:
    """A timestep for each example, from its own generator."""
    draws = [torch.rand(1, generator=source, dtype=torch.float64) for source in sources]
    return timesteps_at(torch.cat(draws), timesteps, config)


# The weight of an error


def level_weight(
    target: Target, ab: Float[Tensor, "*shape"], config: LossConfig
) -> Float[Tensor, "*shape"]:
    """The weight of a squared error of the target at a level."""
    if config.weighting == "uniform":
        return torch.ones_like(ab)
    return min_snr_weight(target, ab, config.gamma)


def min_snr_weight(
    target: Target, ab: Float[Tensor, "*shape"], gamma: float
) -> Float[Tensor, "*shape"]:
    """min(SNR, γ) on the clean estimate's squared error (Hang et al. 2023, section 3.4).

    An error of the target is the clean estimate's times SNR for the noise, SNR + 1 for v and
    (√SNR + 1)² for the flow, by which the weight is divided. Written in ᾱ it is finite at both
    ends: multiplied by 1 − ᾱ, min(SNR, γ) is min(ᾱ, γ·(1 − ᾱ)).
    """
    match target:
        case "clean":
            return (ab / (1 - ab)).clamp(max=gamma)
        case "noise":
            return (gamma * (1 - ab) / ab).clamp(max=1)
        case "v":
            return torch.minimum(ab, gamma * (1 - ab))
        case "flow":
            return torch.minimum(ab, gamma * (1 - ab)) / (ab.sqrt() + (1 - ab).sqrt()) ** 2


def place_weight(
    latent_mask: Float[Tensor, "batch frames 1 height width"], hole: float
) -> Float[Tensor, "batch frames 1 height width"]:
    """1 outside the hole and `hole` inside, divided by their mean in each example.

    So the mean of the weighted errors is a weighted mean: with `hole` 1 the plain one, and an
    error that is the same everywhere gives the same loss for any weight and any hole. Where the
    hole has a share of a latent, the weight is interpolated.
    """
    weight = 1 + (hole - 1) * latent_mask
    return weight / weight.mean(dim=(1, 2, 3, 4), keepdim=True)
