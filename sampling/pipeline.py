"""A model and its autoencoder as a diffusers pipeline, and the folder that can be given away.

model_index.json   the parts, the process, the latents and the usual schedule
unet/              the network
vae/               the autoencoder, where it is not the one that every vidfill carries
README.md          the model card
pipeline.py        for `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from einops import rearrange
from huggingface_hub import create_repo, snapshot_download, upload_folder
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from ..data.videos import FrameSize
from ..errors import BadInput
from ..modeling.autoencoder import SHIPPED as SHIPPED_AUTOENCODER
from ..modeling.autoencoder import Autoencoder, load_autoencoder
from ..modeling.denoiser import INDEX, Denoiser, LatentSpace, model_folder
from ..modeling.noise import DiffusionConfig
from ..modeling.precision import Precision
from ..modeling.unet import VideoUNet
from .inpaint.blending import FEATHER
from .inpaint.windows import SCHEDULE, Filler, fill_stretches
from .metrics.pixels import Frames, Mask
from .schedules.language import parse
from .schedules.program import compile_schedule

Images = Sequence[Any] | np.ndarray | Tensor
Output = Literal["pil", "np", "pt"]

CARD = "README.md"
REMOTE = "pipeline"  # the module that diffusers runs to find the class
REMOTE_CODE = "from vidfill.sampling.pipeline import VideoInpaintPipeline  # noqa: F401\n"
OF_THE_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")


@dataclasses.dataclass
class VideoInpaintPipelineOutput(BaseOutput):
    """What a `VideoInpaintPipeline` returns."""

    frames: list[list[Image.Image]] | np.ndarray | Tensor
    """Of each sample: images; or an array [samples, frames, height, width, 3] from 0 to 1; or a
    tensor [samples, frames, 3, height, width] from 0 to 1. Times 255 and rounded they are the 8-bit
    frames, those of the video itself outside the holes."""


class VideoInpaintPipeline(DiffusionPipeline):
    """Fills the holes of a video of any length.

    Args:
        unet: The network.
        vae: Its autoencoder; None loads the one that `latents` names.
        diffusion: A `DiffusionConfig` as a dictionary.
        latents: A `LatentSpace` as a dictionary.
        schedule: What is used where a call gives none.

    Raises:
        BadInput: These do not fit together.
    """

    model_cpu_offload_seq = "vae->unet"  # type: ignore[assignment]
    _exclude_from_cpu_offload = ["vae"]  # noqa: RUF012  # layer by layer only the network is worth it
    _optional_components = ["vae"]  # noqa: RUF012
    unet: VideoUNet
    vae: Any  # AutoencoderKL or AutoencoderTiny, which diffusers leaves untyped

    def __init__(
        self,
        unet: VideoUNet,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        diffusion: dict[str, Any] | None = None,
        latents: dict[str, Any] | None = None,
        schedule: str = SCHEDULE,
    ) -> None:
        super().__init__()
        if diffusion is None or latents is None:
            raise BadInput(f"diffusion and latents are missing: {INDEX} has them, or give both")
        self.register_modules(unet=unet, vae=vae)
        self.register_to_config(diffusion=diffusion, latents=latents, schedule=schedule)
        if vae is None:
            self.vae = load_autoencoder(latents["autoencoder"]["name"]).network
        compile_schedule(parse(schedule), self.denoiser.timesteps)
        self._check_autoencoder()

    @classmethod
    def of(
        cls, denoiser: Denoiser, autoencoder: Autoencoder, schedule: str = SCHEDULE
    ) -> VideoInpaintPipeline:
        """A pipeline of a network and its autoencoder; the package's own is not saved with it."""
        shipped = autoencoder.name == SHIPPED_AUTOENCODER
        vae = None if shipped else autoencoder.network
        described = denoiser.describe()
        return cls(denoiser.network, vae, schedule=schedule, **described)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> VideoInpaintPipeline:
        """Load a folder, a name on the Hugging Face hub, or "shipped", the package's own model.

        Args:
            pretrained_model_name_or_path: What `vidfill export` or `save_pretrained` wrote.
            kwargs: As every diffusers pipeline takes them: dtype, variant, revision, …

        Raises:
            BadInput: The folder holds no pipeline.
        """
        name = str(pretrained_model_name_or_path)
        of_the_hub = {key: kwargs.pop(key) for key in OF_THE_HUB if key in kwargs}
        if name.count("/") == 1 and not Path(name).exists():
            folder = Path(snapshot_download(name, **of_the_hub))
        else:
            folder = model_folder(Path(name))
        if not (folder / INDEX).is_file():
            raise BadInput(f"{folder} has no {INDEX}: `vidfill export` makes a pipeline of a run")
        return super().from_pretrained(str(folder), **{"use_safetensors": True} | kwargs)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As of every diffusers pipeline; the class is this one, whatever file holds it."""
        config: Any = super().load_config(*args, **kwargs)
        config["_class_name"] = cls.__name__
        return config

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write a folder that `from_pretrained` reads, with the card of the one it came from.

        Args:
            save_directory: The folder.
            push_to_hub: Upload it too; then also repo_id, commit_message, private, token and
                create_pr may be given.
            kwargs: variant and max_shard_size, as every diffusers pipeline takes.
        """
        folder = Path(save_directory)
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        of_the_hub = {key: kwargs.pop(key) for key in names if key in kwargs}
        for network in (self.unet, self.vae):  # where they were loaded from is nobody's business
            network.register_to_config(_name_or_path="")
        super().save_pretrained(folder, **kwargs)
        index = json.loads((folder / INDEX).read_text())
        index |= {"_class_name": [REMOTE, type(self).__name__]}
        index.pop("_name_or_path", None)
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (folder / f"{REMOTE}.py").write_text(REMOTE_CODE)
        for weights in folder.rglob("*.safetensors"):  # which nobody else could read
            weights.chmod((folder / INDEX).stat().st_mode)
        card = Path(self.name_or_path or "") / CARD
        if self.name_or_path and card.is_file() and not (folder / CARD).exists():
            shutil.copyfile(card, folder / CARD)
        if push_to_hub:
            _upload(folder, **{"repo_id": folder.name} | of_the_hub)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes, the card included; return where it lies."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            return _upload(Path(folder), repo_id, commit_message, private, token, create_pr)

    @property
    def denoiser(self) -> Denoiser:
        """The network and its process, as the sampler takes them."""
        return Denoiser(
            self.unet.eval(),
            DiffusionConfig(**self.config["diffusion"]),
            LatentSpace(**self.config["latents"]),
            _precision(self.unet),
        )

    @property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder, as the sampler takes it."""
        name = self.config["latents"]["autoencoder"]["name"]
        return Autoencoder(self.vae, name, _precision(self.vae))

    def _check_autoencoder(self) -> None:
        ours, theirs = self.autoencoder, self.config["latents"]["autoencoder"]
        for name in ("kind", "channels", "downsampling", "scaling_factor"):
            if getattr(ours, name) != theirs[name]:
                raise BadInput(
                    f"vae has {name} {getattr(ours, name)}; the network was trained on latents of "
                    f"one with {theirs[name]}: give that one"
                )

    @torch.no_grad()
    def __call__(
        self,
        video: Images,
        mask: Images | Image.Image,
        schedule: str | None = None,
        *,
        num_samples: int = 1,
        seed: int = 0,
        generator: torch.Generator | None = None,
        output_type: Output = "pil",
        size: tuple[int, int] | None = None,
        overlap: int | None = None,
        feather: int = FEATHER,
        colour_match: bool = True,
    ) -> VideoInpaintPipelineOutput:
        """Fill the holes of a video; outside them it stays as it is, to the bit.

        Args:
            video: PIL images; an array [frames, height, width, 3]; or a tensor [frames, 3, height,
                width]. Of 8-bit values, or floats from 0 to 1.
            mask: What to fill is white: PIL images, an array [frames, height, width] or a tensor
                [frames, 1, height, width]; or one of these without frames, for all of them. True,
                or from the middle of its type's range on, is white; an array of 8-bit values that
                are all 0 or 1 has 1 as white.
            schedule: As `vidfill schedule --help` has them; None takes the model's usual one.
            num_samples: Completions.
            seed: The same one gives the same completions; each frame's noise depends on it, on the
                frame's number and on the sample's, and on nothing else.
            generator: Draws the seed, in place of `seed`.
            output_type: pil, np or pt: see `VideoInpaintPipelineOutput`.
            size: Width and height that the network sees the surroundings of the holes at, about;
                None takes those that it was trained at.
            overlap: Frames that a window takes over from the one before; None takes a quarter.
            feather: Pixels, from the hole's border inwards, in which the result goes over into what
                is around.
            colour_match: Whether the result is shifted in colour by what its surroundings are off.

        Raises:
            BadInput: naming what does not fit.
        """
        if output_type not in get_args(Output):
            listed = ", ".join(get_args(Output))
            raise BadInput(f"output_type is {output_type!r}: give one of {listed}")
        if num_samples < 1:
            raise BadInput(f"num_samples is {num_samples}: give 1 or more")
        frames = read_video(video)
        masks = read_mask(mask, frames)
        denoiser = self.denoiser
        if generator is not None:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        filler = Filler(
            denoiser,
            self.autoencoder,
            compile_schedule(parse(schedule or self.config["schedule"]), denoiser.timesteps),
            seed,
            range(num_samples),
            size and FrameSize(*size),
            overlap,
            feather,
            colour_match,
        )
        results: list[list[np.ndarray]] = [[] for _ in range(num_samples)]
        with self.progress_bar(total=len(frames)) as bar:
            for stretch in fill_stretches(zip(frames, masks, strict=True), filler):
                for result, filled in zip(results, stretch.frames, strict=True):
                    result.extend(filled)
                bar.update(len(stretch.masks))
        self.maybe_free_model_hooks()
        return VideoInpaintPipelineOutput(_write_frames(results, output_type))


def _precision(network: torch.nn.Module) -> Precision:
    """That of a network's weights: it computes in it, from and to float32."""
    return cast(Precision, str(next(network.parameters()).dtype).removeprefix("torch."))


def _upload(
    folder: Path,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> str:
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    return upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message or "Upload VideoInpaintPipeline",
        token=token,
        create_pr=create_pr,
    )


def read_video(video: Images) -> Frames:
    """A video as people hold it, as 8-bit frames: see `VideoInpaintPipeline`.

    Raises:
        BadInput: it is none.
    """
    values = _read(video, "video", "RGB")
    if isinstance(video, Tensor):
        values = np.moveaxis(values, 1, -1) if values.ndim == 4 else values
    if values.ndim != 4 or values.shape[-1] != 3 or not values.size:
        wanted = "3, height, width" if isinstance(video, Tensor) else "height, width, 3"
        raise BadInput(
            f"video has the shape {list(np.shape(video))}: give one of [frames, {wanted}]"
        )
    return values if values.dtype == np.uint8 else np.rint(values * 255).astype(np.uint8)


def read_mask(mask: Images | Image.Image, frames: Frames) -> Mask:
    """A mask as people hold it, as 1 in the hole and 0 elsewhere: see `VideoInpaintPipeline`.

    Raises:
        BadInput: it is none, or does not fit the frames.
    """
    values = _read(mask, "mask", "L")
    if values.ndim == 4:
        channels = 1 if isinstance(mask, Tensor) else 3
        values = values.squeeze(channels) if values.shape[channels] == 1 else values
    values = values[None] if values.ndim == 2 else values
    if values.shape not in (frames.shape[:3], (1, *frames.shape[1:3])):
        raise BadInput(
            f"mask has the shape {list(values.shape)}, the video's frames "
            f"{list(frames.shape[:3])} (frames, height, width): give one for each frame, or one "
            "for all, of their size"
        )
    of_numbers = isinstance(mask, np.ndarray | Tensor)
    if values.dtype != np.uint8:
        hole = values >= 0.5
    else:
        hole = values > 0 if of_numbers and values.max() <= 1 else values >= 128
    return np.broadcast_to(hole.astype(np.uint8), frames.shape[:3])


def _read(images: Images | Image.Image, name: str, mode: str) -> np.ndarray:
    """Images as one array of 8-bit values, or of floats from 0 to 1, or of truths."""
    if isinstance(images, Tensor):
        tensor = images.detach().cpu()
        values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    elif isinstance(images, np.ndarray):
        values = images
    else:
        values = _stack([images] if isinstance(images, Image.Image) else images, name, mode)
    if values.dtype in (np.uint8, np.bool_):
        return values
    if not np.issubdtype(values.dtype, np.floating):
        raise BadInput(f"{name} is of {values.dtype}: give 8-bit values, or floats from 0 to 1")
    if values.size and not (values.min() >= 0 and values.max() <= 1):  # a NaN is neither
        raise BadInput(
            f"{name} has values from {values.min():g} to {values.max():g}: give floats from 0 to "
            "1, or 8-bit values"
        )
    return values


def _stack(images: Sequence[Any], name: str, mode: str) -> np.ndarray:
    if not all(isinstance(image, Image.Image) for image in images):
        raise BadInput(f"{name} is a list of other things than PIL images: give these, or an array")
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        listed = " and ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise BadInput(f"{name} has images of {listed or 'no size'}: give one or more of one size")
    return np.stack([np.array(image.convert(mode)) for image in images])


def _write_frames(
    samples: Sequence[Sequence[UInt8[np.ndarray, "height width 3"]]], output_type: Output
) -> list[list[Image.Image]] | np.ndarray | Tensor:
    if output_type == "pil":
        return [[Image.fromarray(frame) for frame in frames] for frames in samples]
    values = np.stack([np.stack(frames) for frames in samples]).astype(np.float32) / 255
    if output_type == "np":
        return values
    return rearrange(torch.from_numpy(values), "s f h w c -> s f c h w")
