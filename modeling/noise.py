"""Noise levels: their table, which of them a training step visits, and their weights.

A level is its ᾱ, the signal's share of a state's variance: 1 is clean, 0 is pure noise, and the
signal-to-noise ratio is SNR = ᾱ / (1 − ᾱ) (Kingma et al. 2021, "Variational Diffusion Models",
section 3.1). A timestep is an index into the table, 0 the least noisy. Tables are float64: 1 − ᾱ is
1e-6 at the lowest level of a flow, of which float32 keeps one digit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .settings import DiffusionConfig, LossConfig, Target, beta_range

PerTimestep = Float[Tensor, " timesteps"]

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
    start, end = beta_range(config)
    if config.beta_schedule == "linear":  # β rises linearly (Ho et al. 2020, section 4)
        return torch.linspace(start, end, config.timesteps, dtype=torch.float64)
    # √β rises linearly (Rombach et al. 2022, as in their code)
    return torch.linspace(start**0.5, end**0.5, config.timesteps, dtype=torch.float64) ** 2


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
