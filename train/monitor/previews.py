"""Held-out clips as the current model fills them, as a picture and as a film."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from ...data.shards.format import Example
from ...data.shards.reading import ShardedDataset, has_split
from ...data.videos import Frames
from ...errors import say
from ...files import hide_secrets
from ...modeling.autoencoder import Autoencoder, load_trained_autoencoder
from ...modeling.denoiser import Denoiser
from ...sampling.examples import check_shards, inpaint, pixels_of
from ...sampling.schedules.language import parse
from ...sampling.schedules.program import compile_schedule
from ...sampling.sweep.baselines import fill
from ..config import TrainConfig
from .held_out import TRAINED

COLUMNS = 8  # frames of a clip in a picture
PREVIEW_GAP = 4  # pixels between clips, and between the three versions of a frame
SECONDS = 0.125  # per frame of a film

FilmStrips = UInt8[np.ndarray, "rows columns 3"]


@dataclass(frozen=True)
class PreviewClips:
    """What a preview needs: some held-out clips, their autoencoder, a schedule.

    One process draws while the others wait in their next step, so a preview has to be short: few
    clips and a fast schedule, well within the run's `timeout`.
    """

    examples: Sequence[Example]
    autoencoder: Autoencoder
    schedule: str
    seed: int

    def draw(self, denoiser: Denoiser) -> list[Frames]:
        """Each clip as a film of its masked, filled and true frames, beside one another."""
        filled = inpaint(
            denoiser,
            self.autoencoder,
            self.examples,
            self.schedule,
            seed=self.seed,
            capacity=len(self.examples),
        )
        results = {example.key: frames for example, frames in filled}
        return [_join([fill(e), results[e.key], pixels_of(e)], axis=2) for e in self.examples]


def open_preview(
    config: TrainConfig, denoiser: Denoiser, device: torch.device
) -> PreviewClips | None:
    """Load what previews need; None, with a line on stderr, if the shards have nothing to show.

    Raises:
        BadInput: The schedule or the autoencoder cannot be used.
    """
    wanted = config.preview
    if not wanted.every or not wanted.clips:
        return None
    compile_schedule(parse(wanted.schedule), denoiser.timesteps)
    place = hide_secrets(config.shards)
    if not has_split(config.shards, "validation"):
        say(f"{place} has no validation split: no previews")
        return None
    validation = ShardedDataset(config.shards, "validation", config.data.cache)
    check_shards(validation, f"{place}/validation", denoiser, TRAINED)
    examples = [validation[index] for index in range(min(wanted.clips, len(validation)))]
    validation.store.close()
    if any(example.pixels is None for example in examples):
        say(f"{place}/validation keeps no pixels: no previews")
        return None
    autoencoder = load_trained_autoencoder(
        *(denoiser.autoencoder, wanted.autoencoder, device, denoiser.precision),
        option="--preview.autoencoder",
    )
    return PreviewClips(examples, autoencoder, wanted.schedule, config.seed)


def picture_of(clips: Sequence[Frames]) -> FilmStrips:
    """Film strips of clips from `PreviewClips.draw`, the three versions below each other."""
    return _join([_join(_strips(clip), axis=0) for clip in clips], axis=0)


def _strips(clip: Frames) -> list[np.ndarray]:
    chosen = np.linspace(0, len(clip) - 1, min(COLUMNS, len(clip))).round().astype(int)
    width = (clip.shape[2] - 2 * PREVIEW_GAP) // 3
    versions = [clip[chosen, :, n * (width + PREVIEW_GAP) :][:, :, :width] for n in range(3)]
    return [np.concatenate(list(version), axis=1) for version in versions]


def png_of(picture: FilmStrips) -> bytes:
    """A picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def film_of(clips: Sequence[Frames]) -> bytes:
    """Clips of equal shape, under each other, as an animated GIF that repeats forever."""
    frames = [Image.fromarray(frame) for frame in _join(clips, axis=1)]
    file = io.BytesIO()
    frames[0].save(
        file, "GIF", save_all=True, append_images=frames[1:], duration=1000 * SECONDS, loop=0
    )
    return file.getvalue()


def _join(arrays: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Side by side along `axis`, white in between."""
    shape = list(arrays[0].shape)
    shape[axis] = PREVIEW_GAP
    gap = np.full(shape, 255, np.uint8)
    parts = [part for array in arrays for part in (gap, array)]
    return np.concatenate(parts[1:], axis=axis)
