"""The frozen autoencoder between pixels and latents: one that diffusers loads, or our own."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.utils import logging as diffusers_logging
from einops import rearrange
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import BadInput
from .precision import Precision, autocast

SHIPPED = "shipped"  # the name of the package's own small autoencoder
PAPERS = "stabilityai/sd-vae-ft-mse"  # on the hub: the one that the paper uses
SHIPPED_FOLDER = Path(__file__).parent / "weights" / "collisions"


KINDS: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"

PIXELS_PER_CALL = 2**19  # 32 frames of 128x128; bounds the memory of one call of the network
HUB_TIMEOUT = 5.0  # seconds; the hub's own client retries for 20 where there is no network


class Autoencoder:
    """A frozen autoencoder that takes every frame by itself; float32 in and out.

    Latents leave `encode` and enter `decode` scaled by the autoencoder's scaling factor; they are
    never clamped here. AutoencoderKL gives the mean of its posterior, so encoding draws nothing.
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
        self._shift = float(network.config.get("shift_factor") or 0.0)
        self.channels = int(network.config.latent_channels)
        self.downsampling = 2 ** (len(network.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(
        self, pixels: Float[Tensor, "batch frames 3 height width"], per_call: int | None = None
    ) -> Float[Tensor, "batch frames channels h w"]:
        """Pixels in [-1, 1] to scaled latents, on the autoencoder's device.

        Args:
            pixels: of any number of frames.
            per_call: frames of one call of the network; None bounds its memory.

        Raises:
            BadInput: the height or width is no multiple of `downsampling`.
        """
        self._check_size(*pixels.shape[-2:])
        latents = self._framewise(self._encode_frames, pixels, PIXELS_PER_CALL, per_call)
        return (latents - self._shift) * self.scaling_factor

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
            BadInput: the autoencoder has no posterior, or the size does not fit.
        """
        if self.kind != "AutoencoderKL":
            raise BadInput(f"{self.name} is an {self.kind}, which has no posterior to draw from")
        self._check_size(*pixels.shape[-2:])
        moments = self._framewise(self._encode_posterior, pixels, PIXELS_PER_CALL, per_call)
        mean, log_variance = moments.chunk(2, dim=2)
        mean = (mean - self._shift) * self.scaling_factor
        return mean, log_variance + 2 * math.log(self.scaling_factor)

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "batch frames channels h w"]
    ) -> Float[Tensor, "batch frames 3 height width"]:
        """Scaled latents to pixels clamped to [-1, 1], on the autoencoder's device."""
        raw = latents / self.scaling_factor + self._shift
        pixels = self._framewise(
            lambda frames: self.network.decode(frames).sample,
            raw,
            PIXELS_PER_CALL // self.downsampling**2,
        )
        return pixels.clamp(-1.0, 1.0)

    def identity(self) -> dict[str, Any]:
        """What a manifest or a model records, to tell later whether latents are of one space."""
        return {
            "name": self.name,
            "precision": self.precision,
            "kind": self.kind,
            "sha256": self.sha256,
            "scaling_factor": self.scaling_factor,
            "downsampling": self.downsampling,
            "channels": self.channels,
        }

    def _encode_frames(
        self, frames: Float[Tensor, "frames 3 height width"]
    ) -> Float[Tensor, "frames channels h w"]:
        encoded = self.network.encode(frames)
        return encoded.latents if self.kind == "AutoencoderTiny" else encoded.latent_dist.mode()

    def _encode_posterior(
        self, frames: Float[Tensor, "frames 3 height width"]
    ) -> Float[Tensor, "frames moments h w"]:
        posterior = self.network.encode(frames).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def _framewise(
        self,
        function: Callable[[Tensor], Tensor],
        video: Float[Tensor, "batch frames _ _ _"],
        points_per_call: int,
        per_call: int | None = None,
    ) -> Float[Tensor, "batch frames _ _ _"]:
        device = _find_device(self.network)
        frames = rearrange(video, "b f c h w -> (b f) c h w")
        per_call = per_call or max(1, points_per_call // (video.shape[-2] * video.shape[-1]))
        with autocast(device, self.precision):
            done = [function(_prepare(chunk, device)).float() for chunk in frames.split(per_call)]
        return rearrange(torch.cat(done), "(b f) c h w -> b f c h w", b=video.shape[0])

    def _check_size(self, height: int, width: int) -> None:
        if height % self.downsampling or width % self.downsampling:
            raise BadInput(
                f"frames of {width}x{height} do not fit the autoencoder {self.name}: "
                f"width and height must be multiples of {self.downsampling}"
            )


def _find_device(network: nn.Module) -> torch.device:
    """Where a network computes: offloaded to memory by Accelerate it lies elsewhere meanwhile."""
    hook = getattr(network, "_hf_hook", None)
    return hook.execution_device if hook else next(network.parameters()).device


def _prepare(frames: Tensor, device: torch.device) -> Tensor:
    return frames.to(device).float().contiguous(memory_format=torch.channels_last)


def load_autoencoder(
    name: str, device: str | torch.device = "cpu", precision: Precision = "float32"
) -> Autoencoder:
    """Load an autoencoder by name: "shipped", a local folder, or a name on the Hugging Face hub.

    Its kind is read off its config.json. A hub name is looked for in the hub's local cache first,
    so that a job that ran once runs again without a network. Weights are safetensors only.
    "bfloat16" convolves in that precision; weights, inputs and results stay float32.

    Raises:
        BadInput: it is not there, is no autoencoder known here, or its weights are not whole.
    """
    folder = _find_folder(name)
    kind = _read_kind(folder, name)
    if not (folder / WEIGHTS).is_file():
        raise BadInput(f"cannot load {name}: {folder} holds no {WEIGHTS}")
    try:
        with _quiet_diffusers():
            network, loaded = KINDS[kind].from_pretrained(
                folder, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise BadInput(f"cannot load {name}: {_first_line(error)}") from error
    lacking = sorted(loaded["missing_keys"])
    if lacking:  # diffusers leaves such weights at random values
        raise BadInput(f"cannot load {name}: {WEIGHTS} lacks {len(lacking)} tensors ({lacking[0]})")
    if name == SHIPPED:
        _say_shipped()
    return Autoencoder(network.to(device), name, precision)


def load_trained_autoencoder(
    trained: Mapping[str, Any],
    name: str = "",
    device: str | torch.device = "cpu",
    precision: Precision = "float32",
) -> Autoencoder:
    """Load the autoencoder whose latents a model was trained on.

    `trained` is its record in the model, with its name and the SHA-256 of its weights; `name` says
    where it lies now, if that is elsewhere.

    Raises:
        BadInput: it cannot be loaded, or is another than the record's.
    """
    name = name or trained["name"]
    try:
        autoencoder = load_autoencoder(name, device, precision)
    except BadInput as error:
        raise BadInput(f"{error}; --autoencoder says where it is") from error
    if autoencoder.sha256 != trained["sha256"]:
        raise BadInput(
            f"autoencoder is {name} (sha256 {autoencoder.sha256[:12]}); the model was trained on "
            f"{identify(trained)}: give that one with --autoencoder"
        )
    return autoencoder


def identify(autoencoder: Mapping[str, Any]) -> str:
    """The autoencoder of a model's or of a manifest's record, as messages name it."""
    return f"{autoencoder['name']} (sha256 {autoencoder['sha256'][:12]})"


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Without diffusers' remark on block_out_channels, which its own AutoencoderTiny writes."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


def to_pixels(
    frames: UInt8[np.ndarray, "*clip height width 3"],
) -> Float[Tensor, "*clip 3 height width"]:
    """Frames as files hold them, 0 to 255, to pixels in [-1, 1]."""
    return rearrange(torch.tensor(frames), "... h w c -> ... c h w").float() / 127.5 - 1


def to_frames(
    pixels: Float[Tensor, "*clip 3 height width"],
) -> UInt8[np.ndarray, "*clip height width 3"]:
    """Pixels in [-1, 1] to the nearest of 0 to 255; what lies outside is clamped."""
    levels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(levels, "... c h w -> ... h w c").cpu().numpy()


def hash_weights(network: nn.Module) -> str:
    """SHA-256 of a network's tensors in name order: name, dtype, shape, bytes.

    It does not depend on the file that they came from, nor on the device that they are on.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        plain = tensor.detach().cpu().contiguous().flatten()  # of a type that NumPy may lack
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@functools.cache
def _say_shipped() -> None:
    print(
        "vidfill: using the package's own small autoencoder (trained on synthetic clips; "
        f"real video wants another, such as {PAPERS})",
        file=sys.stderr,
    )


_REMEDY = f"give a local folder, or `--autoencoder {SHIPPED}`"


def _find_folder(name: str) -> Path:
    if name == SHIPPED:
        return SHIPPED_FOLDER
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise BadInput(
            f"cannot load {name}: no such folder, and no hub name (owner/name); "
            f"give a local folder, a hub name or {SHIPPED!r}"
        )
    return _find_cached(name) or _download(name)


def _find_cached(name: str) -> Path | None:
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise BadInput(f"cannot load {name}: {_first_line(error)}") from error
    return folder if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file() else None


def _download(name: str) -> Path:
    if not _reaches_hub():
        raise BadInput(
            f"cannot load {name}: not a local folder, and the hub cannot be reached; {_REMEDY}"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"cannot load {name} from the hub: {_first_line(error)}; {_REMEDY}"
        ) from error


def _reaches_hub() -> bool:
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # the client's errors differ between versions of the hub's library
        return False
    return True


def _read_kind(folder: Path, name: str) -> str:
    try:
        config = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise BadInput(f"cannot load {name}: {folder} holds no {CONFIG}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"cannot load {name}: {folder / CONFIG} is no JSON: {error}") from error
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise BadInput(
            f"cannot load {name}: _class_name in {folder / CONFIG} is {kind}; "
            f"it must be {' or '.join(KINDS)}"
        )
    return kind


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
