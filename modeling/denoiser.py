"""A network with what is needed to use it: its diffusion process, its latents, its folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Len
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import BaseModel, GetPydanticSchema
from torch import Tensor

from ..errors import BadInput, describe
from ..options import FiniteFloat, PositiveFloat, PositiveInt
from ..progress import say_once
from ..records import parse_strictly, read_small
from .autoencoder import SHIPPED_WEIGHTS, AutoencoderRecord, fingerprint, load_weights
from .diffusion import (
    AlphaBar,
    LatentMask,
    Latents,
    add_noise,
    clean_of,
    expand,
    target_of,
    to_flow,
)
from .noise import alpha_bars, level_weight, place_weight
from .precision import autocast
from .run_folder import CHECKPOINTS, LATEST, MODEL, newest_first, newest_whole
from .settings import NO_OTHERS, SHIPPED, DiffusionConfig, LossConfig, Precision, check_diffusion
from .unet import VideoUNet

INDEX = "model_index.json"  # the record of an exported model, a diffusers pipeline
RECORD = "denoiser.json"  # the record of a model in a run's checkpoint
NETWORK, AUTOENCODER = "unet", "vae"  # folders beside either record


@dataclasses.dataclass(frozen=True)
class LatentSpace:
    """The latents that a network was trained on."""

    __pydantic_config__ = NO_OTHERS

    shape: Annotated[Sequence[PositiveInt], Len(4, 4)]  # frames, channels, height, width
    mean: Sequence[FiniteFloat]  # of each channel over the training data
    std: Sequence[PositiveFloat]  # standard deviation of each channel
    autoencoder: Annotated[  # as `Autoencoder.identity` gives it
        Mapping[str, Any], GetPydanticSchema(lambda _, handler: handler(AutoencoderRecord))
    ]


class ModelRecord(BaseModel):
    """What a model's folder records beside the weights: `denoiser.json`, or in a `ModelIndex`."""

    diffusion: DiffusionConfig
    latents: LatentSpace
    schedule: str = ""  # the usual one, of an exported model


class ModelIndex(ModelRecord):
    """`model_index.json`: it also lists the pipeline's parts, by the module and class of each.

    diffusers would import whatever they name.
    """

    unet: tuple[Literal["vidfill.modeling.unet"], Literal["VideoUNet"]]
    vae: (
        tuple[None, None] | tuple[Literal["diffusers"], Literal["AutoencoderKL", "AutoencoderTiny"]]
    )
    quantization_config: None = None


class Denoiser:
    """A network with its noise schedule, target and latent scale: one convention for all samplers.

    Samplers work on *normalised* latents; `normalise` and `denormalise` convert to and from them.
    Their states are x_t of `add_noise`, also for a flow, whose network alone sees them scaled.
    `config` and `space` are those that the network was trained with; `precision` is that of its
    layers in `denoise`, while states keep their own.

    Raises:
        BadInput: `config` is not a possible process.
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
        """The same process with other weights."""
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
        """Latents as the autoencoder scales them → mean 0 and deviation 1, if so configured."""
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
        self, masked_latents: Latents, latent_mask: LatentMask
    ) -> Float[Tensor, "batch frames condition height width"]:
        """The network's input beside the noisy latents.

        From the masked video's latents, as the autoencoder scales them, and the hole's share of
        each, 0 to 1.
        """
        known = self.normalise(masked_latents)
        return torch.cat([known, latent_mask], dim=2) if self.config.mask_channel else known

    def training_pair(
        self, clean: Latents, noise: Latents, timestep: Int[Tensor, "batch *frames"]
    ) -> tuple[Latents, Latents]:
        """The network's input for normalised latents at a timestep, and what it should predict.

        Computed in float64, like the table: float32 keeps one digit of a flow's lowest level.
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

        It is computed in the target's precision.
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

    def _seen(self, noisy: Latents, ab: AlphaBar) -> Latents:
        return to_flow(noisy, ab) if self.config.process == "flow" else noisy

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            rearrange(torch.tensor(values, dtype=like.dtype, device=like.device), "c -> c 1 1")
            for values in (self.space.mean, self.space.std)
        )
        return mean, std

    def describe(self) -> dict[str, Any]:
        """The process and the latents, as a `ModelRecord` holds them."""
        return {
            "diffusion": dataclasses.asdict(self.config),
            "latents": dataclasses.asdict(self.space),
        }

    def fingerprint(self) -> dict[str, Any]:
        """What determines its function: weights and all records, but not where things are."""
        space = dataclasses.asdict(self.space)
        del space["autoencoder"]["name"]
        return {**fingerprint(self.network), **self.describe(), "latents": space}

    def save(self, folder: Path) -> None:
        """Write `unet/` (a diffusers model folder) and `denoiser.json`."""
        self.network.save_pretrained(folder / NETWORK)
        (folder / RECORD).write_text(json.dumps(self.describe(), indent=2))

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", precision: Precision = "float32") -> Denoiser:
        """Read a model: what `save` or `vidfill export` wrote, or the newest intact one of a run.

        Weights become float32, whatever the file holds. An exported model that has its autoencoder
        beside it names that one. The folder `SHIPPED` is the package's own model.

        Raises:
            BadInput: `folder` is none of these, or its files are damaged.
        """
        model = model_folder(folder)
        try:
            record, network = read_record(model), _load_network(model, device)
        except BadInput:
            if not model.exists():  # the run goes on, and has a newer one
                return cls.load(folder, device, precision)
            raise
        space = record.latents
        if (model / AUTOENCODER).is_dir():
            identity = {**space.autoencoder, "name": str(model / AUTOENCODER)}
            space = dataclasses.replace(space, autoencoder=identity)
        return cls(network, record.diffusion, space, precision)


def _load_network(model: Path, device: str) -> VideoUNet:
    try:
        network, loaded = load_weights(VideoUNet, model / NETWORK)
    except Exception as error:  # diffusers raises many kinds for damaged files
        raise BadInput(f"the model in {model} is damaged: {describe(error)}") from error
    for keys, fault in (("missing_keys", "lacks"), ("unexpected_keys", "has no use for")):
        if loaded[keys]:  # diffusers would leave them random, or leave them out
            raise BadInput(f"the model in {model} {fault} the weights {sorted(loaded[keys])[0]}")
    return network.eval().requires_grad_(False).to(device)


def model_folder(folder: Path) -> Path:
    """Where the model of `folder` is: there, in a run's newest checkpoint, or in the package.

    Raises:
        BadInput: There is none.
    """
    if folder == Path(SHIPPED):
        say_once(
            "using the package's own small model (trained on rendered collisions of 128x128; on "
            "other videos it only shows how the tool works)"
        )
        return SHIPPED_WEIGHTS / "inpaint"
    checkpoints = folder / CHECKPOINTS
    if newest_first(checkpoints):
        pointer = checkpoints / LATEST
        latest = read_small(pointer).decode(errors="replace").strip() if pointer.is_file() else ""
        return newest_whole(checkpoints, MODEL, latest)[0] / MODEL
    if not any((folder / name).is_file() for name in (INDEX, RECORD)):
        raise BadInput(
            f"{folder} holds no model: name a folder that `vidfill export` wrote, or `vidfill "
            "train` after its first checkpoint"
        )
    return folder


def read_record(model: Path) -> ModelRecord:
    """What a model's own folder (see `model_folder`) says of the model.

    Raises:
        BadInput: Its record is damaged.
    """
    name, kind = (INDEX, ModelIndex) if (model / INDEX).is_file() else (RECORD, ModelRecord)
    file = model / name
    try:
        return parse_record(read_small(file), kind)
    except (BadInput, OSError) as error:
        raise BadInput(
            f"the model in {model} is damaged: {file.name}: {describe(error)}"
        ) from error


def parse_record(text: str | bytes, kind: type[ModelRecord] = ModelRecord) -> ModelRecord:
    """A model's record from JSON.

    Raises:
        BadInput: It names the field, its value and what it should be.
    """
    record = parse_strictly(kind, text)
    check_diffusion(record.diffusion)
    channels = record.latents.shape[1]
    for name in ("mean", "std"):
        if len(values := getattr(record.latents, name)) != channels:
            raise BadInput(
                f"latents.{name} has {len(values)} values, latents.shape {channels} channels: "
                "give one for each"
            )
    return record
