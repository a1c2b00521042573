from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vidfill.data import videos
from vidfill.data.videos import FrameSize, Header, UnreadableVideo
from vidfill.errors import BadInput

REAL = Path(__file__).parents[3] / "shared" / "videos" / "real"


def make_frames(count: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([4 * x, 6 * y, np.full_like(x, 90)], axis=-1)
    return np.stack([ramp + 2 * i for i in range(count)]).astype(np.uint8)


def write_with(
    path: Path,
    frames: Sequence[np.ndarray],
    codec: str = "ffv1",
    pix_fmt: str = "bgr0",
    times: Sequence[int] | None = None,
    rotation: int | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A video of another kind than `write_video` makes; FFV1 in bgr0 loses nothing."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for time, pixels in zip(times or range(len(frames)), frames, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_images(folder: Path, frames: Sequence[np.ndarray], name: str = "{:05}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(frames):
        Image.fromarray(pixels).save(folder / name.format(index))
    return folder


def read_all(path: Path, *args: object) -> np.ndarray:
    return np.stack(list(videos.read_frames(path, *args)))


def test_written_video_reads_back_nearly_the_same(tmp_path: Path) -> None:
    frames = make_frames()
    videos.write_video(tmp_path / "a.mp4", frames, Fraction(25, 2))
    again, fps = videos.read_video(tmp_path / "a.mp4")
    assert again.shape == frames.shape
    assert fps == Fraction(25, 2)
    assert np.abs(again.astype(int) - frames).mean() < 3


def test_same_frames_give_the_same_file(tmp_path: Path) -> None:
    written = set()
    for _ in range(12):  # x264's default differs about once in three
        videos.write_video(tmp_path / "a.mp4", make_frames(), 12.5)
        written.add((tmp_path / "a.mp4").read_bytes())
    assert len(written) == 1


def test_odd_size_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="even"):
        videos.write_video(tmp_path / "a.mp4", make_frames(height=31), 25.0)
    assert not list(tmp_path.iterdir())


# What kinds of video there are.


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mkv", "ffv1", "bgr0"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.mpg", "mpeg1video", "yuv420p"),
        ("a.mov", "libx264", "yuv420p"),
    ],
)
def test_header_says_what_decoding_finds_even_where_the_container_does_not(
    tmp_path: Path, name: str, codec: str, pix_fmt: str
) -> None:
    frames = make_frames(23)
    path = write_with(tmp_path / name, frames, codec, pix_fmt)
    assert videos.read_header(path) == Header(23, 32, 48, Fraction(25))
    decoded = read_all(path)
    assert decoded.shape == frames.shape
    if codec == "ffv1":
        np.testing.assert_array_equal(decoded, frames)


def test_frames_at_uneven_times_are_each_read_once(tmp_path: Path) -> None:
    frames = make_frames(5)
    path = write_with(tmp_path / "a.mkv", frames, times=[0, 1, 5, 6, 20])
    np.testing.assert_array_equal(read_all(path), frames)
    header = videos.read_header(path)
    assert header.frames == 5
    assert header.fps > 0


@pytest.mark.parametrize("rotation", [0, 90, -90, 180])
@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"), [("a.mkv", "ffv1", "bgr0"), ("a.mp4", "libx264", "yuv420p")]
)
def test_a_phones_video_stands_upright_as_opencv_shows_it(
    tmp_path: Path, rotation: int, name: str, codec: str, pix_fmt: str
) -> None:
    path = write_with(tmp_path / name, make_frames(3), codec, pix_fmt, rotation=rotation)
    capture = cv2.VideoCapture(str(path))
    _, bgr = capture.read()
    capture.release()
    read = read_all(path)
    header = videos.read_header(path)
    assert (header.height, header.width) == read.shape[1:3] == bgr.shape[:2]
    assert np.abs(read[0].astype(int) - bgr[:, :, ::-1]).mean() < 4


def test_a_folder_of_images_is_a_video(tmp_path: Path) -> None:
    frames = make_frames(12)
    folder = write_images(tmp_path / "a", frames, "frame {}.png")  # 10 comes after 9, not after 1
    (folder / "notes.txt").touch()
    (folder / ".hidden.png").touch()
    assert videos.read_header(folder, 12.5) == Header(12, 32, 48, Fraction(25, 2))
    np.testing.assert_array_equal(read_all(folder), frames)


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "webp"])
def test_images_with_loss_are_nearly_the_same_and_in_rgb(tmp_path: Path, suffix: str) -> None:
    frames = make_frames(2)
    folder = write_images(tmp_path, frames, "{}." + suffix)
    assert np.abs(read_all(folder).astype(int) - frames).mean() < 8


def test_images_of_other_kinds_become_rgb_and_upright(tmp_path: Path) -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    lies = Image.fromarray(grey)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see it"
    lies.save(tmp_path / "0.png", exif=exif)
    assert videos.read_header(tmp_path)[:3] == (1, 3, 2)
    upright = np.rot90(grey, -1)
    np.testing.assert_array_equal(read_all(tmp_path)[0], np.stack([upright] * 3, axis=-1))


# What is wrong with them.


def test_a_file_that_is_no_video_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    for read in (videos.read_video, videos.read_header):
        with pytest.raises(UnreadableVideo, match="Invalid data"):
            read(tmp_path / "a.mp4")
        with pytest.raises(UnreadableVideo, match="No such file"):
            read(tmp_path / "absent.mp4")


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(UnreadableVideo, match="no video stream"):
        videos.read_header(tmp_path / "a.mkv")


def noisy_frames(count: int) -> np.ndarray:
    noise = np.random.default_rng(0).integers(64, 192, (64, 96, 3), dtype=np.uint8)
    return np.stack([np.roll(noise, 2 * index, axis=1) for index in range(count)])


def test_a_truncated_file_gives_its_first_frames_and_then_says_so(tmp_path: Path) -> None:
    # The index comes first, as in a file made for the web, so that the header is whole.
    path = write_with(
        tmp_path / "a.mp4",
        noisy_frames(60),
        "libx264",
        "yuv420p",
        options={"movflags": "faststart"},
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    assert videos.read_header(path).frames == 60
    read = []
    with pytest.raises(UnreadableVideo, match="Invalid data"):
        for frame in videos.read_frames(path):
            read.append(frame)
    assert 0 < len(read) < 60


@pytest.mark.parametrize(
    ("name", "codec", "reason"),
    [
        ("a.mp4", "libx264", "Invalid data"),
        ("b.mp4", "mpeg4", "damaged at about frame"),
        ("a.mpg", "mpeg1video", "damaged at about frame"),
    ],
)
def test_a_file_that_is_damaged_inside_says_so(
    tmp_path: Path, name: str, codec: str, reason: str
) -> None:
    path = write_with(tmp_path / name, noisy_frames(60), codec, "yuv420p")
    content = path.read_bytes()
    fifth = len(content) // 5
    path.write_bytes(content[: -2 * fifth] + bytes(fifth) + content[-fifth:])
    with pytest.raises(UnreadableVideo, match=reason):
        read_all(path)


def test_frames_that_change_their_size_are_refused(tmp_path: Path) -> None:
    parts = [
        write_with(tmp_path / f"{height}.mpg", make_frames(height=height), "mpeg1video", "yuv420p")
        for height in (32, 48)
    ]
    path = tmp_path / "both.mpg"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(UnreadableVideo, match="change their size"):
        read_all(path)
    write_images(tmp_path / "folder", [make_frames()[0], make_frames(height=30)[0]])
    with pytest.raises(UnreadableVideo, match="change their size"):
        read_all(tmp_path / "folder")


def test_folders_that_are_no_whole_video_say_so(tmp_path: Path) -> None:
    with pytest.raises(UnreadableVideo, match="no image"):
        videos.read_header(tmp_path)
    write_images(tmp_path, make_frames(2))
    content = (tmp_path / "00001.png").read_bytes()
    (tmp_path / "00001.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableVideo, match=r"00001\.png is no whole image"):
        read_all(tmp_path)
    (tmp_path / "00001.png").write_bytes(b"text")
    with pytest.raises(UnreadableVideo, match=r"00001\.png is no whole image"):
        read_all(tmp_path)
    (tmp_path / "00000.jpg").touch()
    with pytest.raises(UnreadableVideo, match=r"both 00000\.jpg and 00000\.png"):
        videos.read_header(tmp_path)


# Their size.


def test_size_is_parsed_as_it_is_written() -> None:
    assert FrameSize.parse("") is None
    assert FrameSize.parse("128") == FrameSize(128, 128)
    assert FrameSize.parse("432x240") == FrameSize(width=432, height=240)
    assert str(FrameSize(432, 240)) == "432x240"
    for wrong in ("0", "128x", "x128", "a", "128X64", "-1", "1.5", "128x0", "１２８"):
        with pytest.raises(BadInput, match="size is"):
            FrameSize.parse(wrong)


def test_crop_takes_the_middle_and_resize_all(tmp_path: Path) -> None:
    path = write_with(tmp_path / "a.mkv", make_frames(height=32, width=64))
    whole = read_all(path)
    np.testing.assert_array_equal(read_all(path, FrameSize(32, 32)), whole[:, :, 16:48])
    np.testing.assert_array_equal(read_all(path, FrameSize(64, 16)), whole[:, 8:24])
    for fit, part in (("crop", whole[0, :, 16:48]), ("resize", whole[0])):
        small = read_all(path, FrameSize(16, 16), fit)[0]
        blocks = part.reshape(16, 2, 16, -1, 3).mean(axis=(1, 3))
        np.testing.assert_allclose(small, blocks, atol=0.51)


@settings(deadline=None, max_examples=20)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.builds(FrameSize, st.integers(1, 40), st.integers(1, 40)),
    fit=st.sampled_from(["crop", "resize"]),
)
def test_a_frame_of_one_colour_keeps_it_in_every_size(
    height: int, width: int, size: FrameSize, fit: videos.Fit
) -> None:
    frame = np.full((height, width, 3), (10, 200, 77), np.uint8)
    fitted = videos.fit_frame(frame, size, fit)
    assert fitted.shape == (size.height, size.width, 3)
    assert (fitted == (10, 200, 77)).all()
    mask = videos.fit_mask(np.ones((height, width), np.uint8), size, fit)
    assert mask.shape == (size.height, size.width)
    assert mask.all()


@settings(deadline=None, max_examples=20)
@given(
    size=st.builds(FrameSize, st.integers(8, 90), st.integers(8, 90)),
    fit=st.sampled_from(["crop", "resize"]),
)
def test_a_mask_stays_where_its_frame_is(size: FrameSize, fit: videos.Fit) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[10:40, 12:50] = 1
    frame = np.stack([mask * 255] * 3, axis=-1)
    shown = videos.fit_frame(frame, size, fit)[:, :, 0] > 127
    hole = videos.fit_mask(mask, size, fit)
    np.testing.assert_array_equal(videos.fit_mask(mask * 200, size, fit), hole * 200)
    # They differ by less than a pixel along the edges.
    assert (shown != hole).sum() <= 2 * (size.width + size.height)


# Clips, and what is in memory.


def test_clips_are_whole_and_follow_the_stride() -> None:
    assert list(videos.cut_clips(47, 20, 20)) == [0, 20]
    assert list(videos.cut_clips(40, 20, 10)) == [0, 10, 20]
    assert list(videos.cut_clips(19, 20, 20)) == []


@settings(deadline=None, max_examples=20)
@given(
    count=st.integers(0, 60),
    length=st.integers(1, 12),
    stride=st.integers(1, 20),
    most=st.none() | st.integers(1, 5),
)
def test_streamed_clips_are_slices_of_the_whole(
    count: int, length: int, stride: int, most: int | None
) -> None:
    whole = np.arange(count * 4, dtype=np.uint8).reshape(count, 2, 2)
    expected = list(videos.cut_clips(count, length, stride))[:most]
    clips = list(videos.clips_of(iter(whole), length, stride, most))
    assert [first for first, _ in clips] == expected
    for first, clip in clips:
        np.testing.assert_array_equal(clip, whole[first : first + length])


class Frame(np.ndarray):
    """An array that can be watched."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def test_no_more_than_a_clip_and_a_frame_is_alive_while_clips_are_made() -> None:
    alive: weakref.WeakSet[Frame] = weakref.WeakSet()

    def produce() -> Iterator[np.ndarray]:
        for index in range(200):
            frame = np.full((2, 2, 3), index, np.uint8).view(Frame)
            alive.add(frame)
            assert len(alive) <= 10 + 1
            yield frame

    for stride in (1, 10, 25):
        assert len(list(videos.clips_of(produce(), 10, stride))) > 7


def test_nothing_after_the_last_clip_is_asked_for() -> None:
    frames = iter(np.zeros((30, 2, 2, 3), np.uint8))
    assert len(list(videos.clips_of(frames, 5, 10, clips=2))) == 2
    assert len(list(frames)) == 15


def test_frames_of_a_long_video_do_not_pile_up(tmp_path: Path) -> None:
    path = write_with(tmp_path / "a.avi", noisy_frames(300).repeat(4, 1), "mpeg4", "yuv420p")
    frame_bytes = 256 * 96 * 3
    peaks = []
    for index, _ in enumerate(videos.read_frames(path)):
        if index in (20, 299):
            peaks.append(resident_bytes())
    assert peaks[1] - peaks[0] < 60 * frame_bytes  # of 279 read meanwhile


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_reading_from_a_later_frame_gives_the_same_frames(tmp_path: Path) -> None:
    frames = make_frames(9)
    path = write_with(tmp_path / "a.mp4", frames, "libx264", "yuv420p")
    np.testing.assert_array_equal(read_all(path, None, "crop", 4), read_all(path)[4:])
    folder = write_images(tmp_path / "a", frames)
    np.testing.assert_array_equal(read_all(folder, None, "crop", 4), frames[4:])
    assert not list(videos.read_frames(path, first=9))


@pytest.mark.skipif(not REAL.is_dir(), reason="no real videos in ../shared")
@pytest.mark.parametrize(
    ("name", "header"),
    [("nasa_13013.mp4", (325, 180, 320)), ("carphone_pristine.mp4", (120, 144, 176))],
)
def test_real_videos_are_read_whole(name: str, header: tuple[int, int, int]) -> None:
    assert videos.read_header(REAL / name)[:3] == header
    size = FrameSize(64, 64)
    assert sum(1 for _ in videos.read_frames(REAL / name, size)) == header[0]
