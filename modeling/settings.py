"""What a network and its process are told. A command line imports this, and torch nowhere here.

Named networks are options of `VideoUNet`: a new one is an entry of `PRESETS` and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from annotated_types import Interval
from pydantic import ConfigDict

from .. import options
from ..errors import BadInputEverywhere
from ..options import FiniteFloat, PositiveFloat

SHIPPED = "shipped"  # the name of the package's own small autoencoder, and of its own model
PAPERS = "stabilityai/sd-vae-ft-mse"  # the autoencoder that the paper uses, on the hub

Precision = Literal["float32", "bfloat16", "float16"]  # of a network's layers
AttentionBackend = Literal["auto", "xformers", "sdpa", "reference"]
Conditioning = Literal["concatenation", "cross_attention", "adaptive"]
Process = Literal["ddpm", "flow"]
Target = Literal["noise", "v", "clean", "flow"]
BetaSchedule = Literal["linear", "scaled_linear", "cosine"]
Beta = Annotated[float, Interval(gt=0, lt=1)]

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
        start, end = beta_range(config)
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


def beta_range(config: DiffusionConfig) -> tuple[float, float]:
    """The first and the last beta of a schedule that rises from one to the other."""
    start, end = BETAS[config.beta_schedule]
    return (
        start if config.beta_start is None else config.beta_start,
        end if config.beta_end is None else config.beta_end,
    )


# RaMViD's network (Höppe et al. 2022, appendix): what its two sizes share.
_RAMVID = {
    "layers_per_block": 2,
    "norm_groups": 32,
    "heads": 4,
    "convolution": "joint",
    "positions": "none",
    "normalisation": "clip",
    "middle_blocks": 2,
    "upsample_convolution": True,
}

_BIG = {"layers_per_block": 2, "head_channels": 64, "norm_groups": 32, "positions": "axial"}

PRESETS: dict[str, dict[str, Any]] = {
    # For tests and laptops.
    "tiny": {
        "block_out_channels": (32, 64, 128),
        "attention": ("time", "both", "joint", "joint"),
        "positions": "axial",
    },
    # Below 10 MB in half precision: the model that the package carries.
    "mini": {
        "block_out_channels": (96, 96, 160),
        "attention": ("none", "time", "joint", "joint"),
        "positions": "axial",
    },
    # For a single small GPU, or a patient CPU.
    "small": {
        "block_out_channels": (128, 128, 256),
        "attention": ("none", "time", "joint", "joint"),
        "positions": "axial",
    },
    # The size of ramvid-32, at less than half its operations.
    "base": {
        "block_out_channels": (128, 256, 512, 512),
        "attention": ("time", "both", "joint", "joint", "joint"),
        **_BIG,
    },
    # For many GPUs and much data.
    "large": {
        "block_out_channels": (256, 512, 768, 1024),
        "attention": ("time", "both", "joint", "joint", "joint"),
        **_BIG,
    },
    # The paper's network, for latents of 32×32.
    "ramvid-32": {
        "block_out_channels": (128, 256, 256, 256),
        "attention": ("none", "joint", "joint", "none", "joint"),
        **_RAMVID,
    },
    # The paper's network, for latents of 64×64.
    "ramvid-64": {
        "block_out_channels": (128, 256, 384, 512),
        "attention": ("none", "none", "joint", "joint", "joint"),
        **_RAMVID,
    },
}
