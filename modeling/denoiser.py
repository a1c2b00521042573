"""A network with all that is needed to use it: the diffusion, the latents' space, its folder."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from ..errors import BadInput
from .diffusion import LatentMask, Latents, add_noise, clean_of, expand, target_of, to_flow
from .noise import (
    DiffusionConfig,
    LossConfig,
    alpha_bars,
    check_diffusion,
    level_weight,
    place_weight,
)
from .precision import Precision, autocast
from .run_folder import LATEST, MODEL, newest_first, newest_whole
from .unet import VideoUNet

SHIPPED = Path("shipped")  # in place of a folder: the model that the package carries
SHIPPED_FOLDER = Path(__file__).parent / "weights" / "inpaint"
INDEX = "model_index.json"  # of a folder to give away: a diffusers pipeline's
RECORD = "denoiser.json"  # of a run's checkpoint
NETWORK, AUTOENCODER = "unet", "vae"  # folders beside either


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
