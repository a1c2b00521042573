"""The frozen autoencoder between pixels and latents: one that diffusers loads, or our own."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
import torch
from annotated_types import Interval, Len
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.utils import logging as diffusers_logging
from einops import rearrange
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import get_session
from jaxtyping import Float, UInt8
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from typing_extensions import TypedDict

from ..errors import BadInput, describe
from ..files import PLAIN
from ..options import FiniteFloat, PositiveFloat
from ..progress import say_once
from ..records import parse_strictly, read_small
from .precision import autocast
from .settings import PAPERS, SHIPPED, Precision

SHIPPED_WEIGHTS = Path(__file__).parent / "weights"

KINDS: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"

PIXELS_PER_CALL = 2**19  # 32 frames of 128x128; bounds the memory of one call of the network
WIDEST, DEEPEST, MOST_LAYERS = 2**16, 64, 256  # what a network's configuration may say
_COUNTS_LAYERS = re.compile("(^|_)(layers|blocks)(_|$)")
HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"  # owner/name
HUB_TIMEOUT = 5.0  # seconds; the hub's own client retries for 20 if there is no network


class AutoencoderRecord(TypedDict):
    """What a manifest or a model records, to tell later whether latents are of one space."""

    name: str
    precision: NotRequired[str]
    kind: str
    sha256: str
    scaling_factor: float
    shift_factor: NotRequired[float]  # version 0.1 did not record it
    downsampling: int
    channels: int


# What two records must share for latents to be of one space; the weights last, which say least.
SHARED = ("kind", "channels", "downsampling", "scaling_factor", "shift_factor", "sha256")


class NetworkConfig(BaseModel):
    """What any network's config.json must say; diffusers reads the rest."""

    model_config = ConfigDict(strict=True, extra="allow")

    quantization_config: None = None
    """Quantised weights would be loaded by another library's code."""

    @model_validator(mode="after")
    def _check(self) -> NetworkConfig:
        """Refuse a size that no network has: to build one may take for ever."""
        for name, value in (self.__pydantic_extra__ or {}).items():
            sizes = value if isinstance(value, list) else [value]
            most = MOST_LAYERS if _COUNTS_LAYERS.search(name) else WIDEST
            largest = max((size for size in sizes if isinstance(size, int)), default=0)
            if largest > most or len(sizes) > DEEPEST:
                raise ValueError(f"{name} is {value!r:.80}: no network is of this size")
        return self


class WeightFiles(BaseModel):
    """The index of weights that lie in several files."""

    weight_map: dict[str, Annotated[str, PLAIN]]


class AutoencoderConfig(NetworkConfig):
    """What an autoencoder's config.json must say."""

    kind: Literal["AutoencoderKL", "AutoencoderTiny"] = Field(alias="_class_name")
    scaling_factor: PositiveFloat = 1.0
    shift_factor: FiniteFloat | None = None
    latent_channels: Annotated[int, Interval(ge=1, le=WIDEST)] = 4
    block_out_channels: Annotated[
        list[Annotated[int, Interval(ge=1, le=WIDEST)]], Len(1, DEEPEST)
    ] = [64]


class Autoencoder:
    """A frozen autoencoder that codes each frame by itself; float32 in and out.

    Latents leave `encode` and enter `decode` multiplied by the autoencoder's scaling factor; they
    are never clamped here. AutoencoderKL gives its posterior's mean: encoding is deterministic.
    """

    def __init__(self, network: Any, name: str, precision: Precision = "float32") -> None:
        """Freeze `network`, an AutoencoderKL or AutoencoderTiny (diffusers leaves both untyped)."""
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.name = name
        self.precision = precision
        self.kind = type(network).__name__
        self.sha256 = hash_weights(network)
        self.scaling_factor = float(network.config.scaling_factor)
        # None for Stable Diffusion 1; subtracted before scaling, as diffusers' pipelines do.
        self.shift_factor = float(network.config.get("shift_factor") or 0.0)
        self.channels = int(network.config.latent_channels)
        self.downsampling = 2 ** (len(network.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(
        self, pixels: Float[Tensor, "batch frames 3 height width"], per_call: int | None = None
    ) -> Float[Tensor, "batch frames channels h w"]:
        """Pixels in [-1, 1] to scaled latents, on the autoencoder's device.

        One call of the network takes `per_call` frames, or as many as bound its memory.

        Raises:
            BadInput: The height or width is not a multiple of `downsampling`.
        """

        def encode_frames(frames: Tensor) -> Tensor:
            encoded = self.network.encode(frames)
            return encoded.latents if self.kind == "AutoencoderTiny" else encoded.latent_dist.mode()

        latents = self._encode(encode_frames, pixels, per_call)
        return (latents - self.shift_factor) * self.scaling_factor

    @torch.no_grad()
    def encode_moments(
        self, pixels: Float[Tensor, "batch frames 3 height width"], per_call: int | None = None
    ) -> tuple[
        Float[Tensor, "batch frames channels h w"], Float[Tensor, "batch frames channels h w"]
    ]:
        """Mean and log-variance of the scaled latents' posterior, a Gaussian for every value.

        Source: Kingma & Welling, "Auto-Encoding Variational Bayes", Section 3; a scaling by s adds
        2 log s to the log-variance.

        Raises:
            BadInput: The autoencoder has no posterior, or the size does not fit.
        """

        def encode_posterior(frames: Tensor) -> Tensor:
            posterior = self.network.encode(frames).latent_dist
            return torch.cat([posterior.mean, posterior.logvar], dim=1)

        if self.kind != "AutoencoderKL":
            raise BadInput(f"{self.name} is an {self.kind}, which has no posterior to draw from")
        mean, log_variance = self._encode(encode_posterior, pixels, per_call).chunk(2, dim=2)
        mean = (mean - self.shift_factor) * self.scaling_factor
        return mean, log_variance + 2 * math.log(self.scaling_factor)

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "batch frames channels h w"]
    ) -> Float[Tensor, "batch frames 3 height width"]:
        """Scaled latents to pixels clamped to [-1, 1], on the autoencoder's device."""
        raw = latents / self.scaling_factor + self.shift_factor
        per_call = PIXELS_PER_CALL // self.downsampling**2 // math.prod(raw.shape[-2:])
        decoded = self._framewise(lambda frames: self.network.decode(frames).sample, raw, per_call)
        return decoded.clamp(-1.0, 1.0)

    def identity(self) -> dict[str, Any]:
        """Its `AutoencoderRecord`."""
        return {name: getattr(self, name) for name in AutoencoderRecord.__annotations__}

    def fingerprint(self) -> dict[str, Any]:
        """What determines its function: weights and configuration."""
        return fingerprint(self.network)

    def _encode(
        self, function: Callable[[Tensor], Tensor], pixels: Tensor, per_call: int | None
    ) -> Tensor:
        height, width = pixels.shape[-2:]
        if height % self.downsampling or width % self.downsampling:
            raise BadInput(
                f"frames of {width}x{height} do not fit the autoencoder {self.name}: "
                f"width and height must be multiples of {self.downsampling}"
            )
        return self._framewise(function, pixels, per_call or PIXELS_PER_CALL // (height * width))

    def _framewise(
        self,
        function: Callable[[Tensor], Tensor],
        video: Float[Tensor, "batch frames _ _ _"],
        per_call: int,
    ) -> Float[Tensor, "batch frames _ _ _"]:
        # Accelerate's offloading keeps the weights elsewhere until a call.
        hook = getattr(self.network, "_hf_hook", None)
        device = hook.execution_device if hook else next(self.network.parameters()).device
        frames = rearrange(video, "b f c h w -> (b f) c h w")
        with autocast(device, self.precision):
            done = [
                function(chunk.to(device).float().contiguous(memory_format=torch.channels_last))
                for chunk in frames.split(max(1, per_call))
            ]
        result = rearrange(torch.cat(done).float(), "(b f) c h w -> b f c h w", b=video.shape[0])
        if not result.isfinite().all() and video.isfinite().all():
            raise BadInput(
                f"the autoencoder {self.name} gave values that are not finite in {self.precision}: "
                "give another one, or undamaged weights"
            )
        return result


def load_autoencoder(
    name: str, device: str | torch.device = "cpu", precision: Precision = "float32"
) -> Autoencoder:
    """Load an autoencoder by name: "shipped", a local folder, or a name on the Hugging Face hub.

    Its config.json says which kind it is. A name on the hub is looked up in the local cache first,
    so that a job that ran once runs again without a network. Weights must be safetensors.
    "bfloat16" convolves in that precision; weights, inputs and results stay float32.

    Raises:
        BadInput: It is not there, is of an unknown kind, or its weights are damaged.
    """
    folder = _find_folder(name)
    try:
        kind = parse_strictly(AutoencoderConfig, read_small(folder / CONFIG)).kind
        network, loaded = load_weights(KINDS[kind], folder)
    except Exception as error:  # diffusers raises many kinds for damaged files
        raise BadInput(f"cannot load {name}: {describe(error)}") from error
    if lacking := sorted(loaded["missing_keys"]):  # diffusers leaves such weights at random values
        raise BadInput(f"cannot load {name}: {WEIGHTS} lacks {len(lacking)} tensors ({lacking[0]})")
    if name == SHIPPED:
        say_once(
            "using the package's own small autoencoder (trained on synthetic clips; real video "
            f"needs another, such as {PAPERS})"
        )
    return Autoencoder(network.to(device), name, precision)


def load_weights(kind: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A network of a class of diffusers' kind, and which weights were missing or not expected.

    From the folder alone, whose weights must be safetensors: no pickle is read and no hub is asked.
    """
    parse_strictly(NetworkConfig, read_small(folder / CONFIG))
    for index in folder.glob("*.index.json"):
        parse_strictly(WeightFiles, read_small(index))
    verbosity = diffusers_logging.get_verbosity()
    # It remarks on a field that its own AutoencoderTiny writes; what it raises is enough.
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    try:
        return kind.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    finally:
        diffusers_logging.set_verbosity(verbosity)


def _find_folder(name: str) -> Path:
    if name == SHIPPED:
        return SHIPPED_WEIGHTS / "collisions"
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(HUB_NAME, name):
        raise BadInput(
            f"cannot load {name}: no such folder, and not a name on the hub (owner/name); "
            f"give a local folder, a hub name or {SHIPPED!r}"
        )
    cached = [try_to_load_from_cache(name, file) for file in (CONFIG, WEIGHTS)]
    if all(isinstance(file, str) for file in cached):
        return Path(str(cached[0])).parent
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the client's errors differ between versions of its library
        raise BadInput(
            f"cannot load {name}: no such folder, and the hub did not give it "
            f"({describe(error)}); give a local folder, or `--autoencoder {SHIPPED}`"
        ) from error


def load_trained_autoencoder(
    trained: Mapping[str, Any],
    name: str = "",
    device: str | torch.device = "cpu",
    precision: Precision = "float32",
    option: str = "--autoencoder",
) -> Autoencoder:
    """Load the autoencoder of a model's record; `name` says where it is now, if elsewhere.

    `option` is what a person gives a name by.

    Raises:
        BadInput: It cannot be loaded, or is not the recorded one.
    """
    name = name or trained["name"]
    try:
        autoencoder = load_autoencoder(name, device, precision)
    except BadInput as error:
        raise BadInput(f"{error}; {option} says where it is") from error
    refuse_another(
        *(autoencoder.identity(), trained),
        *("autoencoder is", "the model was trained on", f"give that one with {option}"),
    )
    return autoencoder


def refuse_another(
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    has: str,
    wants: str,
    remedy: str,
    shared: Sequence[str] = SHARED,
) -> None:
    """Raise BadInput where two records of autoencoders are not of one latent space.

    `has` and `wants` begin the sentences about the two: "the shards in … were encoded with". What
    an older record does not say is not compared.
    """
    for part in shared:
        ours, theirs = found.get(part), wanted.get(part)
        if None not in (ours, theirs) and ours != theirs:
            raise BadInput(
                f"{has} {identify(found)}, whose {part} is {ours}; {wants} {identify(wanted)}, "
                f"whose {part} is {theirs}: {remedy}"
            )


def identify(autoencoder: Mapping[str, Any]) -> str:
    """The autoencoder of a model's or a manifest's record, as messages name it."""
    return f"{autoencoder['name']} (sha256 {autoencoder['sha256'][:12]})"


def to_pixels(
    frames: UInt8[np.ndarray, "*clip height width 3"],
) -> Float[Tensor, "*clip 3 height width"]:
    """8-bit frames to pixels in [-1, 1]."""
    return rearrange(torch.tensor(frames), "... h w c -> ... c h w").float() / 127.5 - 1


def to_frames(
    pixels: Float[Tensor, "*clip 3 height width"],
) -> UInt8[np.ndarray, "*clip height width 3"]:
    """Pixels to 8-bit frames, rounded; values outside [-1, 1] are clamped."""
    levels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(levels, "... c h w -> ... h w c").cpu().numpy()


def latent_mask(
    mask: UInt8[np.ndarray, "frames height width"], latent_height: int, latent_width: int
) -> Float[Tensor, "frames 1 latent_height latent_width"]:
    """The hidden share of each latent's pixels, 0 to 1: the mask averaged over areas.

    The latents' sides divide the frame's.
    """
    hidden = torch.from_numpy(np.ascontiguousarray(mask)).float().unsqueeze(1)
    return torch.nn.functional.interpolate(hidden, (latent_height, latent_width), mode="area")


def fingerprint(network: Any) -> dict[str, Any]:
    """What determines the function of a diffusers network: the weights and the configuration."""
    defaults = network.config.get("_use_default_values") or ()
    config = {
        name: value
        for name, value in network.config.items()
        if not name.startswith("_") and name not in defaults
    }
    return {"weights": hash_weights(network), "config": config}


def hash_weights(network: nn.Module) -> str:
    """SHA-256 of a network's tensors in name order: name, dtype, shape, bytes.

    It does not depend on their file or their device.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        plain = tensor.detach().cpu().contiguous().flatten()  # NumPy may lack the type
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
