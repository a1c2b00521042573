"""The diffusion process as pure functions of tensors.

Notation: x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε (Ho et al. 2020, Eq. 4; the video inpainting paper's
Eq. 2 prints the second factor without its root). `ab` is ᾱ; clean latents have ᾱ = 1 and the
timestep −1.

A rectified flow's state (1 − t) · x_0 + t · ε is one of these, times a number that its level fixes
(Kingma et al. 2021, section 5.1). So a flow is a table of ᾱ (`noise.flow_alpha_bars`), a target and
a scaling of its network's input (`to_flow`), and all samplers work on x_t whatever the process:
`ddim_step`, the same step on either scale, is Euler's step along the flow.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .settings import Target

Latents = Float[Tensor, "batch frames channels height width"]
LatentMask = Float[Tensor, "batch frames 1 height width"]
AlphaBar = Float[Tensor, "..."]  # broadcastable to the latents
Variance = Literal["fixed_small", "fixed_large"]


def expand(ab: Float[Tensor, "batch *frames"]) -> Float[Tensor, "batch ... 1 1 1"]:
    """One ᾱ per example, or one per frame of it, shaped to multiply latents."""
    return ab[(..., *[None] * (5 - ab.ndim))]


def add_noise(clean: Latents, noise: Latents, ab: AlphaBar) -> Latents:
    """x_t given x_0 (Ho et al. 2020, Eq. 4)."""
    return ab.sqrt() * clean + (1 - ab).sqrt() * noise


def to_flow(noisy: Latents, ab: AlphaBar) -> Latents:
    """x_t → (1 − t) · x_0 + t · ε, the flow's state of that level (Liu et al. 2022, section 2.1).

    From ᾱ = (1 − t)²/((1 − t)² + t²) the factor √((1 − t)² + t²) is 1/(√ᾱ + √(1 − ᾱ)).
    """
    return noisy / (ab.sqrt() + (1 - ab).sqrt())


def target_of(kind: Target, clean: Latents, noise: Latents, ab: AlphaBar) -> Latents:
    """What the network should predict for x_t.

    v is √ᾱ · ε − √(1 − ᾱ) · x_0 (Salimans & Ho 2022, section 4), the flow ε − x_0, which is the
    velocity of the flow's state (Lipman et al. 2022, along their optimal-transport path for
    σ_min = 0, with its time reversed).
    """
    match kind:
        case "noise":
            return noise
        case "v":
            return ab.sqrt() * noise - (1 - ab).sqrt() * clean
        case "clean":
            return clean
        case "flow":
            return noise - clean


def clean_of(kind: Target, prediction: Latents, noisy: Latents, ab: AlphaBar) -> Latents:
    """The clean estimate that a prediction stands for; never clamped.

    Each case solves `add_noise` and `target_of` for x_0. All are finite at every level except the
    noise: its errors grow with 1/√ᾱ (157 at T − 1 of DDPM's levels), and at pure noise it gives no
    clean estimate.
    """
    match kind:
        case "noise":
            return (noisy - (1 - ab).sqrt() * prediction) / ab.sqrt()
        case "v":
            return ab.sqrt() * noisy - (1 - ab).sqrt() * prediction
        case "clean":
            return prediction
        case "flow":
            return (noisy - (1 - ab).sqrt() * prediction) / (ab.sqrt() + (1 - ab).sqrt())


def noise_of(kind: Target, prediction: Latents, noisy: Latents, ab: AlphaBar) -> Latents:
    """The noise estimate that a prediction stands for.

    Each case solves `add_noise` and `target_of` for ε. All are finite at every level except the
    clean latents: their errors grow with 1/√(1 − ᾱ), and a clean state gives no noise estimate.
    """
    match kind:
        case "noise":
            return prediction
        case "v":
            return (1 - ab).sqrt() * noisy + ab.sqrt() * prediction
        case "clean":
            return (noisy - ab.sqrt() * prediction) / (1 - ab).sqrt()
        case "flow":
            return (noisy + ab.sqrt() * prediction) / (ab.sqrt() + (1 - ab).sqrt())


def posterior_mean(clean: Latents, noisy: Latents, ab_from: AlphaBar, ab_to: AlphaBar) -> Latents:
    """Mean of q(x_b | x_a, x_0) from level a down to b (Ho et al. 2020, Eq. 7, for any a > b)."""
    alpha = ab_from / ab_to
    of_clean = ab_to.sqrt() * (1 - alpha) / (1 - ab_from)
    of_noisy = alpha.sqrt() * (1 - ab_to) / (1 - ab_from)
    return of_clean * clean + of_noisy * noisy


def posterior_variance(
    ab_from: Float[Tensor, "*shape"], ab_to: Float[Tensor, "*shape"], variance: Variance
) -> Float[Tensor, "*shape"]:
    """β̃ = (1 − ᾱ_b)/(1 − ᾱ_a) · β (fixed small, the paper's Eq. 3) or β itself (fixed large)."""
    beta = 1 - ab_from / ab_to
    small = (1 - ab_to) / (1 - ab_from) * beta
    return small if variance == "fixed_small" else torch.where(ab_to == 1, small, beta)


def ddpm_step(
    noisy: Latents,
    clean: Latents,
    ab_from: AlphaBar,
    ab_to: AlphaBar,
    noise: Latents,
    variance: Variance = "fixed_small",
) -> Latents:
    """Sample q(x_b | x_a, x_0) at the clean estimate; at ᾱ = 1 this is the estimate itself."""
    spread = posterior_variance(ab_from, ab_to, variance).sqrt()
    return posterior_mean(clean, noisy, ab_from, ab_to) + spread * noise


def ddim_step(
    noisy: Latents,
    clean: Latents,
    ab_from: AlphaBar,
    ab_to: AlphaBar,
    noise: Latents | None = None,
    eta: float = 0.0,
) -> Latents:
    """The step of Song et al. 2021, Eq. 12: deterministic at η = 0, DDPM's (fixed small) at η = 1.

    Their σ of Eq. 16 is η times the root of DDPM's fixed small variance; η above 0 needs fresh
    `noise`.
    """
    estimate = noise_of("clean", clean, noisy, ab_from)
    if noise is None:
        assert not eta
        return add_noise(clean, estimate, ab_to)
    spread = eta * posterior_variance(ab_from, ab_to, "fixed_small").sqrt()
    kept = (1 - ab_to - spread.square()).clamp(min=0).sqrt()  # rounding may fall below 0
    return ab_to.sqrt() * clean + kept * estimate + spread * noise


def dpmpp_step(
    noisy: Latents,
    clean: Latents,
    clean_before: Latents,
    ab_from: AlphaBar,
    ab_to: AlphaBar,
    ab_before: AlphaBar,
) -> Latents:
    """DPM-Solver++ (2M) from level a to b (Lu et al. 2022b, Algorithm 2).

    This is the first-order step, DDIM's, with the clean estimate extrapolated from the previous
    level and level a, linearly in ln SNR (twice their λ). If the previous level is pure noise, at
    −∞, the formula becomes the first-order step by itself. b must not be clean (ᾱ = 1).
    """
    before, here, there = (torch.logit(ab) for ab in (ab_before, ab_from, ab_to))
    slope = (there - here) / (here - before) / 2
    return ddim_step(noisy, clean + slope * (clean - clean_before), ab_from, ab_to)


def heun_step(
    noisy: Latents,
    clean: Latents,
    noisy_there: Latents,
    clean_there: Latents,
    ab_from: AlphaBar,
    ab_to: AlphaBar,
) -> Latents:
    """Heun's step from level a to b, given a first-order step to b and a second estimate there.

    As Karras et al. 2022, Algorithm 1, but along the flow's state and time for every process: the
    slope ε − x_0 is finite at pure noise, and time ends at 1, while their σ ends at 157 with DDPM's
    betas and at 2e4 with the cosine's, too far for even steps. b must not be clean.
    """

    def slope(state: Tensor, estimate: Tensor, ab: Tensor) -> Tensor:
        return target_of("flow", estimate, noise_of("clean", estimate, state, ab), ab)

    def time(ab: Tensor) -> Tensor:
        return to_flow((1 - ab).sqrt(), ab)

    slopes = slope(noisy, clean, ab_from) + slope(noisy_there, clean_there, ab_to)
    there = to_flow(noisy, ab_from) + (time(ab_to) - time(ab_from)) * slopes / 2
    return there * (ab_to.sqrt() + (1 - ab_to).sqrt())


def renoise(latents: Latents, ab_from: AlphaBar, ab_to: AlphaBar, noise: Latents) -> Latents:
    """Go up from level b to a noisier a by the forward process (the paper's resampling step)."""
    alpha = ab_to / ab_from
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
