"""Files are made by PyAV in each test: FFmpeg's program may be missing."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image
from vidfill.errors import BadInput
from vidfill.sampling.inpaint.output import CODECS, check_output, open_output
from vidfill.sampling.inpaint.video import Footage, open_footage, read_pictures

REAL = Path(__file__).parents[4] / "shared" / "videos" / "real"
SIZE = (48, 32)  # width, height


def planes_of(frame: av.VideoFrame) -> list[np.ndarray]:
    """The samples of each plane, without what pads its rows; those of a position side by side."""
    planes = []
    for index, plane in enumerate(frame.planes):
        parts = [part for part in frame.format.components if part.plane == index]
        step = {"bgr0": 4, "bgra": 4}.get(
            frame.format.name, sum((part.bits + 7) // 8 for part in parts)
        )
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        planes.append(rows[:, : plane.width * step].reshape(plane.height, plane.width, step).copy())
    return planes


def make_noise(pixel_format: str, size: tuple[int, int], seed: int) -> av.VideoFrame:
    """Samples of any value that the format can hold."""
    random = np.random.default_rng(seed)
    frame = av.VideoFrame(*size, pixel_format)
    bits = frame.format.components[0].bits
    for plane in frame.planes:
        if bits > 8:
            samples = random.integers(0, 1 << bits, plane.buffer_size // 2, dtype=np.uint16)
        else:
            samples = random.integers(0, 256, plane.buffer_size, dtype=np.uint8)
            if pixel_format == "bgr0":
                samples[3::4] = 0
        plane.update(samples.tobytes())
    return frame


def make_video(
    path: Path,
    frames: Sequence[av.VideoFrame] | None = None,
    *,
    rate: Fraction | int = 25,
    times: Sequence[int] | None = None,
    codec: str = "ffv1",
    sound: str = "",
    rotation: int | None = None,
    colours: tuple[int, int, int, int] | None = None,
    pixel_aspect: Fraction | None = None,
) -> Path:
    """`times` are in hundredths of a second; `colours` range, matrix, primaries and curve."""
    frames = frames or [make_noise("yuv420p", SIZE, seed) for seed in range(6)]
    with av.open(str(path), "w") as container:
        time_base = Fraction(1, 100) if times else 1 / Fraction(rate)
        stream = container.add_stream(codec, rate=rate, time_base=time_base)
        stream.width, stream.height = frames[0].width, frames[0].height
        stream.pix_fmt = frames[0].format.name
        context = stream.codec_context
        if colours:
            context.color_range, context.colorspace = colours[:2]
            context.color_primaries, context.color_trc = colours[2:]
        if pixel_aspect:
            context.sample_aspect_ratio = pixel_aspect
        if rotation is not None:
            stream.set_display_rotation(rotation)
        voice = container.add_stream(sound, rate=8000) if sound else None
        for index, frame in enumerate(frames):
            frame.pts, frame.time_base = times[index] if times else index, time_base
            if colours:
                frame.color_range, frame.colorspace = colours[:2]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if voice is not None:
            last = (times[-1] if times else len(frames) - 1) * time_base + 1 / Fraction(rate)
            for samples in make_sound(round(last * 8000), voice.codec_context.format.name):
                container.mux(voice.encode(samples))
            container.mux(voice.encode())
    return path


def make_sound(length: int, sample_format: str) -> Iterator[av.AudioFrame]:
    tone = (8000 * np.sin(np.arange(length) / 5)).astype(np.int16)
    for first in range(0, length, 1024):
        part = tone[first : first + 1024]
        both = np.stack([part, part])
        planar = sample_format == "fltp"
        samples = both.astype(np.float32) / 32768 if planar else both.T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples), format=sample_format, layout="stereo"
        )
        frame.sample_rate, frame.pts, frame.time_base = 8000, first, Fraction(1, 8000)
        yield frame


def make_masks(footage: Footage) -> np.ndarray:
    """A box at odd places, that moves, upright."""
    masks = np.zeros((footage.frames, footage.height, footage.width), np.uint8)
    for index, mask in enumerate(masks):
        mask[7:20, 5 + index : 30 + index] = 1
    return masks


def fill(
    footage: Footage, out: Path, codec: str = "", masks: np.ndarray | None = None, red: int = 200
) -> Footage:
    """Write a video with its holes in one colour."""
    masks = make_masks(footage) if masks is None else masks
    with open_output(footage, out, codec) as write:
        for picture in read_pictures(footage):
            mask = masks[picture.index]
            rgb = np.where(mask[..., None] == 1, np.uint8([red, 60, 30]), picture.rgb)
            write(picture, rgb, mask)
    return open_footage(out, frame_rate=footage.rate)


def frames_of(footage: Footage) -> list[av.VideoFrame]:
    return [picture.frame for picture in read_pictures(footage)]


def format_of(footage: Footage) -> str:
    return next(read_pictures(footage)).frame.format.name


def packets_of(path: Path, kind: str) -> list[tuple[Fraction, bytes]]:
    """Time and content of each packet."""
    with av.open(str(path)) as container:
        stream = next(stream for stream in container.streams if stream.type == kind)
        return [
            (packet.pts * packet.time_base, bytes(packet))
            for packet in container.demux(stream)
            if packet.size
        ]


def times_of(footage: Footage) -> list[Fraction]:
    return [frame.pts * frame.time_base for frame in frames_of(footage)]


FORMATS = [
    "yuv420p",
    "yuv422p",
    "yuv444p",
    "yuv411p",
    "yuva420p",
    "yuv420p10le",
    "yuv422p10le",
    "yuv444p16le",
    "gray",
    "gray16le",
    "bgr0",
    "bgra",
    "gbrp10le",
    "gbrp16le",
]


@pytest.mark.parametrize("size", [SIZE, (65, 37)])
@pytest.mark.parametrize("pixel_format", FORMATS)
def test_what_lies_outside_of_the_hole_stays_bit_for_bit(
    tmp_path: Path, pixel_format: str, size: tuple[int, int]
) -> None:
    frames = [make_noise(pixel_format, size, seed) for seed in range(3)]
    source = open_footage(make_video(tmp_path / "a.mkv", frames))
    masks = make_masks(source)
    written = fill(source, tmp_path / "b.mkv", "ffv1", masks)
    assert format_of(written) == format_of(source) == pixel_format
    for mask, picture, frame in zip(masks, read_pictures(written), frames, strict=True):
        for index, (new, old) in enumerate(
            zip(planes_of(picture.frame), planes_of(frame), strict=True)
        ):
            # A pixel's position on a plane, by the definition of how chroma is shared.
            rows = np.arange(size[1]) // round(size[1] / new.shape[0])
            columns = np.arange(size[0]) // round(size[0] / new.shape[1])
            hole = np.zeros(new.shape[:2], bool)
            np.logical_or.at(hole, (rows[:, None], columns[None]), mask == 1)
            np.testing.assert_array_equal(new[~hole], old[~hole], err_msg=f"plane {index}")
            assert hole.any()
        inside = picture.rgb[8:19, 7 + picture.index : 28 + picture.index].astype(int)
        grey = np.full(3, 0.299 * 200 + 0.587 * 60 + 0.114 * 30)
        expected = grey if pixel_format.startswith("gray") else [200, 60, 30]
        # At half resolution the colour bleeds by a few pixels into what is seen as RGB.
        middle = inside[3:-3, 7:-7]
        assert np.abs(middle - expected).max() <= 4


def test_frames_without_a_hole_are_the_videos_own(tmp_path: Path) -> None:
    source = open_footage(make_video(tmp_path / "a.mkv"))
    nothing = np.zeros((6, SIZE[1], SIZE[0]), np.uint8)
    written = fill(source, tmp_path / "b.mkv", masks=nothing)
    for new, old in zip(frames_of(written), frames_of(source), strict=True):
        for one, other in zip(planes_of(new), planes_of(old), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("matrix", [Colorspace.ITU709, Colorspace.ITU601, 9, 2])
@pytest.mark.parametrize("colour_range", [ColorRange.MPEG, ColorRange.JPEG, 0])
def test_pixels_go_back_through_the_videos_own_matrix_and_range(
    tmp_path: Path, matrix: int, colour_range: int
) -> None:
    y, x = np.mgrid[:32, :48]
    pixels = np.stack([5 * x, 255 - 5 * x, 7 * y], axis=-1).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    frame.colorspace = matrix
    frame = frame.reformat(format="yuv444p", dst_color_range=colour_range)
    colours = (colour_range, matrix, 2, 2)
    source = open_footage(make_video(tmp_path / "a.mkv", [frame], colours=colours))
    (picture,) = read_pictures(source)
    assert np.abs(picture.rgb.astype(int) - pixels).max() <= 3
    with open_output(source, tmp_path / "b.mkv") as write:
        write(picture, picture.rgb, np.ones((32, 48), np.uint8))
    (written,) = frames_of(open_footage(tmp_path / "b.mkv"))
    for new, old in zip(planes_of(written), planes_of(picture.frame), strict=True):
        assert np.abs(new.astype(int) - old).max() <= 1


@pytest.mark.parametrize("suffix", CODECS)
def test_tags_of_colour_and_rotation_are_kept(tmp_path: Path, suffix: str) -> None:
    colours = (ColorRange.JPEG, Colorspace.ITU709, ColorPrimaries.SMPTE170M, ColorTrc.GAMMA22)
    path = make_video(tmp_path / "a.mp4", colours=colours, rotation=90, codec="libx264")
    source = open_footage(path)
    written = fill(source, tmp_path / f"b{suffix}")
    assert (written.height, written.width) == (source.height, source.width) == (48, 32)
    new, old = frames_of(written)[0], frames_of(source)[0]
    assert new.rotation == old.rotation == 90
    for frame in (new, old):
        tags = (frame.color_range, frame.colorspace, frame.color_primaries, frame.color_trc)
        assert tags == colours


@pytest.mark.parametrize("name", ["b.mp4", "b.mov", "b.mkv"])
def test_the_shape_of_pixels_is_kept_or_its_loss_is_said(tmp_path: Path, name: str) -> None:
    aspect = Fraction(12, 11)
    path = make_video(tmp_path / "a.mp4", codec="libx264", pixel_aspect=aspect)
    source = open_footage(path)
    assert source.pixel_aspect == aspect
    kept = fill(source, tmp_path / name).pixel_aspect == aspect
    assert kept == (name != "b.mkv")
    said = check_output(source, tmp_path / "out" / name)
    assert (said == []) if kept else ("12/11" in said[0])


def test_a_full_range_film_stays_bit_for_bit_under_its_older_name(tmp_path: Path) -> None:
    colours = (ColorRange.JPEG, Colorspace.ITU709, 2, 2)
    source = open_footage(make_video(tmp_path / "a.mp4", codec="libx264", colours=colours))
    assert format_of(source) == "yuvj420p"
    written = fill(source, tmp_path / "b.mkv", masks=np.zeros((6, 32, 48), np.uint8))
    assert format_of(written) == "yuv420p"
    for new, old in zip(read_pictures(written), read_pictures(source), strict=True):
        for one, other in zip(planes_of(new.frame), planes_of(old.frame), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(new.rgb, old.rgb)


def test_a_hole_lies_where_it_is_seen_in_a_video_that_is_turned(tmp_path: Path) -> None:
    for rotation in (0, 90, 180, 270):
        frames = [make_noise("yuv444p", SIZE, 0)]
        source = open_footage(make_video(tmp_path / f"{rotation}.mkv", frames, rotation=rotation))
        written = fill(source, tmp_path / f"{rotation}_.mkv")
        (new,), (old,) = read_pictures(written), read_pictures(source)
        changed = (new.rgb != old.rgb).any(axis=-1)
        assert changed[7:20, 5:30].mean() > 0.95
        assert changed.sum() == changed[7:20, 5:30].sum()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("sound", ["aac", "pcm_s16le", "flac"])
def test_sound_is_copied_packet_by_packet(tmp_path: Path, suffix: str, sound: str) -> None:
    container = ".mov" if sound == "pcm_s16le" else ".mp4"
    codec = "libx264"
    path = make_video(tmp_path / f"a{container}", codec=codec, sound=sound)
    written = fill(open_footage(path), tmp_path / f"b{suffix}", "ffv1")
    old, new = packets_of(path, "audio"), packets_of(written.path, "audio")
    assert [content for _, content in new] == [content for _, content in old]
    for (one, _), (other, _) in zip(new, old, strict=True):
        assert abs(one - other) <= Fraction(1, 1000)  # all that Matroska can say
    assert times_of(written) == times_of(open_footage(path))


def test_subtitles_are_copied_where_they_fit_and_else_named(tmp_path: Path) -> None:
    path = make_video(tmp_path / "film.mkv")
    with av.open(str(path)) as film, av.open(str(tmp_path / "a.mkv"), "w") as container:
        frames = container.add_stream_from_template(film.streams.video[0], opaque=True)
        text = container.add_mux_stream("subrip")
        text.metadata["language"] = "nob"
        for packet in film.demux(video=0):
            if packet.dts is not None:
                packet.stream = frames
                container.mux(packet)
        for start in (0, 100):
            line = av.Packet(f"At {start}".encode())
            line.pts = line.dts = start
            line.duration, line.time_base, line.stream = 50, Fraction(1, 1000), text
            container.mux(line)
    source = open_footage(tmp_path / "a.mkv")
    written = fill(source, tmp_path / "b.mkv")
    assert check_output(source, tmp_path / "c.mkv") == []
    said = [(Fraction(0), b"At 0"), (Fraction(1, 10), b"At 100")]
    assert packets_of(written.path, "subtitle") == packets_of(source.path, "subtitle") == said
    with av.open(str(written.path)) as container:
        assert container.streams.subtitles[0].language == "nob"
    assert check_output(source, tmp_path / "b.mp4") == ["b.mp4 lacks the video's subtitle (srt)"]


@pytest.mark.parametrize("suffix", CODECS)
def test_each_frame_is_shown_at_its_own_time(tmp_path: Path, suffix: str) -> None:
    times = [0, 4, 20, 24, 90, 91]
    source = open_footage(make_video(tmp_path / "a.mkv", times=times))
    written = fill(source, tmp_path / f"b{suffix}")
    assert times_of(written) == times_of(source) == [Fraction(time, 100) for time in times]
    assert written.variable


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(25), Fraction(12)])
def test_the_rate_and_the_times_of_an_mp4_stay_exact(tmp_path: Path, rate: Fraction) -> None:
    source = open_footage(make_video(tmp_path / "a.mp4", rate=rate, codec="libx264"))
    written = fill(source, tmp_path / "b.mp4")
    assert written.rate == source.rate == rate
    assert times_of(written) == times_of(source)
    assert written.duration == source.duration == 6 / rate


def test_a_trimmed_video_begins_at_zero_with_the_sound_of_its_part(tmp_path: Path) -> None:
    frames = [make_noise("yuv420p", SIZE, seed) for seed in range(50)]
    path = make_video(tmp_path / "a.mp4", frames, codec="libx264", sound="aac")
    part = open_footage(path, "0.4-1.2")
    masks = np.zeros((20, SIZE[1], SIZE[0]), np.uint8)
    written = fill(part, tmp_path / "b.mkv", masks=masks)
    assert times_of(written) == [Fraction(index, 25) for index in range(20)]
    for new, old in zip(read_pictures(written), read_pictures(part), strict=True):
        np.testing.assert_array_equal(new.rgb, old.rgb)
    heard = packets_of(written.path, "audio")
    kept = [packet for packet in packets_of(path, "audio") if 0.4 <= packet[0] < 1.2]
    assert [content for _, content in heard] == [content for _, content in kept]
    for (new_time, _), (old_time, _) in zip(heard, kept, strict=True):
        assert abs(new_time + Fraction(2, 5) - old_time) <= Fraction(1, 1000)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "I;16", "P"])
def test_images_become_images_with_all_their_bits(tmp_path: Path, mode: str) -> None:
    (tmp_path / "a").mkdir()
    images = []
    for index in range(3):
        random = np.random.default_rng(index)
        if mode == "I;16":
            image = Image.fromarray(random.integers(0, 65536, (32, 48), dtype=np.uint16))
        else:
            channels = {"RGB": 3, "RGBA": 4, "LA": 2}.get(mode, 1)
            noise = random.integers(0, 256, (32, 48, channels), dtype=np.uint8)
            image = Image.fromarray(noise.squeeze(), {"P": "L"}.get(mode, mode)).convert(mode)
        image.save(tmp_path / "a" / f"shot_{index + 9}.png")
        images.append(image)
    source = open_footage(tmp_path / "a")
    masks = make_masks(source)
    fill(source, tmp_path / "b", masks=masks)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "shot_10.png",
        "shot_11.png",
        "shot_9.png",
    ]
    for index, image in enumerate(images):
        written = Image.open(tmp_path / "b" / f"shot_{index + 9}.png")
        expected = image.convert("RGBA") if mode == "P" else image
        new, old = np.asarray(written.convert(expected.mode)), np.asarray(expected)
        np.testing.assert_array_equal(new[masks[index] == 0], old[masks[index] == 0])
        assert (new != old).any()
        if mode == "RGB":
            assert (new[masks[index] == 1] == [200, 60, 30]).all()
        written.close()


def test_a_video_becomes_upright_images_and_images_a_video(tmp_path: Path) -> None:
    source = open_footage(make_video(tmp_path / "a.mkv", rotation=90))
    masks = make_masks(source)
    images = fill(source, tmp_path / "b", masks=masks)
    for new, old in zip(read_pictures(images), read_pictures(source), strict=True):
        visible = masks[new.index] == 0
        np.testing.assert_array_equal(new.rgb[visible], old.rgb[visible])
    nothing = np.zeros_like(masks)
    film = fill(images, tmp_path / "c.mkv", masks=nothing)
    assert film.rate == 25
    for new, old in zip(read_pictures(film), read_pictures(images), strict=True):
        np.testing.assert_array_equal(new.rgb, old.rgb)
    played = fill(images, tmp_path / "c.mp4", masks=nothing)
    assert format_of(played) == "yuv420p"


def test_a_gif_becomes_a_video_with_its_times(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (32, 48), dtype=np.uint8)) for _ in range(4)]
    times = [100, 50, 300, 40]  # milliseconds
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=times)
    source = open_footage(tmp_path / "a.gif")
    masks = make_masks(source)
    written = fill(source, tmp_path / "b.mkv", masks=masks)
    assert times_of(written) == times_of(source)
    for new, old in zip(read_pictures(written), read_pictures(source), strict=True):
        visible = masks[new.index] == 0
        np.testing.assert_array_equal(new.rgb[visible], old.rgb[visible])


@pytest.mark.parametrize("suffix", CODECS)
def test_codecs_that_lose_something_lose_little(tmp_path: Path, suffix: str) -> None:
    y, x = np.mgrid[:64, :96]
    frames = []
    for index in range(5):
        pixels = np.stack([2 * x + index, 3 * y, 255 - 2 * x], axis=-1).astype(np.uint8)
        rgb = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frames.append(rgb.reformat(format="yuv420p", dst_color_range=ColorRange.MPEG))
    source = open_footage(make_video(tmp_path / "a.mkv", frames))
    masks = make_masks(source)
    for codec in CODECS[suffix]:
        written = fill(source, tmp_path / f"{codec}{suffix}", codec, masks)
        assert times_of(written) == times_of(source)
        for new, old in zip(read_pictures(written), read_pictures(source), strict=True):
            away = new.rgb[:, 40:].astype(int) - old.rgb[:, 40:]
            assert np.abs(away).mean() < 2


def test_writers_of_the_same_pictures_write_the_same(tmp_path: Path) -> None:
    source = open_footage(make_video(tmp_path / "a.mp4", codec="libx264", sound="aac"))
    masks = make_masks(source)
    outs = [tmp_path / "0.mp4", tmp_path / "1.mp4"]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(open_output(source, out)) for out in outs]
        for picture in read_pictures(source):
            for write in writers:
                write(picture, picture.rgb, masks[picture.index])
    one, other = (out.read_bytes() for out in outs)
    assert one == other


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    source = open_footage(make_video(tmp_path / "a.mkv"))
    for out in (tmp_path / "out" / "b.mkv", tmp_path / "out" / "b"):
        with pytest.raises(KeyboardInterrupt), open_output(source, out) as write:
            picture = next(read_pictures(source))
            write(picture, picture.rgb, np.zeros(picture.rgb.shape[:2], np.uint8))
            raise KeyboardInterrupt
        assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["b.mkv", "b.mp4", "b"])
def test_a_full_disk_is_one_line_and_no_file(tmp_path: Path, name: str) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    for index in range(4):
        image = Image.fromarray(random.integers(0, 256, (256, 256, 3), dtype=np.uint8))
        image.save(tmp_path / "a" / f"{index}.png")
    source = open_footage(tmp_path / "a")
    (tmp_path / "out").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # To the one who writes, a disk without room and a limit on a file's size are alike.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(BadInput, match=rf"^{name} could not be written: \w[^\n]+$"):
            fill(source, tmp_path / "out" / name, masks=np.zeros((4, 256, 256), np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_place_cannot_hold_is_said_before_the_work(tmp_path: Path) -> None:
    source = open_footage(make_video(tmp_path / "a.mp4", codec="libx264", sound="aac"))
    odd = [make_noise("yuv420p", (33, 17), 0)]
    odd_source = open_footage(make_video(tmp_path / "odd.mkv", odd))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "folder.mkv").mkdir()
    cases = [
        (source, tmp_path / "a.mp4", "", "the video itself"),
        (source, tmp_path / "b.xyz", "", "give one of .mkv"),
        (source, tmp_path / "b.webm", "ffv1", "does not hold"),
        (source, tmp_path / "b.webm", "", r"audio \(aac\): name an .mkv"),
        (source, tmp_path / "full", "", "no empty folder"),
        (source, tmp_path / "folder.mkv", "", "is a folder"),
        (source, tmp_path / "b", "ffv1", "folder of PNG"),
        (odd_source, tmp_path / "b.mp4", "h264", "give ffv1 and an .mkv"),
    ]
    for footage, out, codec, said in cases:
        with pytest.raises(BadInput, match=said) as caught:
            check_output(footage, out, codec)
        assert "\n" not in str(caught.value)
    assert check_output(source, tmp_path / "b.mp4") == []
    assert check_output(odd_source, tmp_path / "b.mkv") == []
    assert check_output(odd_source, tmp_path / "b.webm") == []


def test_what_is_left_out_is_listed(tmp_path: Path) -> None:
    deep = [make_noise("yuv420p10le", SIZE, 0)]
    source = open_footage(make_video(tmp_path / "a.mkv", deep, sound="aac"))
    assert check_output(source, tmp_path / "b") == ["b lacks the video's audio (aac)"]
    silent = open_footage(make_video(tmp_path / "c.mkv", deep))
    (said,) = check_output(silent, tmp_path / "b.webm")
    assert said == "b.webm has 8 bits a sample, the video 10"


MEASURE = """
import sys
from pathlib import Path
import numpy as np
from vidfill.sampling.inpaint.video import open_footage, read_masked
from vidfill.sampling.inpaint.output import open_output
footage = open_footage(Path(sys.argv[1]))
with open_output(footage, Path(sys.argv[2])) as write:
    for picture, mask in read_masked(footage, "8,8,50,40"):
        write(picture, 255 - picture.rgb, mask)
# Not what getrusage says, which counts what the process was forked from.
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    peaks = []
    for length in (100, 500):  # by 200 frames all that is kept from file to file is there
        frames = [make_noise("yuv420p", (96, 64), seed % 7) for seed in range(length)]
        path = make_video(tmp_path / f"{length}.mkv", frames, sound="aac")
        command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "out.mkv")]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True).stdout))
    assert peaks[1] < 1.05 * peaks[0]


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="no real videos here")
def test_a_real_video_stays_itself_around_the_hole(tmp_path: Path) -> None:
    source = open_footage(REAL / "nasa_13013.mp4", "-1")
    masks = make_masks(source)
    written = fill(source, tmp_path / "b.mkv", masks=masks)
    assert times_of(written) == times_of(source)
    for new, old in zip(read_pictures(written), read_pictures(source), strict=True):
        luma, other = planes_of(new.frame)[0], planes_of(old.frame)[0]
        visible = masks[new.index] == 0
        np.testing.assert_array_equal(luma[visible], other[visible])
        for index in (1, 2):
            blocks = masks[new.index].reshape(90, 2, 160, 2).max(axis=(1, 3)) == 0
            one, two = planes_of(new.frame)[index], planes_of(old.frame)[index]
            np.testing.assert_array_equal(one[blocks], two[blocks])
