"""What a range of clips goes through: decoded, masked, encoded, each in a thread of its own."""

from __future__ import annotations

import collections
import contextlib
import itertools
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar, cast

import numpy as np
import torch
import xxhash
from jaxtyping import Float16, Int
from torch import Tensor

from ...errors import BadInput
from ...modeling.autoencoder import Autoencoder, to_pixels
from ..masks import OWN, Colour, draw_mask, fill_hole, visible_median
from ..shards.format import Example
from ..videos import (
    Fit,
    Frames,
    FrameSize,
    Header,
    Masks,
    Pixels,
    UnreadableVideo,
    clips_of,
    read_frames,
)
from .plan import ClipRange, SurveyedVideo
from .settings import EncodeConfig
from .sources import Source

AHEAD = 2  # clips that each stage may be ahead of the next
STAGES = ("decode", "masks", "autoencoder", "write")

Item = TypeVar("Item")


class Clip(NamedTuple):
    """Consecutive frames of a video."""

    source: Source
    first: int  # the number of its first frame in the video
    frames: Frames
    mask: Masks | None  # its own, where that was asked for


class ClipMask(NamedTuple):
    """One mask of a clip, and the colour of its hole."""

    key: str
    family: str
    mask: Masks
    colour: Colour


class MaskedClip(NamedTuple):
    """A clip under all of its masks."""

    clip: Clip
    masks: list[ClipMask]
    frames: list[Pixels]  # of the clip and of all masked clips, equal ones once
    rows: Int[np.ndarray, "videos frames"]  # where each frame is in `frames`; row 0 is the clip's


class EncodedClip(NamedTuple):
    """A clip under all of its masks, with the latents of its `frames`."""

    masked: MaskedClip
    latents: Float16[np.ndarray, "frames moments channels h w"]


class RangeEnd(NamedTuple):
    """A range of clips was read to its end, or could not be."""

    part: ClipRange
    reason: str = ""  # why its clips are worth nothing


class StageClock:
    """Seconds in which each stage was busy; each stage is a thread."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began

    def run_ahead(self, items: Iterable[Item], made_by: str, taken_by: str) -> Iterator[Item]:
        """`items`, made by a thread of their own, a few ahead of those that were taken.

        The time that it takes to make them is `made_by`'s, and that of waiting is not `taken_by`'s.
        """
        iterator, end = iter(items), object()

        def make() -> Item | object:
            with self.busy(made_by):
                return next(iterator, end)

        thread = ThreadPoolExecutor(1)
        try:
            made = collections.deque(thread.submit(make) for _ in range(AHEAD))
            while True:
                began = time.perf_counter()
                item = made.popleft().result()
                self.seconds[taken_by] -= time.perf_counter() - began
                if item is end:
                    return
                made.append(thread.submit(make))
                yield cast(Item, item)
        finally:
            thread.shutdown(cancel_futures=True)


def decode_clips(
    parts: Iterable[ClipRange], videos: Mapping[str, SurveyedVideo], config: EncodeConfig
) -> Iterator[Clip | RangeEnd]:
    """The clips of each range, then its end, with the reason if the video cannot be used."""
    size, needs_visible = config.frame_size, config.fill_colour is None
    for part in parts:
        own = OWN in config.mix(part.source.split).weights
        reason = videos[part.source.label].reason
        try:
            header = videos[part.source.label].header if own else None
            clips = read_clips(part, config.frames, config.clip_stride, size, config.fit, header)
            for clip in () if reason else clips:
                if needs_visible and clip.mask is not None and clip.mask.all():
                    raise UnreadableVideo(
                        f"its own masks hide all of the clip at frame {clip.first}, which leaves "
                        "no colour to fill it with"
                    )
                yield clip
        except UnreadableVideo as error:
            reason = str(error)
        yield RangeEnd(part, reason)


def read_clips(
    part: ClipRange,
    length: int,
    stride: int,
    size: FrameSize | None = None,
    fit: Fit = "crop",
    own_masks: Header | None = None,
) -> Generator[Clip, None, None]:
    """A range of a video's clips, in memory one at a time; nothing after the last is decoded.

    What comes before the range is decoded and dropped, so that its frames are those that reading
    the video from its start gives, to the bit.

    Frames get `size` as `videos.read_frames` gives it, and the video's own masks get it alike; they
    are read where `own_masks` is the video's header, counted exactly.

    Raises:
        UnreadableVideo: the video, or its own masks, cannot be read, are damaged, or end before
            the range does. This may come after some of the clips.
    """
    source, start = part.source, part.first_clip * stride
    with contextlib.ExitStack() as opened:
        frames = opened.enter_context(
            contextlib.closing(read_frames(source.path, size, fit, start))
        )
        mask_clips: Iterator[tuple[int, Masks]] = iter(())
        if own_masks:
            masks = source.own_masks(own_masks).read(size, fit, start)
            opened.enter_context(contextlib.closing(masks))
            mask_clips = clips_of(masks, length, stride, part.clips)
        made = 0
        for first, pixels in clips_of(frames, length, stride, part.clips):
            _, mask = next(mask_clips, (first, None))
            if own_masks and mask is None:
                raise UnreadableVideo(f"its masks end before frame {start + first + length}")
            yield Clip(source, start + first, pixels, mask)
            made += 1
    # Of a video's last range the length is what its header says, which may be too much.
    if made < (part.clips or (part.first_clip == 0)):
        raise UnreadableVideo(f"it ends before frame {start + made * stride + length}")


def mask_clip(clip: Clip, config: EncodeConfig) -> MaskedClip:
    """A clip under all of its masks."""
    name = f"{clip.source.name}_{clip.first:05}"
    masks: list[ClipMask] = []
    count: collections.Counter[str] = collections.Counter()
    families = config.mix(clip.source.split).choose(config.masks_per_clip, (config.seed, name))
    for family in families:
        count[family] += 1
        key = f"{name}_{family}" + (f"-{count[family]}" if count[family] > 1 else "")
        drawn = clip.mask
        if drawn is None or family != OWN:
            frames, height, width, _ = clip.frames.shape
            drawn = draw_mask(family, frames, height, width, (config.seed, key))
        colour = config.fill_colour or visible_median(clip.frames, drawn)
        masks.append(ClipMask(key, family, drawn, colour))
    filled = [fill_hole(clip.frames, mask.mask, mask.colour) for mask in masks]
    return MaskedClip(clip, masks, *_without_repeats([clip.frames, *filled]))


def _without_repeats(
    videos: Sequence[Frames],
) -> tuple[list[Pixels], Int[np.ndarray, "videos frames"]]:
    """The frames of all videos, equal ones once, and where each video's frames are among them."""
    frames: list[Pixels] = []
    rows: list[int] = []
    found: dict[bytes, int] = {}
    for frame in itertools.chain(*videos):
        digest = xxhash.xxh3_128_digest(np.ascontiguousarray(frame).data)
        rows.append(found.setdefault(digest, len(frames)))
        if rows[-1] == len(frames):
            frames.append(frame)
    return frames, np.array(rows).reshape(len(videos), -1)


def encode_clips(
    masked: Iterable[MaskedClip | RangeEnd],
    autoencoder: Autoencoder,
    posterior: str,
    batch_size: int,
) -> Iterator[EncodedClip | RangeEnd]:
    """Encode frames in batches that are full but for the last, whatever clips they are of."""
    waiting: collections.deque[MaskedClip | RangeEnd] = collections.deque()
    frames: list[Pixels] = []  # of what waits, not yet encoded
    latents: list[np.ndarray] = []  # of what waits, frame by frame
    for event in itertools.chain(masked, [None]):
        if event is not None:
            waiting.append(event)
            frames += event.frames if isinstance(event, MaskedClip) else []
        while len(frames) >= batch_size or (event is None and frames):
            latents += [*encode_frames(np.stack(frames[:batch_size]), autoencoder, posterior)]
            del frames[:batch_size]
        while waiting:
            first = waiting[0]
            if isinstance(first, RangeEnd):
                yield first
            elif len(first.frames) <= len(latents):
                yield EncodedClip(first, np.stack(latents[: len(first.frames)]))
                del latents[: len(first.frames)]
            else:
                break
            waiting.popleft()


def encode_frames(
    frames: Frames, autoencoder: Autoencoder, posterior: str
) -> Float16[np.ndarray, "frames moments channels h w"]:
    """The mean of each frame's latents and, if `posterior` is "moments", their log-variance."""
    pixels = to_pixels(frames[None])
    # Without TF32, so that a GPU's latents are float32's.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        if posterior == "mean":
            moments: Sequence[Tensor] = [autoencoder.encode(pixels, len(frames))]
        else:
            moments = autoencoder.encode_moments(pixels, len(frames))
    return torch.stack([values[0] for values in moments], dim=1).half().cpu().numpy()


def make_examples(
    encoded: EncodedClip, fps: float, autoencoder: Autoencoder, config: EncodeConfig
) -> list[Example]:
    """A clip's examples, one for each of its masks.

    Raises:
        BadInput: the latents are not finite in float16.
    """
    (clip, masks, _, rows), latents = encoded
    source = clip.source
    if not np.isfinite(latents).all():
        raise BadInput(
            f"{source.label}, frame {clip.first}: {autoencoder.name} gives latents that "
            "float16 cannot hold: give another --autoencoder"
        )
    moments = latents[rows[0]]
    return [
        Example(
            key=mask.key,
            latents=moments[:, 0],
            masked_latents=latents[row, 0],
            mask=mask.mask,
            record={
                "source": source.label,
                "split": source.split,
                "first_frame": clip.first,
                "fps": fps,
                "family": mask.family,
                "seed": config.seed,
                "fill": list(mask.colour),
            },
            pixels=clip.frames if config.keeps_pixels(source.split) else None,
            log_variance=moments[:, 1] if config.posterior == "moments" else None,
        )
        for mask, row in zip(masks, rows[1:], strict=True)
    ]
