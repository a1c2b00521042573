"""The first frames of a video written as all will be, and what the result lacks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from ...data import videos
from ...errors import BadInput
from ...files import fresh_partial_of, remove
from .output import CODECS, KEPT_TAGS, add_tracks, open_output, written_tags
from .pixel_formats import chroma_block, has_alpha
from .settings import Codec
from .video import Footage, open_footage, read_pictures, saying

TRIAL = 5  # frames; encoders reorder fewer
# Side data of frames that nobody sees: found again in the file, or notes of encoders.
UNSEEN = {
    *("DISPLAYMATRIX", "SEI_UNREGISTERED", "MOTION_VECTORS", "VIDEO_ENC_PARAMS", "VIDEO_HINT"),
    *("REGIONS_OF_INTEREST", "DETECTION_BBOXES", "PANSCAN"),
}


@dataclass(frozen=True)
class Qualities:
    """What a video has that its filled copy may lack."""

    bits: int
    """Of a sample."""
    chroma: tuple[int, int]
    """Rows and columns of pixels that share a chroma sample."""
    transparent: bool
    field_order: int
    """0 and 1 are progressive."""
    tags: frozenset[str]
    chapters: int
    side_data: frozenset[str]

    @classmethod
    def of(cls, footage: Footage) -> Qualities:
        """Those of a file, or of a folder of images, which has no more than its first frame."""
        frame = next(read_pictures(footage)).frame
        order, tags, chapters, declared = 0, frozenset[str](), 0, False
        if not footage.path.is_dir():
            with saying(footage.path), videos.open_video(footage.path) as (container, stream):
                order = stream.codec_context.field_order
                kept = {key: stream.metadata.get(key, "und") for key in KEPT_TAGS}
                tags = frozenset(
                    {key.lower() for key in written_tags(container.metadata)}
                    | {f"{key} of the video track" for key in kept if kept[key] != "und"}
                )
                chapters = len(container.chapters())
                # FFmpeg's own decoders leave the transparency of VP8 and VP9 out.
                declared = {k.lower(): v for k, v in stream.metadata.items()}.get(
                    "alpha_mode"
                ) == "1"
        return cls(
            bits=max(part.bits for part in frame.format.components),
            chroma=chroma_block(frame.format),
            transparent=has_alpha(frame.format) or declared,
            field_order=order if order > 1 else 0,
            tags=tags,
            chapters=chapters,
            side_data=frozenset(_name_side_data(frame)),
        )

    def lost_by(self, result: Qualities) -> Iterator[str]:
        """What `result` does not have of this, in words."""
        if result.bits < self.bits:
            yield f"{self.bits} bits a sample (it has {result.bits})"
        if result.chroma > self.chroma:
            yield "full colour resolution"
        if self.transparent and not result.transparent:
            yield "transparency (alpha)"
        if self.field_order != result.field_order:
            yield "field order (it is interlaced)"
        for tag in sorted(self.tags - result.tags):
            yield f"tag {tag}"
        if result.chapters < self.chapters:
            yield f"{self.chapters - result.chapters} chapter(s)"
        for name in sorted(self.side_data - result.side_data):
            yield name.lower().replace("_", " ")


def _name_side_data(frame: av.VideoFrame) -> Iterator[str]:
    try:
        entries: list[Any] = list(frame.side_data)
    except ValueError:  # of a kind that PyAV does not know
        return
    yield from (entry.type.name for entry in entries if entry.type.name not in UNSEEN)


def check_output(footage: Footage, out: Path, codec: Codec = "") -> list[str]:
    """Find out whether a video can be written as asked: its first frames are, beside `out`.

    Returns:
        What the file will lack, a sentence each.

    Raises:
        BadInput: `out` cannot be written there, or its container or codec cannot hold the video.
    """
    _refuse_place(footage, out, codec)
    left_out = _refuse_sound(footage, out)
    short = dataclasses.replace(footage, times=footage.times[:TRIAL])
    with _trial_place(out) as trial:
        with open_output(short, trial, codec) as write:
            for picture in read_pictures(short):
                write(picture, picture.rgb, np.zeros(picture.rgb.shape[:2], np.uint8))
        result = open_footage(trial, frame_rate=footage.rate)
        _compare_times(short, result, out)
        lost = list(Qualities.of(footage).lost_by(Qualities.of(result)))
    if not out.suffix:  # which holds pictures, as everybody knows
        lost = [said for said in lost if not said.startswith(("tag", "field"))]
    lacks = [f"{out.name} lacks the video's {said}" for said in (*left_out, *lost)]
    if out.suffix and result.pixel_aspect != footage.pixel_aspect:
        lacks.append(
            f"{out.name} does not say that a pixel is {footage.pixel_aspect} as wide as high: "
            "an .mp4 does"
        )
    return lacks


def _refuse_sound(footage: Footage, out: Path) -> list[str]:
    """The tracks that `out` will lack; one of sound is refused."""
    if not out.suffix:
        return add_tracks(None, footage)[1]
    with _trial_place(out) as trial, av.open(videos.name_file(trial), "w") as container:
        _, left_out = add_tracks(container, footage)
    if sound := [track for track in left_out if track.startswith("audio")]:
        remedy = (
            "name an .mkv, which can"
            if out.suffix.lower() != ".mkv"
            else f"convert it before, as by `ffmpeg -i {footage.path.name} -c:v copy -c:a flac "
            f"{footage.path.stem}.mkv`"
        )
        raise BadInput(f"{out} cannot hold the video's {sound[0]}: {remedy}")
    return left_out


@contextlib.contextmanager
def _trial_place(out: Path) -> Iterator[Path]:
    """A name beside `out` that no other job has; what is written there is removed again."""
    trial = fresh_partial_of(out)
    try:
        yield trial
    finally:
        remove(trial)


def _compare_times(short: Footage, result: Footage, out: Path) -> None:
    """Refuse a container that does not give the frames back at their times."""
    wanted = [_seconds_after(short, at) for at in short.times]
    found = [_seconds_after(result, at) for at in result.times]
    tolerance = Fraction(1, 500) + 1 / (2 * short.rate) * (not short.timed)
    if len(found) != len(wanted) or any(
        abs(one - other) > tolerance for one, other in zip(found, wanted, strict=True)
    ):
        raise BadInput(
            f"{out} does not give back the first {len(wanted)} frames at their times: "
            "name another container, or another --codec"
        )


def _seconds_after(footage: Footage, time: int) -> Fraction:
    return (time - footage.times[0]) * footage.time_base


def _refuse_place(footage: Footage, out: Path, codec: str) -> None:
    suffix = out.suffix.lower()
    if out.exists() and out.samefile(footage.path):
        raise BadInput(f"{out} is the video itself: name another file")
    if not suffix:
        if codec:
            raise BadInput(f"codec is {codec}, but {out} is a folder of PNG: name a file, or none")
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise BadInput(f"{out} exists and is no empty folder: name another, or a file")
        return
    if suffix not in CODECS:
        raise BadInput(
            f"{out} ends in {out.suffix}: give one of {', '.join(CODECS)}, "
            "or no ending for a folder of PNG"
        )
    if codec and codec not in CODECS[suffix]:
        raise BadInput(
            f"codec is {codec}, which {suffix} does not hold as players expect it: "
            f"give {' or '.join(CODECS[suffix])}, or another ending"
        )
    if out.is_dir():
        raise BadInput(f"{out} is a folder: name a file, or a folder without an ending")
