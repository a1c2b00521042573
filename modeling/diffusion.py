"""The diffusion process: pure functions of tensors, and the denoiser that joins them to a network.

Notation: x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε (Ho et al. 2020, Eq. 4; the video inpainting paper's
Eq. 2 prints the second factor without its root). `ab` is ᾱ, broadcastable to the latents; clean
latents have ᾱ = 1 and the timestep −1.

A rectified flow's state (1 − t) · x_0 + t · ε is one of these, times a number that its level fixes
(Kingma et al. 2021, section 5.1). So a flow is a table of ᾱ (`noise.flow_alpha_bars`), a target and
a scaling of what its network sees (`to_flow`), and all samplers work on x_t whatever the process:
`ddim_step`, which is the same step in either scale, is Euler's along the flow.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from ..jobs import BadInput
from .checkpoint import LATEST, MODEL, newest_first, newest_whole
from .noise import (
    DiffusionConfig,
    LossConfig,
    Target,
    alpha_bars,
    check_diffusion,
    level_weight,
    place_weight,
)
from .precision import Precision, autocast
from .unet import VideoUNet

Latents = Float[Tensor, "batch frames channels height width"]
LatentMask = Float[Tensor, "batch frames 1 height width"]
Variance = Literal["fixed_small", "fixed_large"]

SHIPPED = Path("shipped")  # in place of a folder: the model that the package carries
SHIPPED_FOLDER = Path(__file__).parent / "weights" / "inpaint"
INDEX = "model_index.json"  # of a folder to give away: a diffusers pipeline's
RECORD = "denoiser.json"  # of a run's checkpoint
NETWORK, AUTOENCODER = "unet", "vae"  # folders beside either


def expand(ab: Float[Tensor, "batch *frames"]) -> Float[Tensor, "batch ... 1 1 1"]:
    """One ᾱ an example, or one a frame of it, shaped to multiply latents."""
    return ab[(..., *[None] * (5 - ab.ndim))]


def add_noise(clean: Latents, noise: Latents, ab: Float[Tensor, "..."]) -> Latents:
    """x_t given x_0 (Ho et al. 2020, Eq. 4)."""
    return ab.sqrt() * clean + (1 - ab).sqrt() * noise


def to_flow(noisy: Latents, ab: Float[Tensor, "..."]) -> Latents:
    """x_t → (1 − t) · x_0 + t · ε, the flow's state of that level (Liu et al. 2022, section 2.1).

    From ᾱ = (1 − t)²/((1 − t)² + t²) the factor √((1 − t)² + t²) is 1/(√ᾱ + √(1 − ᾱ)).
    """
    return noisy / (ab.sqrt() + (1 - ab).sqrt())


def target_of(kind: Target, clean: Latents, noise: Latents, ab: Float[Tensor, "..."]) -> Latents:
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


def clean_of(
    kind: Target, prediction: Latents, noisy: Latents, ab: Float[Tensor, "..."]
) -> Latents:
    """The clean estimate that a prediction stands for; never clamped.

    Each solves `add_noise` and `target_of` for x_0. Finite at every level, but for the noise: its
    errors grow with 1/√ᾱ (157 at T − 1 of DDPM's levels), and pure noise has no clean estimate.
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


def noise_of(
    kind: Target, prediction: Latents, noisy: Latents, ab: Float[Tensor, "..."]
) -> Latents:
    """The noise estimate that a prediction stands for.

    Each solves `add_noise` and `target_of` for ε. Finite at every level, but for the clean latents:
    their errors grow with 1/√(1 − ᾱ), and a clean state has no noise estimate.
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


def convert(
    kind: Target, wanted: Target, prediction: Latents, noisy: Latents, ab: Float[Tensor, "..."]
) -> Latents:
    """A prediction of one target as one of another.

    From v and the flow at every level; from the noise not at ᾱ = 0, from the clean latents not at
    ᾱ = 1, where they and x_t are one, and nothing says what the other is.
    """
    if kind == wanted:
        return prediction
    clean = clean_of(kind, prediction, noisy, ab)
    return target_of(wanted, clean, noise_of(kind, prediction, noisy, ab), ab)


def posterior_mean(
    clean: Latents, noisy: Latents, ab_from: Float[Tensor, "..."], ab_to: Float[Tensor, "..."]
) -> Latents:
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


def posterior_log_variances(
    ab: Float[Tensor, " timesteps"], variance: Variance
) -> Float[Tensor, " timesteps"]:
    """log of the variance of each step t → t − 1, the first clipped to the second's β̃.

    For T of 2 or more. At the first step β̃ is 0; both variances take log β̃ of the second step in
    its place (Nichol & Dhariwal 2021, as their code has it for either).
    """
    before = torch.cat([torch.ones_like(ab[:1]), ab[:-1]])
    second = posterior_variance(ab[1], ab[0], "fixed_small")
    rest = posterior_variance(ab, before, variance)[1:]
    return torch.cat([second[None], rest]).log()


def ddpm_step(
    noisy: Latents,
    clean: Latents,
    ab_from: Float[Tensor, "..."],
    ab_to: Float[Tensor, "..."],
    noise: Latents,
    variance: Variance = "fixed_small",
) -> Latents:
    """Sample q(x_b | x_a, x_0) at the clean estimate; down to ᾱ = 1 it is the estimate itself."""
    spread = posterior_variance(ab_from, ab_to, variance).sqrt()
    return posterior_mean(clean, noisy, ab_from, ab_to) + spread * noise


def ddim_step(
    noisy: Latents,
    clean: Latents,
    ab_from: Float[Tensor, "..."],
    ab_to: Float[Tensor, "..."],
    noise: Latents | None = None,
    eta: float = 0.0,
) -> Latents:
    """The step of Song et al. 2021, Eq. 12: deterministic at η = 0, DDPM's (fixed small) at η = 1.

    Their σ of Eq. 16 is η times the root of DDPM's fixed small variance; where it is above 0 it
    wants fresh `noise`.
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
    ab_from: Float[Tensor, "..."],
    ab_to: Float[Tensor, "..."],
    ab_before: Float[Tensor, "..."],
) -> Latents:
    """DPM-Solver++ (2M) from level a to b (Lu et al. 2022b, Algorithm 2).

    The first-order step, which is DDIM's, with the clean estimate extrapolated in ln SNR, twice
    their λ, from those at the level before and at a. Where the level before is pure noise, at −∞,
    the formula itself is of first order; no step of second order ends at ᾱ = 1.
    """
    before, here, there = (torch.logit(ab) for ab in (ab_before, ab_from, ab_to))
    slope = (there - here) / (here - before) / 2
    return ddim_step(noisy, clean + slope * (clean - clean_before), ab_from, ab_to)


def heun_step(
    noisy: Latents,
    clean: Latents,
    noisy_there: Latents,
    clean_there: Latents,
    ab_from: Float[Tensor, "..."],
    ab_to: Float[Tensor, "..."],
) -> Latents:
    """Heun's step from level a to b, after a first-order step there and an estimate of its own.

    As Karras et al. 2022, Algorithm 1, but along the flow's state and time, whatever the process:
    its slope ε − x_0 is finite at pure noise, and the time ends at 1, where their σ ends at 157
    under DDPM's betas and at 2e4 under the cosine's, too far for even steps. b is not clean.
    """

    def slope(state: Tensor, estimate: Tensor, ab: Tensor) -> Tensor:
        return target_of("flow", estimate, noise_of("clean", estimate, state, ab), ab)

    def time(ab: Tensor) -> Tensor:
        return to_flow((1 - ab).sqrt(), ab)

    slopes = slope(noisy, clean, ab_from) + slope(noisy_there, clean_there, ab_to)
    there = to_flow(noisy, ab_from) + (time(ab_to) - time(ab_from)) * slopes / 2
    return there * (ab_to.sqrt() + (1 - ab_to).sqrt())


def renoise(
    latents: Latents, ab_from: Float[Tensor, "..."], ab_to: Float[Tensor, "..."], noise: Latents
) -> Latents:
    """Go up from level b to a noisier a by the forward process (the paper's resampling step)."""
    alpha = ab_to / ab_from
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


@dataclasses.dataclass(frozen=True)
class LatentSpace:
    """The latents that a network was trained on."""

    shape: Sequence[int]  # frames, channels, height, width
    mean: Sequence[float]  # of each channel over the training data
    std: Sequence[float]  # deviation of each channel
    autoencoder: Mapping[str, Any]  # the identity of the autoencoder


class Denoiser:
    """A network with its noise schedule, target and latent scale: one convention for all samplers.

    Samplers work on *normalised* latents; `normalise` and `denormalise` go in and out of them.
    Their states are x_t of `add_noise`, for a flow too: only its network sees them scaled.

    Args:
        network: Predicts the target of `config`.
        config: The process that the network was trained for.
        space: The latents that it was trained on.
        precision: Of the network's layers when it denoises; states stay as they are.

    Raises:
        BadInput: `config` is impossible.
    """

    def __init__(
        self,
        network: VideoUNet,
        config: DiffusionConfig,
        space: LatentSpace,
        precision: Precision = "float32",
    ) -> None:
        check_diffusion(config)
        self.network = network
        self.config = config
        self.space = space
        self.precision = precision
        self._alpha_bars = torch.cat([alpha_bars(config), torch.ones(1, dtype=torch.float64)])

    def with_network(self, network: VideoUNet) -> Denoiser:
        """The same process around other weights."""
        return Denoiser(network, self.config, self.space, self.precision)

    @property
    def autoencoder(self) -> Mapping[str, Any]:
        """The identity of the autoencoder whose latents these are."""
        return self.space.autoencoder

    @property
    def timesteps(self) -> int:
        """Diffusion steps T of the training schedule."""
        return self.config.timesteps

    def alpha_bar(self, timestep: Int[Tensor, "batch *frames"]) -> Float[Tensor, "batch *frames"]:
        """ᾱ of each timestep, in float64 on the timestep's device; 1 for the timestep −1."""
        return self._alpha_bars.to(timestep.device)[timestep]

    def normalise(self, latents: Latents) -> Latents:
        """Latents as the autoencoder scales them → mean 0 and deviation 1, where configured."""
        if not self.config.normalise:
            return latents * self.config.ablate_scale
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Latents) -> Latents:
        """The inverse of `normalise`."""
        if not self.config.normalise:
            return latents / self.config.ablate_scale
        mean, std = self._statistics(latents)
        return latents * std + mean

    def condition(
        self,
        masked_latents: Latents,
        latent_mask: LatentMask,
    ) -> Float[Tensor, "batch frames condition height width"]:
        """What the network is given beside the noisy latents.

        Args:
            masked_latents: Latents of the masked video, as the autoencoder scales them.
            latent_mask: The hole's share of each latent, 0 to 1.
        """
        known = self.normalise(masked_latents)
        return torch.cat([known, latent_mask], dim=2) if self.config.mask_channel else known

    def training_pair(
        self, clean: Latents, noise: Latents, timestep: Int[Tensor, "batch *frames"]
    ) -> tuple[Latents, Latents]:
        """What the network sees of normalised latents at a timestep, and what it should predict.

        Computed in the table's float64: float32 keeps one digit of a flow's lowest level.
        """
        ab = expand(self.alpha_bar(timestep))
        noisy = self._seen(add_noise(clean, noise, ab), ab)
        target = target_of(self.config.target, clean, noise, ab)
        return noisy.to(clean.dtype), target.to(clean.dtype)

    def loss(
        self,
        prediction: Latents,
        target: Latents,
        timestep: Int[Tensor, "batch *frames"],
        latent_mask: LatentMask,
        config: LossConfig,
    ) -> Float[Tensor, " batch"]:
        """Each example's mean squared error (Teshome, Eq. 7), weighted by its timestep and place.

        In the target's precision, whatever the network's.
        """
        at_level = expand(level_weight(self.config.target, self.alpha_bar(timestep), config))
        weight = at_level.to(target.dtype) * place_weight(latent_mask, config.hole)
        return ((prediction.to(target.dtype) - target).square() * weight).mean(dim=(1, 2, 3, 4))

    def denoise(
        self,
        latents: Latents,
        timestep: Int[Tensor, "batch *frames"],
        condition: Float[Tensor, "batch frames condition height width"],
    ) -> Latents:
        """Normalised noisy latents → the clean estimate, each example at its own timestep."""
        ab = expand(self.alpha_bar(timestep))
        seen = self._seen(latents, ab).to(latents.dtype)
        with autocast(latents.device, self.precision):
            prediction = self.network(seen, timestep, condition).to(latents)
        return clean_of(self.config.target, prediction, latents, ab).to(latents.dtype)

    def _seen(self, noisy: Latents, ab: Float[Tensor, "..."]) -> Latents:
        return to_flow(noisy, ab) if self.config.process == "flow" else noisy

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            rearrange(torch.tensor(values, dtype=like.dtype, device=like.device), "c -> c 1 1")
            for values in (self.space.mean, self.space.std)
        )
        return mean, std

    def describe(self) -> dict[str, Any]:
        """The process and the latents, as a model's folder records them."""
        return {
            "diffusion": dataclasses.asdict(self.config),
            "latents": dataclasses.asdict(self.space),
        }

    def save(self, folder: Path) -> None:
        """Write `unet/` (a diffusers model folder) and `denoiser.json`."""
        self.network.save_pretrained(folder / NETWORK)
        (folder / RECORD).write_text(json.dumps(self.describe(), indent=2))

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", precision: Precision = "float32") -> Denoiser:
        """Read a model: what `save` or `vidfill export` wrote, or a run's newest that is whole.

        Weights are float32, whatever the file holds. An exported model names the autoencoder that
        lies beside it.

        Args:
            folder: Of the model or the run; `SHIPPED` is the package's own model.
            device: Where the network computes.
            precision: Of its layers.

        Raises:
            BadInput: `folder` is none of these, or its files are damaged.
        """
        model = model_folder(folder)
        try:
            described = json.loads(_record_in(model).read_text())
            config = DiffusionConfig(**described["diffusion"])
            check_diffusion(config)
            space = LatentSpace(**described["latents"])
            network, loaded = VideoUNet.from_pretrained(
                model / NETWORK, torch_dtype=torch.float32, output_loading_info=True
            )
        except (BadInput, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if not model.exists():  # its run goes on, and has a newer one
                return cls.load(folder, device, precision)
            first_line = str(error).splitlines()[0]
            raise BadInput(f"the model in {model} is damaged: {first_line}") from error
        if loaded["missing_keys"]:  # diffusers leaves such weights at random values
            raise BadInput(f"the model in {model} lacks weights ({loaded['missing_keys'][0]})")
        if (model / AUTOENCODER).is_dir():
            identity = {**space.autoencoder, "name": str(model / AUTOENCODER)}
            space = dataclasses.replace(space, autoencoder=identity)
        return cls(network.eval().requires_grad_(False).to(device), config, space, precision)


def model_folder(folder: Path) -> Path:
    """Where the model lies that a folder stands for: its own, a run's newest, the package's.

    Raises:
        BadInput: There is none.
    """
    if folder == SHIPPED:
        _say_shipped()
        return SHIPPED_FOLDER
    checkpoints = folder / "checkpoints"
    if newest_first(checkpoints):
        pointer = checkpoints / LATEST
        named = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
        return newest_whole(checkpoints, MODEL, named)[0] / MODEL
    if not _record_in(folder).is_file():
        raise BadInput(
            f"{folder} holds no model: name a folder that `vidfill export` wrote, or `vidfill "
            "train` after its first checkpoint"
        )
    return folder


def _record_in(model: Path) -> Path:
    """The file that describes a model, whether it is to give away or a run's checkpoint."""
    return model / (INDEX if (model / INDEX).is_file() else RECORD)


@functools.cache
def _say_shipped() -> None:
    print(
        "vidfill: using the package's own small model (trained on rendered collisions of 128x128; "
        "on other videos it only shows how things work)",
        file=sys.stderr,
    )
