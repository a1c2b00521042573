"""A few clips of a split, encoded again and compared with what its shards hold."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ...modeling.autoencoder import Autoencoder, to_pixels
from ...progress import show_progress
from ...seeding import derive_seed
from .. import masks
from ..shards.format import Example, Manifest
from ..videos import Fit, Frames, FrameSize, UnreadableVideo, clips_of, read_frames, read_header
from .defects import Inspection

# Mean difference between a clip's latents and those of another device, batch or release, in the
# latents' standard deviations. Rounding to float16 makes 2e-4 of it, computing in bfloat16 2e-2
# (TAESD and the shipped autoencoder, collision clips, on a CPU); the rest is for other devices.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.1}


class Sample(NamedTuple):
    """An example to encode again."""

    number: int  # of its shard
    example: Example


def choose_samples(manifest: Manifest, count: int) -> dict[int, list[int]]:
    """Rows of `count` examples, by shard; the same for the same split and number of examples."""
    generator = np.random.default_rng(derive_seed(manifest.split, "verify"))
    chosen = generator.choice(
        manifest.examples, min(count, manifest.examples), replace=False, shuffle=False
    )
    ends = np.cumsum(manifest.shards.examples)
    rows: dict[int, list[int]] = collections.defaultdict(list)
    for place in sorted(chosen.tolist()):
        number = int(np.searchsorted(ends, place, side="right"))
        rows[number].append(place - int(ends[number]) + manifest.shards.examples[number])
    return rows


def find_frames(
    samples: Sequence[Sample], clip: dict[str, int], videos: Path | None, fit: Fit | None
) -> Iterator[tuple[Sample, Frames]]:
    """The samples whose frames are at hand, in the folder of videos or in the shards.

    `clip` is the manifest's; how the videos' frames were brought to its size may not be known.
    """
    for sample in samples:
        frames = _read_video(sample.example, clip, videos, fit) if videos else None
        frames = sample.example.pixels if frames is None else frames
        if frames is not None:
            yield sample, frames


def _read_video(
    example: Example, clip: dict[str, int], videos: Path, fit: Fit | None
) -> Frames | None:
    """An example's frames; None where its video cannot be read, or needs a fit that is unknown."""
    path, first = videos / example.record["source"], example.record["first_frame"]
    size = FrameSize(clip["width"], clip["height"])
    try:
        if fit is None:
            header = read_header(path)
            if (header.width, header.height) != (size.width, size.height):
                return None
            fit = "crop"
        with contextlib.closing(read_frames(path, size, fit, first)) as frames:
            _, found = next(clips_of(frames, clip["frames"], stride=1, clips=1), (first, None))
    except UnreadableVideo:
        return None
    return found


def encode_again(
    samples: Iterable[tuple[Sample, Frames]],
    count: int,
    autoencoder: Autoencoder,
    manifest: Manifest,
    inspection: Inspection,
) -> None:
    """Encode `count` samples or fewer, and compare them with what the shards hold."""
    tolerance = TOLERANCE.get(manifest.autoencoder.get("precision", ""), max(TOLERANCE.values()))
    with show_progress(f"compare {manifest.split}", count, "clips") as progress:
        for (number, example), frames in samples:
            inspection.checked["encoded again"] += 1
            if reason := _find_difference(example, frames, autoencoder, tolerance):
                inspection.add_damage(number, "encoded again", reason, example.key)
            progress.advance(note=example.key)


def _find_difference(
    example: Example, frames: Frames, autoencoder: Autoencoder, tolerance: float
) -> str:
    """How an example differs from its frames encoded again; "" where it does not."""
    if example.pixels is not None and not np.array_equal(frames, example.pixels):
        return "its pixels are not those of its video"
    masked = masks.fill_hole(frames, example.mask, tuple(example.record["fill"]))
    pixels = to_pixels(np.stack([frames, masked]))
    if example.log_variance is None:
        means = autoencoder.encode(pixels).cpu().numpy()
    else:
        means, log_variances = (part.cpu().numpy() for part in autoencoder.encode_moments(pixels))
        # The difference of logarithms is already relative.
        if np.abs(example.log_variance - log_variances[0]).mean() > 10 * tolerance:
            return "its log-variance is not that of its frames encoded again"
    latents, masked_latents = (
        _measure_difference(stored.astype(np.float32), again)
        for stored, again in zip((example.latents, example.masked_latents), means, strict=True)
    )
    if max(latents, masked_latents) <= tolerance:
        return ""
    return (
        f"encoded again it differs: latents by {latents:.2g}, masked_latents by "
        f"{masked_latents:.2g} standard deviations"
    )


def _measure_difference(
    stored: Float[np.ndarray, "*shape"], again: Float[np.ndarray, "*shape"]
) -> float:
    """Mean absolute difference, in standard deviations of `again`."""
    return float(np.abs(stored - again).mean() / max(float(again.std()), 1e-6))
