"""A model and its autoencoder as a diffusers pipeline, and its folder.

model_index.json   the parts, the process, the latents and the usual schedule
unet/              the network
vae/               the autoencoder, unless it is the one that the package carries
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
from diffusers.video_processor import VideoProcessor
from einops import rearrange
from huggingface_hub import create_repo, snapshot_download, upload_folder
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from ..data.videos import Frames, FrameSize, Masks
from ..errors import BadInput, describe
from ..modeling.autoencoder import (
    CONFIG,
    SHARED,
    Autoencoder,
    NetworkConfig,
    load_autoencoder,
    refuse_another,
)
from ..modeling.denoiser import INDEX, Denoiser, model_folder, parse_record, read_record
from ..modeling.settings import SHIPPED, Precision
from ..modeling.unet import VideoUNet
from ..records import parse_strictly, read_small
from .inpaint.settings import FEATHER, SCHEDULE
from .inpaint.windows import FillSettings, fill_windows
from .schedules.language import parse
from .schedules.program import compile_schedule

Images = Sequence[Any] | np.ndarray | Tensor
OutputType = Literal["pil", "np", "pt"]

CARD = "README.md"
REMOTE = "pipeline"  # the module that diffusers runs to find the class
REMOTE_CODE = "from vidfill.sampling.pipeline import VideoInpaintPipeline  # noqa: F401\n"
DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


@dataclasses.dataclass
class VideoInpaintPipelineOutput(BaseOutput):
    """What a `VideoInpaintPipeline` returns."""

    frames: list[list[Image.Image]] | np.ndarray | Tensor
    """For each sample a list of images; or an array [samples, frames, height, width, 3] from 0 to
    1; or a tensor [samples, frames, 3, height, width] from 0 to 1. Multiplied by 255 and rounded,
    they are the 8-bit frames, which outside the holes are the video's own."""


class VideoInpaintPipeline(DiffusionPipeline):
    """Fills the holes of a video of any length.

    Args:
        unet: The network.
        vae: Its autoencoder; None loads the one that `latents` names.
        diffusion: A `DiffusionConfig` as a dictionary.
        latents: A `LatentSpace` as a dictionary.
        schedule: The one to use if a call gives none.

    Raises:
        BadInput: These do not fit together.
    """

    model_cpu_offload_seq = "vae->unet"  # type: ignore[assignment]
    _exclude_from_cpu_offload = ["vae"]  # noqa: RUF012  # only the network is worth it layer by layer
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
        trained = self.denoiser.autoencoder
        if vae is None:
            self.vae = load_autoencoder(trained["name"]).network
        compile_schedule(parse(schedule), self.denoiser.timesteps)
        # The weights of a variant were rounded, and have another hash.
        shared = SHARED if vae is None else [part for part in SHARED if part != "sha256"]
        refuse_another(
            *(self.autoencoder.identity(), trained, "vae is"),
            *("the network was trained on latents of", "give that one", shared),
        )

    @classmethod
    def of(
        cls, denoiser: Denoiser, autoencoder: Autoencoder, schedule: str = SCHEDULE
    ) -> VideoInpaintPipeline:
        """A pipeline of a network and its autoencoder; the package's own is not saved with it."""
        vae = None if autoencoder.name == SHIPPED else autoencoder.network
        return cls(denoiser.network, vae, schedule=schedule, **denoiser.describe())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> VideoInpaintPipeline:
        """Load a folder, a name on the Hugging Face hub, or "shipped", the package's own model.

        From what `vidfill export` or `save_pretrained` wrote, with the keyword arguments of every
        diffusers pipeline: dtype, variant, revision, …

        Raises:
            BadInput: The folder holds no pipeline, or a damaged one.
        """
        name = str(pretrained_model_name_or_path)
        options = {key: kwargs.pop(key) for key in DOWNLOAD_OPTIONS if key in kwargs}
        if name.count("/") == 1 and not Path(name).exists():
            # Not by diffusers, which would ask for leave to run the code that it finds there.
            folder = Path(snapshot_download(name, **options))
        else:
            folder = model_folder(Path(name))
        if not (folder / INDEX).is_file():
            raise BadInput(f"{folder} has no {INDEX}: `vidfill export` makes a pipeline of a run")
        read_record(folder)
        only = {"use_safetensors": True, "local_files_only": True}
        try:
            for config in folder.glob(f"*/{CONFIG}"):
                parse_strictly(NetworkConfig, read_small(config))
            return super().from_pretrained(str(folder), **kwargs | only)
        except Exception as error:  # diffusers raises many kinds for damaged files
            raise BadInput(f"cannot load the model in {folder}: {describe(error)}") from error

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As in every diffusers pipeline; the class is this one, whatever file names it."""
        config: Any = super().load_config(*args, **kwargs)
        config["_class_name"] = cls.__name__
        return config

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write a folder that `from_pretrained` reads, with the card of the one it came from."""
        folder = Path(save_directory)
        for network in (self.unet, self.vae):  # no paths of this machine
            network.register_to_config(_name_or_path="")
        super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
        index = json.loads((folder / INDEX).read_text())
        index |= {"_class_name": [REMOTE, type(self).__name__]}
        index.pop("_name_or_path", None)
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (folder / f"{REMOTE}.py").write_text(REMOTE_CODE)
        for weights in folder.rglob("*.safetensors"):  # written for this user alone
            weights.chmod((folder / INDEX).stat().st_mode)
        card = Path(self.name_or_path or "") / CARD
        if self.name_or_path and card.is_file() and not (folder / CARD).exists():
            shutil.copyfile(card, folder / CARD)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        commit_message: str = "Upload VideoInpaintPipeline",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes, with the card; return its address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            made = create_repo(repo_id, private=private, token=token, exist_ok=True)
            return upload_folder(
                repo_id=made.repo_id,
                folder_path=folder,
                commit_message=commit_message,
                token=token,
                create_pr=create_pr,
            )

    @property
    def denoiser(self) -> Denoiser:
        """The network and its process, as the sampler takes them."""
        described = {name: self.config[name] for name in ("diffusion", "latents")}
        record = parse_record(json.dumps(described))
        return Denoiser(self.unet.eval(), record.diffusion, record.latents, _precision(self.unet))

    @property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder, as the sampler takes it."""
        name = self.config["latents"]["autoencoder"]["name"]
        return Autoencoder(self.vae, name, _precision(self.vae))

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
        output_type: OutputType = "pil",
        size: tuple[int, int] | None = None,
        overlap: int | None = None,
        feather: int = FEATHER,
        colour_match: bool = True,
    ) -> VideoInpaintPipelineOutput:
        """Fill the holes of a video; outside them it stays as it is, to the bit.

        Args:
            video: PIL images, an array [frames, height, width, 3] or a tensor [frames, 3, height,
                width], of 8-bit values or of floats from 0 to 1.
            mask: White where to fill: PIL images, an array [frames, height, width] or a tensor
                [frames, 1, height, width]; or one of these without frames, for all of them. White
                is True, or the upper half of the type's range; in an array of 8-bit values that
                are all 0 or 1 it is 1.
            schedule: As in `vidfill schedule --help`; None takes the model's usual one.
            num_samples: The number of completions.
            seed: The same one gives the same completions; each frame's noise depends only on it,
                on the frame's number and on the sample's.
            generator: Draws the seed, instead of `seed`.
            output_type: pil, np or pt: see `VideoInpaintPipelineOutput`.
            size: The approximate width and height to which the surroundings of the holes are
                scaled for the network; None takes those it was trained on.
            overlap: Frames that a window takes over from the one before; None takes a quarter.
            feather: Pixels, from the hole's border inwards, over which the result blends into what
                is around.
            colour_match: Whether the result is shifted in colour by what it is off around the hole.

        Raises:
            BadInput: It names what does not fit.
        """
        if output_type not in get_args(OutputType):
            listed = ", ".join(get_args(OutputType))
            raise BadInput(f"output_type is {output_type!r}: give one of {listed}")
        if num_samples < 1:
            raise BadInput(f"num_samples is {num_samples}: give 1 or more")
        frames = read_video(video)
        masks = read_mask(mask, frames)
        denoiser = self.denoiser
        if generator is not None:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        settings = FillSettings(
            denoiser,
            self.autoencoder,
            compile_schedule(parse(schedule or self.config["schedule"]), denoiser.timesteps),
            seed=seed,
            samples=range(num_samples),
            size=size and FrameSize(*size),
            overlap=overlap,
            feather=feather,
            colour_match=colour_match,
        )
        results: list[list[np.ndarray]] = [[] for _ in range(num_samples)]
        with self.progress_bar(total=len(frames)) as bar:
            for window in fill_windows(zip(frames, masks, strict=True), settings):
                for result, filled in zip(results, window.frames, strict=True):
                    result.extend(filled)
                bar.update(len(window.masks))
        self.maybe_free_model_hooks()
        values = rearrange(torch.from_numpy(np.array(results)), "s f h w c -> s c f h w") / 255
        processor = VideoProcessor(do_normalize=False)
        return VideoInpaintPipelineOutput(processor.postprocess_video(values, output_type))


def _precision(network: torch.nn.Module) -> Precision:
    """The precision of a network's weights, in which it computes, from and to float32."""
    return cast(Precision, str(next(network.parameters()).dtype).removeprefix("torch."))


def read_video(video: Images) -> Frames:
    """A video in any of the forms that `VideoInpaintPipeline` takes, as 8-bit frames.

    Raises:
        BadInput: It is in none of them.
    """
    levels = _read_levels(video, "video", "RGB")
    if isinstance(video, Tensor) and levels.ndim == 4:
        levels = np.moveaxis(levels, 1, -1)
    if levels.ndim != 4 or levels.shape[-1] != 3 or not levels.size:
        wanted = "3, height, width" if isinstance(video, Tensor) else "height, width, 3"
        raise BadInput(
            f"video has the shape {list(np.shape(video))}: give one of [frames, {wanted}]"
        )
    return levels


def read_mask(mask: Images | Image.Image, frames: Frames) -> Masks:
    """A mask in any of the forms that `VideoInpaintPipeline` takes, as 1 in the hole, else 0.

    Raises:
        BadInput: It is in none of them, or does not fit the frames.
    """
    levels = _read_levels([mask] if isinstance(mask, Image.Image) else mask, "mask", "L")
    channels = 1 if isinstance(mask, Tensor) else 3
    if levels.ndim == 4 and levels.shape[channels] == 1:
        levels = levels.squeeze(channels)
    levels = levels[None] if levels.ndim == 2 else levels
    if levels.shape not in (frames.shape[:3], (1, *frames.shape[1:3])):
        raise BadInput(
            f"mask has the shape {list(levels.shape)}, the video's frames "
            f"{list(frames.shape[:3])} (frames, height, width): give one for each frame, or one "
            "for all, of their size"
        )
    of_numbers = isinstance(mask, np.ndarray | Tensor)
    hole = levels > 0 if of_numbers and levels.max() <= 1 else levels >= 128
    return np.broadcast_to(hole.astype(np.uint8), frames.shape[:3])


def _read_levels(images: Images, name: str, mode: str) -> UInt8[np.ndarray, "..."]:
    """Images as one array of 8-bit values."""
    if isinstance(images, Tensor):
        tensor = images.detach().cpu()
        values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    elif isinstance(images, np.ndarray):
        values = images
    elif not all(isinstance(image, Image.Image) for image in images):
        raise BadInput(f"{name} is a list of other things than PIL images: give these, or an array")
    elif len(sizes := {image.size for image in images}) != 1:
        listed = " and ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise BadInput(f"{name} has images of {listed or 'no size'}: give one or more of one size")
    else:
        values = np.stack([np.array(image.convert(mode)) for image in images])
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values * np.uint8(255)
    if not np.issubdtype(values.dtype, np.floating):
        raise BadInput(f"{name} is of {values.dtype}: give 8-bit values, or floats from 0 to 1")
    if values.size and not (values.min() >= 0 and values.max() <= 1):  # a NaN is neither
        raise BadInput(
            f"{name} has values from {values.min():g} to {values.max():g}: give floats from 0 to "
            "1, or 8-bit values"
        )
    return np.rint(values * 255).astype(np.uint8)
