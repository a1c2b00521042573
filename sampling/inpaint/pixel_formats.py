"""Filled pixels put into a frame in its own pixel format; every other sample stays as it is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import av
import numpy as np
from av.codec import find_best_pix_fmt_of_list
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from jaxtyping import UInt8

from ...data.videos import UPRIGHT, Mask, Orientation, Pixels

# Chroma is averaged over all the pixels that share it, and no sample is rounded twice.
CAREFULLY = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP


def choose_format(formats: Iterable[str], source: str, *, even: bool) -> str:
    """The pixel format that loses least of frames in the format `source`.

    Of the `formats` that an encoder takes. A video encoder, one without packed RGB, gets RGB frames
    in what players expect: 4:2:0, or 4:4:4 unless width and height are even.
    """
    # "yuvj" is an old way to say that the range is full, which a frame says by itself.
    known = {name: av.VideoFormat(name) for name in formats if not name.startswith("yuvj")}
    taken = [name for name, kind in known.items() if not (kind.has_palette or kind.is_bit_stream)]
    own = av.VideoFormat(source)
    for_video = not {"bgr0", "rgb24"} & set(taken)
    if for_video and (_is_rgb(own) or (_is_grey(own) and "gray" not in taken)):
        return "yuv420p" if even else "yuv444p"
    best, _ = find_best_pix_fmt_of_list(taken, source.replace("yuvj", "yuv"), has_alpha=True)
    assert best is not None, "an encoder without formats"
    return best.name


def common_format(formats: Collection[str]) -> str:
    """The pixel format of RGB that frames in all of these are brought to; "" where all are alike.

    With as many bits as the deepest, 8 or 16, and with transparency if one has it.
    """
    if len(formats) < 2:
        return ""
    kinds = [av.VideoFormat(name) for name in formats]
    alpha = any(has_alpha(kind) or kind.has_palette for kind in kinds)
    deep = max(part.bits for kind in kinds for part in kind.components) > 8
    return ("rgba64le" if deep else "rgba") if alpha else ("rgb48le" if deep else "rgb24")


def chroma_block(pixel_format: av.VideoFormat) -> tuple[int, int]:
    """Rows and columns of pixels that share a chroma sample."""
    return 256 // pixel_format.chroma_height(256), 256 // pixel_format.chroma_width(256)


def _is_rgb(pixel_format: av.VideoFormat) -> bool:
    return pixel_format.is_rgb or pixel_format.has_palette


def _is_grey(pixel_format: av.VideoFormat) -> bool:
    return len(pixel_format.components) <= 2 and not _is_rgb(pixel_format)


def convert(frame: av.VideoFrame, pixel_format: str) -> av.VideoFrame:
    """A frame in another pixel format; bit for bit the same if depth and chroma are."""
    target = av.VideoFormat(pixel_format)
    colours: dict[str, int]
    if _is_rgb(frame.format) and not (_is_rgb(target) or _is_grey(target)):
        colours = {"dst_colorspace": Colorspace.SMPTE170M, "dst_color_range": ColorRange.MPEG}
    elif _is_rgb(target) and not _is_rgb(frame.format):
        colours = {"dst_color_range": ColorRange.JPEG}
    else:
        colours = {"dst_color_range": frame.color_range}
    return frame.reformat(format=pixel_format, interpolation=CAREFULLY, threads=1, **colours)


def composite(
    frame: av.VideoFrame,
    rgb: Pixels,
    mask: Mask,
    pixel_format: str,
    orientation: Orientation = UPRIGHT,
) -> av.VideoFrame:
    """A copy of `frame` in `pixel_format`, with the hole from `rgb`.

    A luma or RGB sample is taken from `rgb` where `mask` is 1, a chroma sample where `mask` is 1
    in any of the pixels that share it; all others, and all of transparency, are the frame's. `rgb`
    has full range and is
    upright, as is the mask; the frame is as it is stored, and `orientation` makes it upright.
    """
    kept = convert(frame, pixel_format)
    stored_mask = orientation.store(mask)
    if mask.any():
        pixels = np.ascontiguousarray(orientation.store(rgb))
        filled = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        filled.colorspace = kept.colorspace
        filled = filled.reformat(
            format=pixel_format,
            dst_color_range=kept.color_range,
            interpolation=CAREFULLY,
            threads=1,
        )
    else:
        filled = av.VideoFrame(kept.width, kept.height, pixel_format)
    for index, (target, source) in enumerate(zip(_planes(filled), _planes(kept), strict=True)):
        visible = _on_grid(stored_mask, filled, target.shape[:2]) == 0
        np.copyto(target, source, where=visible[..., None])
        samples = _alpha_bytes(filled.format, index)
        target[..., samples] = source[..., samples]
    filled.pts, filled.time_base, filled.duration = frame.pts, frame.time_base, frame.duration
    filled.colorspace, filled.color_range = kept.colorspace, kept.color_range
    filled.color_primaries, filled.color_trc = kept.color_primaries, kept.color_trc
    return filled


def _planes(frame: av.VideoFrame) -> Iterator[UInt8[np.ndarray, "rows columns bytes"]]:
    """The samples of each plane: views, with those of one position side by side."""
    components = frame.format.components
    for index, plane in enumerate(frame.planes):
        if len(frame.planes) == 1:
            step = frame.format.padded_bits_per_pixel // 8
        else:
            step = sum((part.bits + 7) // 8 for part in components if part.plane == index)
        samples: Any = plane  # a buffer, though its type does not say so
        rows = np.frombuffer(samples, np.uint8).reshape(plane.height, abs(plane.line_size))
        if plane.line_size < 0:  # as in old AVI files: the last row comes first
            rows = rows[::-1]
        yield rows[:, : plane.width * step].reshape(plane.height, plane.width, step)


def _alpha_bytes(pixel_format: av.VideoFormat, plane: int) -> slice:
    """Which bytes of each position of a plane are its transparency."""
    alpha = [part for part in pixel_format.components if part.is_alpha and part.plane == plane]
    if not alpha:
        return slice(0)
    if all(part.is_alpha or part.plane != plane for part in pixel_format.components):
        return slice(None)
    size = (alpha[0].bits + 7) // 8
    return slice(size) if pixel_format.name.startswith("a") else slice(-size, None)


def has_alpha(pixel_format: av.VideoFormat) -> bool:
    """Whether pixels may be transparent."""
    return any(part.is_alpha for part in pixel_format.components)


def _on_grid(
    mask: Mask, frame: av.VideoFrame, shape: tuple[int, int]
) -> UInt8[np.ndarray, "{shape[0]} {shape[1]}"]:
    """A mask on a plane's grid: 1 for each sample that a pixel of the hole shares."""
    if shape == mask.shape:
        return mask
    rows, columns = chroma_block(frame.format)
    padded = np.zeros((shape[0] * rows, shape[1] * columns), np.uint8)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return padded.reshape(shape[0], rows, shape[1], columns).max(axis=(1, 3))
