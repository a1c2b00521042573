"""A filled video written to a file: frames are encoded, what goes with them is copied."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.context import Flags

from ...data import videos
from ...data.videos import Mask, Pixels
from ...errors import BadInput
from ...files import aside
from .pixel_formats import choose_format, chroma_block, composite, convert
from .settings import Codec
from .video import Footage, Picture, read_pictures, saying

WriteFrame = Callable[[Picture, Pixels, Mask], None]

# Each with FFmpeg's name and options. x264's macroblock tree would make the bytes of small frames
# vary from run to run; x265 would write to the terminal, and with B-frames gives short videos
# decoding times that it never set.
ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    "ffv1": ("ffv1", {"level": "3", "slicecrc": "1"}),
    "h264": ("libx264", {"crf": "16", "mbtree": "0"}),
    "h265": ("libx265", {"crf": "18", "x265-params": "log-level=error:bframes=0"}),
    "vp9": ("libvpx-vp9", {"crf": "24", "row-mt": "1"}),
}
# What players expect in each container; the first is the usual one.
CODECS: dict[str, tuple[str, ...]] = {
    ".mkv": ("ffv1", "h264", "h265", "vp9"),
    ".mp4": ("h264", "h265", "vp9", "ffv1"),
    ".mov": ("h264", "h265"),
    ".webm": ("vp9",),
}
KEPT_TAGS = ("language", "title")
PRIMING = 0.3  # seconds that decoders of sound may need before what an edit list shows
# What a file says of how it was made, by FFmpeg's names; the rest is what somebody wrote into it.
OWN_TAGS = (
    "major_brand",
    "minor_version",
    "compatible_brands",
    "encoder",
    "duration",
    "creation_time",
)


@contextlib.contextmanager
def open_output(footage: Footage, out: Path, codec: Codec = "") -> Iterator[WriteFrame]:
    """The file, or the folder of PNGs, that a filled video becomes: whole, or not at all.

    Gives a function that writes the next frame: the RGB pixels where the mask is 1, and the frame's
    own samples elsewhere, bit for bit with ffv1. Time stamps, colour tags, proportions of pixels
    and rotation are the input's; its sound and its subtitles are copied. `check_output` finds out
    whether all of this is possible.

    Raises:
        BadInput: The disk is full, or the encoder refuses.
    """
    with contextlib.ExitStack() as stack:
        with _naming(out):
            partial = stack.enter_context(aside(out, new=True))
            if out.suffix:
                name = codec or CODECS[out.suffix.lower()][0]
                opened = _open_file(footage, partial, name)
            else:
                opened = _open_folder(footage, partial)
            write = stack.enter_context(opened)
        yield _naming(out)(write)
        with _naming(out):
            stack.close()


@contextlib.contextmanager
def _naming(out: Path) -> Iterator[None]:
    """Name the output that cannot be written, in a BadInput."""
    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        reason = error.strerror or error
        raise BadInput(f"{out.name} could not be written: {reason}") from error


@contextlib.contextmanager
def _open_file(footage: Footage, path: Path, codec: str) -> Iterator[WriteFrame]:
    # Sound that begins before 0, as AAC does, would delay the frames in Matroska.
    container = av.open(
        videos.name_file(path), "w", container_options={"avoid_negative_ts": "disabled"}
    )
    try:
        stream = _add_video(container, footage, codec)
        added, _ = add_tracks(container, footage)
        container.start_encoding()  # the file is there from now on
        packets = _read_packets(footage, added)
        waiting = next(packets, None)

        def copy_until(end: Fraction | float) -> None:
            """Copy the sound and subtitles that begin before `end`, in the input's seconds."""
            nonlocal waiting
            while waiting and waiting[0] < end:
                container.mux(waiting[1])
                waiting = next(packets, None)

        def write(picture: Picture, rgb: Pixels, mask: Mask) -> None:
            shown = picture.frame.pts
            assert shown is not None and stream.pix_fmt
            copy_until(shown * footage.time_base)
            frame = composite(picture.frame, rgb, mask, stream.pix_fmt, footage.orientation)
            frame.pts = shown - (footage.times[0] if footage.before else 0)
            container.mux(stream.encode(frame))

        yield write
        container.mux(stream.encode())
        copy_until(footage.end)
        container.close()
    except BaseException:
        # It writes what it still holds, which fails again if a write has failed.
        with contextlib.suppress(av.error.FFmpegError):
            container.close()
        raise


def _add_video(
    container: av.container.OutputContainer, footage: Footage, codec: str
) -> av.VideoStream:
    """Add a stream for the frames of a video, with their tags."""
    name, options = ENCODERS[codec]
    first = next(read_pictures(footage)).frame
    even = first.width % 2 == 0 and first.height % 2 == 0
    formats = [known.name for known in av.Codec(name, "w").video_formats or ()]
    stored = convert(first, choose_format(formats, first.format.name, even=even))
    rows, columns = chroma_block(stored.format)
    if codec in ("h264", "h265") and (stored.height % rows or stored.width % columns):
        raise BadInput(
            f"codec is {codec}, which does not take frames of {stored.width}x{stored.height} in "
            f"{stored.format.name}: give ffv1 and an .mkv, which take any"
        )
    stream = container.add_stream(
        name, rate=footage.rate, options=options, time_base=footage.time_base
    )
    assert isinstance(stream, av.VideoStream)
    stream.width, stream.height, stream.pix_fmt = stored.width, stored.height, stored.format.name
    context = stream.codec_context
    context.flags |= Flags.frame_duration
    context.colorspace, context.color_range = stored.colorspace, stored.color_range
    context.color_primaries, context.color_trc = stored.color_primaries, stored.color_trc
    if footage.pixel_aspect != 1:
        context.sample_aspect_ratio = footage.pixel_aspect
    turned = videos.display_matrix(first)
    if turned is not None:
        stream.set_display_matrix(turned.tolist())
    return stream


def add_tracks(
    container: av.container.OutputContainer | None, footage: Footage
) -> tuple[dict[int, av.stream.Stream], list[str]]:
    """Add streams for the sound and the subtitles of a video.

    Returns:
        The streams, by the index of the input's, and what does not fit into the container; nothing
        fits into None, which stands for a folder.
    """
    added: dict[int, av.stream.Stream] = {}
    left_out: list[str] = []
    if footage.path.is_dir():
        return added, left_out
    copied = ("audio", "subtitle", "attachment")
    with saying(footage.path), videos.open_video(footage.path) as (source, video):
        if container is not None:
            container.metadata.update(written_tags(source.metadata))
            container.set_chapters(_cut_chapters(source.chapters(), footage))
            for own in container.streams.video:
                own.metadata.update(_kept_tags(video))
                own.codec_context.field_order = video.codec_context.field_order
        for stream in source.streams:
            if stream.index == video.index:
                continue
            try:
                if container is None or stream.type not in copied:
                    raise ValueError
                copy = container.add_stream_from_template(stream)
            except ValueError:
                left_out.append(f"{stream.type} ({stream.name or 'of an unknown kind'})")
                continue
            copy.disposition = stream.disposition
            copy.metadata.update(_kept_tags(stream))
            if stream.type != "attachment":  # those are in the file's header
                added[stream.index] = copy
    return added, left_out


def _kept_tags(stream: av.stream.Stream) -> dict[str, str]:
    return {key: value for key, value in stream.metadata.items() if key in KEPT_TAGS}


def written_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """What somebody wrote of a video, as its title, without what programs note."""
    return {key: value for key, value in tags.items() if key.lower() not in OWN_TAGS}


def _cut_chapters(chapters: Iterable[Any], footage: Footage) -> list[Any]:
    """The chapters of a part of a video, by its own clock."""
    kept = []
    for chapter in chapters:
        unit = Fraction(chapter["time_base"] or 1)
        begin, last = footage.start / unit, footage.end / unit
        start, end = max(chapter["start"], begin), min(chapter["end"], last)
        if start < end:
            kept.append({**chapter, "start": round(start - begin), "end": round(end - begin)})
    return kept


def _read_packets(
    footage: Footage, added: dict[int, av.stream.Stream]
) -> Iterator[tuple[Fraction, av.Packet]]:
    """The packets of the copied streams, each with the time at which it begins."""
    if not added:
        return
    with saying(footage.path), videos.open_video(footage.path) as (source, video):
        if footage.before:
            videos.enter(source, video, footage.times[0])
        for packet in source.demux([source.streams[index] for index in added]):
            if packet.dts is None:
                continue
            begins = (packet.dts if packet.pts is None else packet.pts) * packet.time_base
            if packet.is_discard and begins < -PRIMING:
                continue
            if footage.before and begins < footage.start:
                continue
            shift = round(footage.start / packet.time_base)
            packet.dts -= shift
            if packet.pts is not None:
                packet.pts -= shift
            packet.stream = added[packet.stream_index]
            yield begins, packet


@contextlib.contextmanager
def _open_folder(footage: Footage, folder: Path) -> Iterator[WriteFrame]:
    folder.mkdir()
    formats = [known.name for known in av.Codec("png", "w").video_formats or ()]
    images = videos.list_frames(footage.path)[footage.before :] if footage.path.is_dir() else None

    def write(picture: Picture, rgb: Pixels, mask: Mask) -> None:
        if footage.orientation != videos.UPRIGHT:  # no PNG records it
            upright = np.where(mask[..., None] == 1, rgb, picture.rgb)
            frame = av.VideoFrame.from_ndarray(upright, format="rgb24")
        else:
            kind = choose_format(formats, picture.frame.format.name, even=True)
            frame = composite(picture.frame, rgb, mask, kind)
        name = images[picture.index].stem if images else f"{picture.index:06}"
        encoder = av.CodecContext.create("png", "w")
        encoder.width, encoder.height = frame.width, frame.height
        encoder.pix_fmt, encoder.time_base = frame.format.name, Fraction(1, 1)
        packets = (*encoder.encode(frame), *encoder.encode())
        (folder / f"{name}.png").write_bytes(b"".join(bytes(packet) for packet in packets))

    yield write
