"""Videos whose headers say something else than what a player shows; files are made by PyAV."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from vidfill.data.encode.sources import find_sources
from vidfill.data.videos import UnreadableVideo, read_frames, read_header
from vidfill.errors import BadInput
from vidfill.sampling.inpaint.pixel_formats import composite
from vidfill.sampling.inpaint.video import open_footage, read_pictures

SIZE = 64


def colours(frames: int) -> list[np.ndarray]:
    """Frames of one grey each, with a white corner above and to the left."""
    pictures = [np.full((SIZE, SIZE, 3), 4 * k, np.uint8) for k in range(frames)]
    for picture in pictures:
        picture[:16, :16] = 255
    return pictures


def write(
    path: Path,
    pictures: list[np.ndarray],
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    *,
    times: list[int] | None = None,
    matrix: list[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.time_base = pixel_format, Fraction(1, 25)
        if matrix:
            stream.set_display_matrix(matrix)
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = times[index] if times else index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def count_packets(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


def alternate_references(folder: Path) -> tuple[Path, int]:
    """VP8 with packets that show nothing: reference frames, of which one bit says so."""
    path = write(folder / "whole.webm", colours(20), "libvpx")
    with av.open(str(path)) as source, av.open(str(folder / "a.webm"), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                first, *rest = bytes(packet)
                copy = av.Packet(bytes([first & ~0x10 if number in (5, 12) else first, *rest]))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.stream = stream
                container.mux_one(copy)
    assert count_packets(folder / "a.webm") == 20
    return folder / "a.webm", 18


def between_key_frames(folder: Path) -> tuple[Path, int]:
    """A broadcast, entered while it was on the air."""
    whole = write(folder / "whole.ts", colours(36), "mpeg2video", options={"g": "12", "bf": "0"})
    data = whole.read_bytes()
    path = folder / "a.ts"
    packets = [data[at : at + 188] for at in range(0, len(data), 188)]
    path.write_bytes(b"".join(packets[:3] + packets[12:]))
    return path, 0


def digital_video(folder: Path) -> tuple[Path, int]:
    """Raw DV, of which FFmpeg says 60,000 frames a second."""
    wide = [np.full((576, 720, 3), 20 * k, np.uint8) for k in range(4)]
    return write(folder / "a.dv", wide, "dvvideo"), 4


def hidden_beginning(folder: Path) -> tuple[Path, int]:
    """An .mp4 whose edit list hides its first frames."""
    path = write(
        folder / "a.mp4",
        colours(20),
        times=list(range(-6, 14)),
        options={"bf": "0"},
        container_options={"avoid_negative_ts": "disabled"},
    )
    assert count_packets(path) == 20
    return path, 14


def counts_for_times(folder: Path) -> tuple[Path, int]:
    """An AVI counts frames, and with B-frames in an order that is not theirs."""
    return write(folder / "a.avi", colours(20), options={"bf": "2"}), 20


ODD = [alternate_references, between_key_frames, digital_video, hidden_beginning, counts_for_times]


@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
def test_length_times_and_rate_are_those_of_what_is_shown(
    tmp_path: Path, make: Callable[[Path], tuple[Path, int]]
) -> None:
    path, frames = make(tmp_path)
    decoded = list(read_frames(path))
    assert len(decoded) == frames or frames == 0 < len(decoded)
    assert read_header(path, exact=True).frames == len(decoded)
    footage = open_footage(path)
    assert footage.frames == footage.total == len(decoded)
    assert footage.rate == read_header(path).fps == 25
    assert (np.diff(np.asarray(footage.times)) > 0).all()
    if make is not alternate_references:  # whose hidden packets had the time of a frame
        assert footage.duration == Fraction(len(decoded), 25)
    for picture, expected in zip(read_pictures(footage), decoded, strict=True):
        np.testing.assert_array_equal(picture.rgb, expected)
        assert picture.frame.pts == footage.times[picture.index]


def test_equal_time_stamps_are_told_apart_and_frames_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nut", colours(6), "ffv1", times=[0, 1, 2, 3, 4, 5])
    packets = []
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mkv"), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts = packet.dts = min(packet.pts, round(3 / 25 / packet.time_base))
                packet.stream = stream
                packets.append(packet)
                container.mux_one(packet)
    footage = open_footage(tmp_path / "b.mkv")
    assert footage.frames == len(packets) == 6
    assert (np.diff(np.asarray(footage.times)) > 0).all()
    shown = [picture.frame.pts for picture in read_pictures(footage)]
    assert shown == footage.times.tolist()


UNIT = 1 << 16
MATRICES = [
    [a * UNIT, b * UNIT, 0, c * UNIT, d * UNIT, 0, 0, 0, 1 << 30]
    for a, b, c, d in (
        *((x, 0, 0, y) for x in (1, -1) for y in (1, -1)),
        *((0, x, y, 0) for x in (1, -1) for y in (1, -1)),
    )
]


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_display_matrix_turns_and_mirrors_frames_and_holes(
    tmp_path: Path, matrix: list[int]
) -> None:
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[:16, :32] = 255
    path = write(tmp_path / "a.mov", [stored] * 2, "png", "rgb24", matrix=matrix)
    a, b, c, d = (matrix[k] // UNIT for k in (0, 1, 3, 4))
    shown = np.zeros((64, 48, 3) if a == 0 else stored.shape, np.uint8)
    height, width = shown.shape[:2]
    for y, x in np.argwhere(stored[..., 0]):
        shown[(b * x + d * y) % height, (a * x + c * y) % width] = 255
    # A step back from 0 is the last row; a mirrored image begins there.
    shown = np.roll(shown, (-1 * (b + d < 0), -1 * (a + c < 0)), axis=(0, 1))
    footage = open_footage(path)
    picture = next(read_pictures(footage))
    np.testing.assert_array_equal(picture.rgb, np.roll(shown, (0, 0), axis=(0, 1)))
    mask = (shown[..., 0] == 255).astype(np.uint8)
    grey = np.full_like(picture.rgb, 128)
    filled = composite(picture.frame, grey, mask, "rgb24", footage.orientation).to_ndarray()
    np.testing.assert_array_equal(filled, np.where(stored == 255, 128, stored))


def images(folder: Path, modes: list[str]) -> list[np.ndarray]:
    """Images of these modes; what they show, as RGB."""
    folder.mkdir()
    shown = []
    for number, mode in enumerate(modes):
        rgb = np.zeros((16, 16, 3), np.uint8)
        rgb[4:, :] = (40 * number, 200, 10) if mode in ("RGB", "RGBA", "P") else 40 * number
        image = Image.fromarray(rgb)
        if mode == "I;16":
            image = Image.fromarray(rgb[..., 0].astype(np.uint16) << 8)
        elif mode == "P":
            image = image.quantize(4)
        else:
            image = image.convert(mode)
        image.save(folder / f"{number}.png")
        shown.append(rgb)
    return shown


@pytest.mark.parametrize(
    "modes",
    [
        ["L", "RGB", "RGB"],
        ["RGB", "L", "RGBA"],
        ["P", "RGB", "L"],
        ["L", "I;16", "RGB"],
        ["LA", "RGB"],
        ["RGBA", "RGB"],
        ["I;16", "I;16"],
    ],
)
def test_images_of_several_kinds_keep_their_colours(tmp_path: Path, modes: list[str]) -> None:
    shown = images(tmp_path / "a", modes)
    for frame, expected in zip(read_frames(tmp_path / "a"), shown, strict=True):
        np.testing.assert_array_equal(frame, expected)
    footage = open_footage(tmp_path / "a")
    for picture, expected in zip(read_pictures(footage), shown, strict=True):
        np.testing.assert_array_equal(picture.rgb, expected)
        np.testing.assert_array_equal(picture.frame.to_ndarray(format="rgb24"), expected)
    assert len({picture.frame.format.name for picture in read_pictures(footage)}) == 1


def photographs(folder: Path, exif: Image.Exif) -> None:
    folder.mkdir()
    picture = colours(1)[0]
    for number in range(3):
        Image.fromarray(picture[:, :32]).save(folder / f"{number}.jpg", exif=exif, quality=95)


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_photographs_are_frames_upright(tmp_path: Path, orientation: int | None) -> None:
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    if orientation:
        exif[0x0112] = orientation
    photographs(tmp_path / "a", exif)
    footage = open_footage(tmp_path / "a")
    size = (SIZE, 32) if (orientation or 1) < 5 else (32, SIZE)
    assert (footage.height, footage.width) == size
    frames = list(read_frames(tmp_path / "a"))
    for picture, frame in zip(read_pictures(footage), frames, strict=True):
        np.testing.assert_array_equal(picture.rgb, frame)
        stored = footage.orientation.show(picture.frame.to_ndarray(format="rgb24"))
        assert np.abs(stored.astype(int) - frame).mean() < 3  # a JPEG's colours, by two readers


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
def test_half_an_image_is_damage_to_all_readers(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    for number in range(3):
        Image.fromarray(noise).save(tmp_path / f"{number}{suffix}")
    half = tmp_path / f"1{suffix}"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    with pytest.raises(UnreadableVideo, match=f"1{suffix} is no whole image"):
        list(read_frames(tmp_path))
    with pytest.raises(BadInput, match=f"1{suffix} is no whole image"):
        open_footage(tmp_path)


NAMES = ["12:30.mp4", "a?b.mp4", "%03d.mp4", "concat:x.mp4", "-a.mp4", "http:__b.mp4", " .mp4"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_never_a_url_a_pattern_or_an_option(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.mp4", colours(3)).rename(tmp_path / name)
    assert read_header(Path(path.name)).frames == open_footage(Path(path.name)).frames == 3
    os.mkdir("images")
    Image.fromarray(colours(1)[0]).save(tmp_path / "images" / "a%03d.png")
    assert open_footage(tmp_path / "images").frames == 1


@pytest.mark.parametrize(
    "playlist",
    ["ffconcat version 1.0\nfile 'b.mp4'\n", "#EXTM3U\n#EXTINF:1,\nb.mp4\n#EXT-X-ENDLIST\n"],
)
def test_a_playlist_in_a_videos_place_leads_nowhere(tmp_path: Path, playlist: str) -> None:
    write(tmp_path / "b.mp4", colours(3))
    (tmp_path / "a.mp4").write_text(playlist)
    with pytest.raises(UnreadableVideo):
        list(read_frames(tmp_path / "a.mp4"))


def test_what_is_no_file_is_no_video(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(UnreadableVideo, match="no file"):
        read_header(tmp_path / "a.mp4")


def links(folder: Path) -> Iterator[Path]:
    """Links that lead to what is there anyway, one after the other."""
    for place, target in [
        ("latest", "."),
        ("sub/up", ".."),
        ("again", "sub"),
        ("same.mp4", "a.mp4"),
        ("above", ".."),
        ("far again", "../elsewhere"),
    ]:
        (folder / place).symlink_to(target)
        yield folder / place


def test_a_link_back_makes_no_further_video(tmp_path: Path) -> None:
    top = tmp_path / "videos"
    (top / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("videos/a.mp4", "videos/sub/b.mp4", "elsewhere/c.mp4"):
        (tmp_path / name).touch()
    (top / "far").symlink_to(tmp_path / "elsewhere")
    expected = ["a.mp4", "far/c.mp4", "sub/b.mp4"]
    assert [source.label for source in find_sources(top)] == expected
    for link in links(top):
        labels = [source.label for source in find_sources(top)]
        assert labels == expected, link
