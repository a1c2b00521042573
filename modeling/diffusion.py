"""The diffusion process: pure functions of tensors, and the denoiser that joins them to a network.

Notation: x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε (Ho et al. 2020, Eq. 4; the video inpainting paper's
Eq. 2 prints the second factor without its root). `ab` is ᾱ, broadcastable to the latents; clean
latents have ᾱ = 1 and the timestep −1.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from ..jobs import BadInput
from .autoencoder import Precision
from .unet import VideoUNet

Latents = Float[Tensor, "batch frames channels height width"]
Target = Literal["noise", "v"]
Variance = Literal["fixed_small", "fixed_large"]


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule, what the network predicts, and how its latents are scaled."""

    timesteps: int = 1000
    """Diffusion steps T; betas rise linearly, as in DDPM."""
    beta_start: float = 1e-4
    """Beta of the first step."""
    beta_end: float = 0.02
    """Beta of the last step."""
    target: Target = "noise"
    """What the network predicts: the noise (the paper's Eq. 7), or v (Salimans & Ho 2022)."""
    normalise: bool = True
    """Shift and scale latents to mean 0 and deviation 1 a channel; false is the paper's setting."""
    mask_channel: bool = False
    """Give the mask to the network as one more channel; false is the paper's setting."""


def alpha_bars(config: DiffusionConfig) -> Float[Tensor, " timesteps"]:
    """ᾱ_t = Π (1 − β_s) for s ≤ t, in float64 (Ho et al. 2020, section 2)."""
    betas = torch.linspace(
        config.beta_start, config.beta_end, config.timesteps, dtype=torch.float64
    )
    return torch.cumprod(1 - betas, dim=0)


def expand(ab: Float[Tensor, " batch"]) -> Float[Tensor, "batch 1 1 1 1"]:
    """One ᾱ an example, shaped to multiply latents."""
    return rearrange(ab, "b -> b 1 1 1 1")


def add_noise(clean: Latents, noise: Latents, ab: Float[Tensor, "..."]) -> Latents:
    """x_t given x_0 (Ho et al. 2020, Eq. 4)."""
    return ab.sqrt() * clean + (1 - ab).sqrt() * noise


def velocity(clean: Latents, noise: Latents, ab: Float[Tensor, "..."]) -> Latents:
    """v = √ᾱ · ε − √(1 − ᾱ) · x_0 (Salimans & Ho 2022, section 4)."""
    return ab.sqrt() * noise - (1 - ab).sqrt() * clean


def target_of(kind: Target, clean: Latents, noise: Latents, ab: Float[Tensor, "..."]) -> Latents:
    """What the network should predict for x_t."""
    return noise if kind == "noise" else velocity(clean, noise, ab)


def clean_of(
    kind: Target, prediction: Latents, noisy: Latents, ab: Float[Tensor, "..."]
) -> Latents:
    """The clean estimate that a prediction stands for; never clamped."""
    if kind == "noise":
        return (noisy - (1 - ab).sqrt() * prediction) / ab.sqrt()
    return ab.sqrt() * noisy - (1 - ab).sqrt() * prediction


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
    noisy: Latents, clean: Latents, ab_from: Float[Tensor, "..."], ab_to: Float[Tensor, "..."]
) -> Latents:
    """The deterministic step (Song et al. 2021, Eq. 12 with σ = 0)."""
    noise = (noisy - ab_from.sqrt() * clean) / (1 - ab_from).sqrt()
    return add_noise(clean, noise, ab_to)


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

    Args:
        network: Predicts the target of `config`.
        config: The process that the network was trained for.
        space: The latents that it was trained on.
        precision: Of the network's layers when it denoises; states stay as they are.
    """

    def __init__(
        self,
        network: VideoUNet,
        config: DiffusionConfig,
        space: LatentSpace,
        precision: Precision = "float32",
    ) -> None:
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

    def alpha_bar(self, timestep: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """ᾱ of each timestep, in float64 on the timestep's device; 1 for the timestep −1."""
        return self._alpha_bars.to(timestep.device)[timestep]

    def normalise(self, latents: Latents) -> Latents:
        """Latents as the autoencoder scales them → mean 0 and deviation 1, where configured."""
        if not self.config.normalise:
            return latents
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Latents) -> Latents:
        """The inverse of `normalise`."""
        if not self.config.normalise:
            return latents
        mean, std = self._statistics(latents)
        return latents * std + mean

    def condition(
        self,
        masked_latents: Latents,
        latent_mask: Float[Tensor, "batch frames 1 height width"],
    ) -> Float[Tensor, "batch frames condition height width"]:
        """What the network is given beside the noisy latents.

        Args:
            masked_latents: Latents of the masked video, as the autoencoder scales them.
            latent_mask: The hole's share of each latent, 0 to 1.
        """
        known = self.normalise(masked_latents)
        return torch.cat([known, latent_mask], dim=2) if self.config.mask_channel else known

    def denoise(
        self,
        latents: Latents,
        timestep: Int[Tensor, " batch"],
        condition: Float[Tensor, "batch frames condition height width"],
    ) -> Latents:
        """Normalised noisy latents → the clean estimate, each example at its own timestep."""
        reduced = self.precision == "bfloat16"
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=reduced):
            prediction = self.network(latents, timestep, condition).to(latents.dtype)
        ab = expand(self.alpha_bar(timestep))
        return clean_of(self.config.target, prediction, latents, ab).to(latents.dtype)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            rearrange(torch.tensor(values, dtype=like.dtype, device=like.device), "c -> c 1 1")
            for values in (self.space.mean, self.space.std)
        )
        return mean, std

    def save(self, folder: Path) -> None:
        """Write `unet/` (a diffusers model folder) and `denoiser.json`."""
        self.network.save_pretrained(folder / "unet")
        described = {
            "diffusion": dataclasses.asdict(self.config),
            "latents": dataclasses.asdict(self.space),
        }
        (folder / "denoiser.json").write_text(json.dumps(described, indent=2))

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", precision: Precision = "float32") -> Denoiser:
        """Read what `save` wrote, or the newest model of a training run's folder.

        Raises:
            BadInput: `folder` is neither, or its files are damaged.
        """
        folder = _model_folder(folder)
        try:
            described = json.loads((folder / "denoiser.json").read_text())
            config = DiffusionConfig(**described["diffusion"])
            space = LatentSpace(**described["latents"])
            network, loaded = VideoUNet.from_pretrained(folder / "unet", output_loading_info=True)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            first_line = str(error).splitlines()[0]
            raise BadInput(f"the model in {folder} is damaged: {first_line}") from error
        if loaded["missing_keys"]:  # diffusers leaves such weights at random values
            raise BadInput(f"the model in {folder} lacks weights ({loaded['missing_keys'][0]})")
        return cls(network.eval().requires_grad_(False).to(device), config, space, precision)


def _model_folder(folder: Path) -> Path:
    pointer = folder / "checkpoints" / "latest"
    if pointer.is_file():
        folder = pointer.parent / pointer.read_text().strip() / "model"
    if not (folder / "denoiser.json").is_file():
        raise BadInput(
            f"{folder} holds no model: name a folder that `vidfill train` wrote, after its first "
            "checkpoint"
        )
    return folder
