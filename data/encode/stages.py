"""What a clip goes through: decoded, masked, encoded, each stage ahead of the next."""

from __future__ import annotations

import collections
import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar, cast

import numpy as np
import torch
import xxhash
from jaxtyping import Float16, Int, UInt8
from torch import Tensor

from ...errors import BadInput
from ...modeling.autoencoder import to_pixels
from .. import masks
from ..shards.format import Example
from ..videos import UnreadableVideo
from .clips import Clip, read_clips
from .plan import Piece
from .settings import Encoding

AHEAD = 2  # clips that each stage may be ahead of the next
STAGES = ("decode", "masks", "autoencoder", "write")

Item = TypeVar("Item")


class Decoded(NamedTuple):
    """A clip of a piece."""

    piece: Piece
    clip: Clip


class View(NamedTuple):
    """One mask of a clip."""

    key: str
    family: str
    mask: UInt8[np.ndarray, "frames height width"]
    colour: masks.Colour


class Masked(NamedTuple):
    """A clip under all of its masks."""

    piece: Piece
    clip: Clip
    views: list[View]
    frames: list[UInt8[np.ndarray, "height width 3"]]  # of the clip and its views, without repeats
    rows: Int[np.ndarray, "views frames"]  # where each frame is in `frames`; row 0 is the clip's


class Ended(NamedTuple):
    """A piece was read to its end, or could not be."""

    piece: Piece
    reason: str = ""  # why its clips are worth nothing
    frames: Sequence[np.ndarray] = ()  # to encode: none


class Result(NamedTuple):
    """What is known of a clip, or of a piece's end, once the autoencoder has passed it."""

    event: Masked | Ended
    latents: list[Float16[np.ndarray, "moments channels h w"]]  # of `event.frames`: the mean, and


class _Watch:
    """Seconds in which each stage was busy."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def busy(self, stage: str, sign: int = 1) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += sign * (time.perf_counter() - began)

    def drawing(self, stage: str, items: Iterable[Item], sign: int = 1) -> Iterator[Item]:
        """`items`; the time that it takes to make them is the stage's, or is none of its."""
        iterator, end = iter(items), object()
        while True:
            with self.busy(stage, sign):
                item = next(iterator, end)
            if item is end:
                return
            yield cast(Item, item)


def _ahead(items: Iterable[Item]) -> Iterator[Item]:
    """`items`, made by a thread of their own, a few ahead of those that were taken."""
    iterator, end = iter(items), object()
    thread = ThreadPoolExecutor(1)
    try:
        made = collections.deque(thread.submit(next, iterator, end) for _ in range(AHEAD))
        while (item := made.popleft().result()) is not end:
            made.append(thread.submit(next, iterator, end))
            yield cast(Item, item)
    finally:
        thread.shutdown(cancel_futures=True)


def _decode(pieces: Iterable[Piece], how: Encoding) -> Iterator[Decoded | Ended]:
    for piece in pieces:
        reason = how.plan.surveyed[piece.source.label].reason
        if not reason:
            try:
                yield from (Decoded(piece, clip) for clip in _read_clips(piece, how))
            except UnreadableVideo as error:
                reason = str(error)
        yield Ended(piece, reason)


def _read_clips(piece: Piece, how: Encoding) -> Iterator[Clip]:
    config, settings = how.config, how.settings
    own = masks.OWN in settings.mix(piece.source.split).weights
    for clip in read_clips(piece, config.frames, settings.stride, settings.size, config.fit, own):
        if settings.colour is None and clip.mask is not None and clip.mask.all():
            raise UnreadableVideo(
                f"its own masks hide all of the clip at frame {clip.first}, which leaves no colour "
                "to fill it with"
            )
        yield clip


def _mask(
    decoded: Iterable[Decoded | Ended], how: Encoding, watch: _Watch
) -> Iterator[Masked | Ended]:
    for event in decoded:
        if isinstance(event, Ended):
            yield event
        else:
            with watch.busy("masks"):
                masked = _mask_clip(event.piece, event.clip, how)
            yield masked


def _mask_clip(piece: Piece, clip: Clip, how: Encoding) -> Masked:
    """The clip under all of its masks; frames that are equal are kept, and encoded, once."""
    seed = how.config.seed
    name = f"{piece.source.name}_{clip.first:05}"
    mix = how.settings.mix(piece.source.split)
    views = []
    count: collections.Counter[str] = collections.Counter()
    for family in mix.choose(how.config.masks_per_clip, (seed, name)):
        count[family] += 1
        key = f"{name}_{family}" + (f"-{count[family]}" if count[family] > 1 else "")
        mask = clip.mask
        if mask is None or family != masks.OWN:
            mask = masks.draw_mask(family, len(clip.frames), how.height, how.width, (seed, key))
        colour = how.settings.colour or masks.visible_median(clip.frames, mask)
        views.append(View(key, family, mask, colour))
    hidden = [masks.fill_hole(clip.frames, view.mask, view.colour) for view in views]
    frames, rows = _without_repeats([clip.frames, *hidden])
    return Masked(piece, clip, views, frames, rows)


def _without_repeats(
    videos: Sequence[UInt8[np.ndarray, "frames height width 3"]],
) -> tuple[list[UInt8[np.ndarray, "height width 3"]], Int[np.ndarray, "videos frames"]]:
    """The frames of all videos, equal ones once, and where each video's frames are among them."""
    frames: list[np.ndarray] = []
    found: dict[bytes, int] = {}
    rows = []
    for frame in itertools.chain(*videos):
        row = found.setdefault(
            xxhash.xxh3_128_digest(np.ascontiguousarray(frame).data), len(frames)
        )
        if row == len(frames):
            frames.append(frame)
        rows.append(row)
    return frames, np.array(rows).reshape(len(videos), -1)


def _encode(masked: Iterable[Masked | Ended], how: Encoding, watch: _Watch) -> Iterator[Result]:
    """Encode frames in batches that are full but for a shard's last, whatever clips they are of."""
    waiting: collections.deque[Masked | Ended] = collections.deque()
    frames: list[np.ndarray] = []  # of what waits, not yet encoded
    latents: list[np.ndarray] = []  # of what waits, frame by frame
    for event in itertools.chain(masked, [None]):
        if event is not None:
            waiting.append(event)
            frames.extend(event.frames)
        while len(frames) >= how.config.batch_size or (event is None and frames):
            with watch.busy("autoencoder"):
                latents.extend(_encode_frames(np.stack(frames[: how.config.batch_size]), how))
            del frames[: how.config.batch_size]
        while waiting and len(waiting[0].frames) <= len(latents):
            first = waiting.popleft()
            yield Result(first, latents[: len(first.frames)])
            del latents[: len(first.frames)]


def _encode_frames(
    frames: UInt8[np.ndarray, "frames height width 3"], how: Encoding
) -> Float16[np.ndarray, "frames moments channels h w"]:
    pixels = to_pixels(frames[None])
    # Without TF32, so that a GPU's latents are float32's.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        if how.config.posterior == "mean":
            moments: Sequence[Tensor] = [how.autoencoder.encode(pixels, len(frames))]
        else:
            moments = how.autoencoder.encode_moments(pixels, len(frames))
    return torch.stack([values[0] for values in moments], dim=1).half().cpu().numpy()


def _make_examples(
    masked: Masked,
    latents: Float16[np.ndarray, "frames moments channels h w"],
    how: Encoding,
) -> list[Example]:
    piece, clip, views, _, rows = masked
    if not np.isfinite(latents).all():
        raise BadInput(
            f"{piece.source.label}, frame {clip.first}: {how.autoencoder.name} gives latents that "
            "float16 cannot hold: give another --autoencoder"
        )
    split, label = piece.source.split, piece.source.label
    header = how.plan.surveyed[label].header
    assert header is not None  # what has none is not read
    own = latents[rows[0]]
    return [
        Example(
            key=view.key,
            latents=own[:, 0],
            masked_latents=latents[row, 0],
            mask=view.mask,
            record={
                "source": label,
                "split": split,
                "first_frame": clip.first,
                "fps": float(header.fps),
                "family": view.family,
                "seed": how.config.seed,
                "fill": list(view.colour),
            },
            pixels=clip.frames if how.keeps_pixels(split) else None,
            log_variance=own[:, 1] if how.config.posterior == "moments" else None,
        )
        for view, row in zip(views, rows[1:], strict=True)
    ]
