from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image
from vidfill.errors import BadInput
from vidfill.sampling.inpaint.output import CODECS, open_output
from vidfill.sampling.inpaint.trial import check_output
from vidfill.sampling.inpaint.video import Footage, open_footage, read_pictures

REAL = Path(__file__).parents[4] / "shared" / "videos" / "real"
SIZE = (48, 32)  # width, height


def frames_of(footage: Footage) -> list[av.VideoFrame]:
    return [picture.frame for picture in read_pictures(footage)]


def packets_of(path: Path, kind: str) -> list[tuple[Fraction, bytes]]:
    """Time and content of each packet."""
    with av.open(str(path)) as container:
        stream = next(stream for stream in container.streams if stream.type == kind)
        return [
            (packet.pts * packet.time_base, bytes(packet))
            for packet in container.demux(stream)
            if packet.size
        ]


@pytest.mark.parametrize("suffix", CODECS)
def test_tags_of_colour_and_rotation_are_kept(
    tmp_path: Path, suffix: str, make_video: Callable[..., Path], fill: Callable[..., Footage]
) -> None:
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
def test_the_shape_of_pixels_is_kept_or_its_loss_is_said(
    tmp_path: Path, name: str, make_video: Callable[..., Path], fill: Callable[..., Footage]
) -> None:
    aspect = Fraction(12, 11)
    path = make_video(tmp_path / "a.mp4", codec="libx264", pixel_aspect=aspect)
    source = open_footage(path)
    assert source.pixel_aspect == aspect
    kept = fill(source, tmp_path / name).pixel_aspect == aspect
    assert kept == (name != "b.mkv")
    said = check_output(source, tmp_path / "out" / name)
    assert (said == []) if kept else ("12/11" in said[0])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("sound", ["aac", "pcm_s16le", "flac"])
def test_sound_is_copied_packet_by_packet(
    tmp_path: Path,
    suffix: str,
    sound: str,
    make_video: Callable[..., Path],
    fill: Callable[..., Footage],
    times_of: Callable[[Footage], list[Fraction]],
) -> None:
    container = ".mov" if sound == "pcm_s16le" else ".mp4"
    codec = "libx264"
    path = make_video(tmp_path / f"a{container}", codec=codec, sound=sound)
    written = fill(open_footage(path), tmp_path / f"b{suffix}", "ffv1")
    old, new = packets_of(path, "audio"), packets_of(written.path, "audio")
    assert [content for _, content in new] == [content for _, content in old]
    for (one, _), (other, _) in zip(new, old, strict=True):
        assert abs(one - other) <= Fraction(1, 1000)  # all that Matroska can say
    assert times_of(written) == times_of(open_footage(path))


def test_subtitles_are_copied_where_they_fit_and_else_named(
    tmp_path: Path, make_video: Callable[..., Path], fill: Callable[..., Footage]
) -> None:
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
def test_each_frame_is_shown_at_its_own_time(
    tmp_path: Path,
    suffix: str,
    make_video: Callable[..., Path],
    fill: Callable[..., Footage],
    times_of: Callable[[Footage], list[Fraction]],
) -> None:
    times = [0, 4, 20, 24, 90, 91]
    source = open_footage(make_video(tmp_path / "a.mkv", times=times))
    written = fill(source, tmp_path / f"b{suffix}")
    assert times_of(written) == times_of(source) == [Fraction(time, 100) for time in times]
    assert written.variable


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(25), Fraction(12)])
def test_the_rate_and_the_times_of_an_mp4_stay_exact(
    tmp_path: Path,
    rate: Fraction,
    make_video: Callable[..., Path],
    fill: Callable[..., Footage],
    times_of: Callable[[Footage], list[Fraction]],
) -> None:
    source = open_footage(make_video(tmp_path / "a.mp4", rate=rate, codec="libx264"))
    written = fill(source, tmp_path / "b.mp4")
    assert written.rate == source.rate == rate
    assert times_of(written) == times_of(source)
    assert written.duration == source.duration == 6 / rate


def test_a_trimmed_video_begins_at_zero_with_the_sound_of_its_part(
    tmp_path: Path,
    make_noise: Callable[..., av.VideoFrame],
    make_video: Callable[..., Path],
    fill: Callable[..., Footage],
    times_of: Callable[[Footage], list[Fraction]],
) -> None:
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


def test_a_gif_becomes_a_video_with_its_times(
    tmp_path: Path,
    make_masks: Callable[[Footage], np.ndarray],
    fill: Callable[..., Footage],
    times_of: Callable[[Footage], list[Fraction]],
) -> None:
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
def test_codecs_that_lose_something_lose_little(
    tmp_path: Path,
    suffix: str,
    make_video: Callable[..., Path],
    make_masks: Callable[[Footage], np.ndarray],
    fill: Callable[..., Footage],
    times_of: Callable[[Footage], list[Fraction]],
) -> None:
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


def test_writers_of_the_same_pictures_write_the_same(
    tmp_path: Path, make_video: Callable[..., Path], make_masks: Callable[[Footage], np.ndarray]
) -> None:
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


def test_an_interrupted_writer_leaves_nothing(
    tmp_path: Path, make_video: Callable[..., Path]
) -> None:
    source = open_footage(make_video(tmp_path / "a.mkv"))
    for out in (tmp_path / "out" / "b.mkv", tmp_path / "out" / "b"):
        with pytest.raises(KeyboardInterrupt), open_output(source, out) as write:
            picture = next(read_pictures(source))
            write(picture, picture.rgb, np.zeros(picture.rgb.shape[:2], np.uint8))
            raise KeyboardInterrupt
        assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["b.mkv", "b.mp4", "b"])
def test_a_full_disk_is_one_line_and_no_file(
    tmp_path: Path, name: str, fill: Callable[..., Footage]
) -> None:
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


def test_what_a_place_cannot_hold_is_said_before_the_work(
    tmp_path: Path, make_noise: Callable[..., av.VideoFrame], make_video: Callable[..., Path]
) -> None:
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


def test_what_is_left_out_is_listed(
    tmp_path: Path, make_noise: Callable[..., av.VideoFrame], make_video: Callable[..., Path]
) -> None:
    deep = [make_noise("yuv420p10le", SIZE, 0)]
    source = open_footage(make_video(tmp_path / "a.mkv", deep, sound="aac"))
    assert check_output(source, tmp_path / "b") == ["b lacks the video's audio (aac)"]
    silent = open_footage(make_video(tmp_path / "c.mkv", deep))
    (said,) = check_output(silent, tmp_path / "b.webm")
    assert said == "b.webm lacks the video's 10 bits a sample (it has 8)"


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
def test_memory_does_not_grow_with_the_length(
    tmp_path: Path, make_noise: Callable[..., av.VideoFrame], make_video: Callable[..., Path]
) -> None:
    peaks = []
    for length in (100, 500):  # by 200 frames all that is kept from file to file is there
        frames = [make_noise("yuv420p", (96, 64), seed % 7) for seed in range(length)]
        path = make_video(tmp_path / f"{length}.mkv", frames, sound="aac")
        command = [sys.executable, "-c", MEASURE, str(path), f"{path}.out.mkv"]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True).stdout))
    assert peaks[1] < 1.05 * peaks[0]
