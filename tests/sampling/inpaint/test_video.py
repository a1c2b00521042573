"""Files are made by PyAV in each test: FFmpeg's program may be missing."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from vidfill.errors import BadInput
from vidfill.sampling.inpaint.video import (
    Footage,
    check_masks,
    open_footage,
    read_masked,
    read_masks,
    read_pictures,
)

REAL = Path(__file__).parents[4] / "shared" / "videos" / "real"


def make_video(
    path: Path,
    frames: int = 6,
    *,
    size: tuple[int, int] = (48, 32),
    codec: str = "ffv1",
    pixel_format: str = "yuv420p",
    rate: Fraction | int = 25,
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    rotation: int | None = None,
    pictures: Sequence[np.ndarray] | None = None,
) -> Path:
    """A video of noise, or of `pictures`; `times` are in hundredths of a second."""
    random = np.random.default_rng(frames)
    with av.open(str(path), "w") as container:
        time_base = Fraction(1, 100) if times else 1 / Fraction(rate)
        stream = container.add_stream(codec, rate=rate, time_base=time_base, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.colorspace = Colorspace.ITU709
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for index in range(frames):
            shape = (size[1], size[0], 3)
            pixels = pictures[index] if pictures else random.integers(0, 256, shape, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format=pixel_format,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            frame.pts, frame.time_base = times[index] if times else index, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def make_masks(frames: int = 6, size: tuple[int, int] = (48, 32)) -> list[np.ndarray]:
    """A white box that moves, on black."""
    masks = [np.zeros((size[1], size[0], 3), np.uint8) for _ in range(frames)]
    for index, mask in enumerate(masks):
        mask[8:20, 4 + 2 * index : 20 + 2 * index] = 255
    return masks


def write_images(folder: Path, images: Sequence[np.ndarray]) -> Path:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


def read_all_masks(
    mask: Path | str, footage: Footage, *, invert: bool = False, dilate: int = 0
) -> np.ndarray:
    return np.stack(list(read_masks(str(mask), footage, invert=invert, dilate=dilate)))


def damage(path: Path, out: Path, *, keep: float) -> Path:
    content = path.read_bytes()
    out.write_bytes(content[: int(len(content) * keep)])
    return out


# Videos


def test_pictures_are_the_frames_that_training_reads(tmp_path: Path) -> None:
    from vidfill.data.videos import read_frames

    path = make_video(tmp_path / "a.mkv", rotation=90)
    footage = open_footage(path)
    pictures = list(read_pictures(footage))
    assert (footage.height, footage.width, footage.frames) == (48, 32, 6)
    assert [picture.index for picture in pictures] == list(range(6))
    assert {picture.frame.format.name for picture in pictures} == {"yuv420p"}
    expected = np.stack(list(read_frames(path)))
    np.testing.assert_array_equal(np.stack([picture.rgb for picture in pictures]), expected)


def test_reading_from_a_frame_on_gives_the_rest_of_all(tmp_path: Path) -> None:
    options = {"g": "4", "bf": "2"}
    path = make_video(tmp_path / "a.mp4", 30, codec="libx264", options=options)
    footage = open_footage(path)
    whole = list(read_pictures(footage))
    part = list(read_pictures(footage, 13))
    assert [picture.index for picture in part] == list(range(13, 30))
    for one, other in zip(part, whole[13:], strict=True):
        np.testing.assert_array_equal(one.rgb, other.rgb)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".h264"])
def test_trim_keeps_the_frames_shown_within_it(tmp_path: Path, suffix: str) -> None:
    options = {"g": "10", "bf": "2"}
    path = make_video(tmp_path / f"a{suffix}", 40, codec="libx264", options=options)
    whole = list(read_pictures(open_footage(path)))
    part = open_footage(path, "0.4-1")
    assert (part.frames, part.before, part.total) == (15, 10, 40)
    pictures = list(read_pictures(part))
    assert [picture.index for picture in pictures] == list(range(15))
    for one, other in zip(pictures, whole[10:25], strict=True):
        np.testing.assert_array_equal(one.rgb, other.rgb)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".ts"])
def test_trim_far_into_a_file_gives_what_reading_all_of_it_gives(
    tmp_path: Path, suffix: str
) -> None:
    # Long enough to be entered in the middle, with frames that refer to ones on both sides.
    options = {"g": "30", "bf": "3", "x264-params": "open-gop=1"}
    path = make_video(tmp_path / f"a{suffix}", 125, rate=5, codec="libx264", options=options)
    whole = list(read_pictures(open_footage(path)))
    part = list(read_pictures(open_footage(path, "0:20-")))
    assert len(part) == 25
    for one, other in zip(part, whole[100:], strict=True):
        np.testing.assert_array_equal(one.rgb, other.rgb)


@pytest.mark.parametrize("trim", ["1", "a-b", "5-", "0.2-0.2", "-", "1:2:3:4-"])
def test_a_trim_that_leaves_nothing_or_says_nothing_is_refused(tmp_path: Path, trim: str) -> None:
    path = make_video(tmp_path / "a.mkv")
    if trim == "-":
        assert not open_footage(path, trim).trimmed
        return
    with pytest.raises(BadInput, match="trim is"):
        open_footage(path, trim)


def test_variable_rates_are_told_from_time_stamps_that_are_rounded(tmp_path: Path) -> None:
    constant = open_footage(make_video(tmp_path / "a.mkv", 12, rate=Fraction(30000, 1001)))
    variable = make_video(tmp_path / "b.mkv", 4, times=[0, 4, 20, 24])
    assert not constant.variable
    assert open_footage(variable).variable
    assert open_footage(variable).times.tolist() == [0, 40, 200, 240]


def test_a_bare_stream_without_time_stamps_is_numbered(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.h264", 10, codec="libx264", options={"bf": "2"})
    footage = open_footage(path)
    assert footage.frames == 10
    assert [picture.frame.pts for picture in read_pictures(footage)] == list(range(10))


def test_images_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    images = [np.full((9, 7, 3), index, np.uint8) for index in range(12)]
    footage = open_footage(write_images(tmp_path / "a", images), frame_rate=12.5)
    assert (footage.frames, footage.height, footage.width) == (12, 9, 7)
    assert footage.rate == Fraction(25, 2)
    assert [int(picture.rgb[0, 0, 0]) for picture in read_pictures(footage)] == list(range(12))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "I;16"])
def test_images_of_all_kinds_look_as_pillow_shows_them(tmp_path: Path, mode: str) -> None:
    (tmp_path / "a").mkdir()
    shades = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    image = Image.fromarray(shades)
    wide = mode == "I;16"
    image = Image.fromarray(shades.astype(np.uint16) * 257) if wide else image.convert(mode)
    image.save(tmp_path / "a" / "0.png")
    (picture,) = read_pictures(open_footage(tmp_path / "a"))
    expected = Image.fromarray(shades) if wide else image
    # Of 16 bits, one more or one less is a matter of rounding.
    difference = picture.rgb.astype(int) - np.asarray(expected.convert("RGB"))
    assert np.abs(difference).max() <= int(wide)


def test_a_gif_keeps_its_times(tmp_path: Path) -> None:
    images = [Image.fromarray(mask) for mask in make_masks(4)]
    durations = [100, 50, 300, 40]  # milliseconds
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=durations)
    footage = open_footage(tmp_path / "a.gif")
    assert footage.variable
    assert footage.times.tolist() == [0, 10, 15, 45]  # hundredths of a second


def test_a_missing_a_damaged_and_a_wrong_file_are_each_one_line(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "a.mp4", 30, codec="libx264")
    fast = tmp_path / "fast.mp4"
    options = {"movflags": "faststart"}
    with av.open(str(whole)) as source, av.open(str(fast), "w", options=options) as container:
        stream = container.add_stream_from_template(source.streams.video[0], opaque=True)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    matroska = make_video(tmp_path / "a.mkv", 100)
    text = tmp_path / "a.txt"
    text.write_text("no video")
    (tmp_path / "empty").mkdir()
    wrong = [
        tmp_path / "none.mp4",
        text,
        tmp_path / "empty",
        damage(whole, tmp_path / "cut.mp4", keep=0.5),
        damage(fast, tmp_path / "cut_fast.mp4", keep=0.7),
        damage(matroska, tmp_path / "cut.mkv", keep=0.5),
    ]
    for path in wrong:
        with pytest.raises(BadInput, match=path.name) as caught:
            list(read_pictures(open_footage(path)))
        assert "\n" not in str(caught.value)


def test_damage_in_the_middle_is_found_while_reading(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 30, codec="libx264")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 900] = bytes(900)
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"a\.mp4 cannot be read"):
        list(read_pictures(open_footage(path)))


def test_images_of_two_sizes_are_refused_by_name(tmp_path: Path) -> None:
    images = [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)]
    with pytest.raises(BadInput, match=r"1\.png has another size"):
        open_footage(write_images(tmp_path / "a", images))


# Masks


@pytest.mark.parametrize("kind", ["video", "folder", "image", "rectangle"])
def test_each_kind_of_mask_marks_what_is_white(tmp_path: Path, kind: str) -> None:
    footage = open_footage(make_video(tmp_path / "a.mkv"))
    frames = make_masks()
    expected = np.stack(frames)[..., 0] // 255
    if kind == "video":
        mask = str(make_video(tmp_path / "m.mkv", pictures=frames))
    elif kind == "folder":
        mask = str(write_images(tmp_path / "m", frames))
    else:
        expected = np.stack([expected[2]] * 6)
        Image.fromarray(frames[2]).save(tmp_path / "m.png")
        mask = str(tmp_path / "m.png") if kind == "image" else "8,8,16,12"
    check_masks(mask, footage)
    np.testing.assert_array_equal(read_all_masks(mask, footage), expected)
    np.testing.assert_array_equal(read_all_masks(mask, footage, invert=True), 1 - expected)


# At x264's usual quality no pixel was wrong, at a poor one 5 of the 280 on the disc's border.
@pytest.mark.parametrize(("crf", "most"), [("23", 0), ("35", 10)])
def test_a_compressed_mask_is_read_as_it_was_drawn(tmp_path: Path, crf: str, most: int) -> None:
    size = (320, 176)
    footage = open_footage(make_video(tmp_path / "a.mkv", 8, size=size))
    y, x = np.mgrid[: size[1], : size[0]]
    drawn = []
    for index in range(8):
        disc = (x - 100 - 9 * index) ** 2 + (y - 80) ** 2 < 50**2
        drawn.append(np.repeat(255 * disc[..., None].astype(np.uint8), 3, axis=-1))
    path = make_video(
        tmp_path / "m.mp4", 8, size=size, codec="libx264", pictures=drawn, options={"crf": crf}
    )
    grey = np.stack([picture.rgb for picture in read_pictures(open_footage(path))])
    assert len(np.unique(grey)) > 30  # there is ringing
    wrong = read_all_masks(path, footage) != np.stack(drawn)[..., 0] // 255
    assert wrong.sum(axis=(1, 2)).max() <= most


def test_dilation_grows_the_hole_by_its_radius(tmp_path: Path) -> None:
    footage = open_footage(make_video(tmp_path / "a.mkv", size=(64, 64)))
    (mask, *_) = read_all_masks("30,20,1,1", footage, dilate=7)
    y, x = np.nonzero(mask)
    assert (x.min(), x.max(), y.min(), y.max()) == (23, 37, 13, 27)
    assert np.hypot(x - 30, y - 20).max() < 8


def test_masks_stand_upright_as_the_video_is_seen(tmp_path: Path) -> None:
    footage = open_footage(make_video(tmp_path / "a.mkv", rotation=90))
    upright = [np.ascontiguousarray(np.rot90(mask)) for mask in make_masks()]
    expected = np.stack(upright)[..., 0] // 255
    lying = make_video(tmp_path / "m.mkv", pictures=make_masks(), rotation=90)
    np.testing.assert_array_equal(read_all_masks(lying, footage), expected)
    np.testing.assert_array_equal(
        read_all_masks(write_images(tmp_path / "m", upright), footage), expected
    )
    with pytest.raises(BadInput, match="48x32 pixels, the video 32x48"):
        check_masks(str(write_images(tmp_path / "lying", make_masks())), footage)


def test_masks_of_another_length_or_size_are_each_one_line(tmp_path: Path) -> None:
    footage = open_footage(make_video(tmp_path / "a.mkv"))
    wrong = {
        r"a\.mkv: its masks short\.mkv: there are 5": make_video(tmp_path / "short.mkv", 5),
        "masks long: there are 7": write_images(tmp_path / "long", make_masks(7)),
        "another shape": make_video(tmp_path / "wide.mkv", size=(50, 32)),
        "does not exist": tmp_path / "none.mkv",
        "within the 48x32": "40,0,9,3",
        "rectangle": "4,4,0,3",
    }
    for said, mask in wrong.items():
        with pytest.raises(BadInput, match=said) as caught:
            check_masks(str(mask), footage)
        assert "\n" not in str(caught.value)


def test_masks_of_as_many_frames_fit_whatever_their_rate(tmp_path: Path) -> None:
    footage = open_footage(make_video(tmp_path / "a.mp4", rate=Fraction(30000, 1001)))
    for rate in (30, 24, Fraction(30000, 1001)):
        check_masks(str(make_video(tmp_path / f"{float(rate)}.mp4", rate=rate)), footage)


@pytest.mark.parametrize("masks", ["of all", "of the part"])
def test_a_trimmed_video_takes_masks_of_all_or_of_the_part(tmp_path: Path, masks: str) -> None:
    footage = open_footage(make_video(tmp_path / "a.mkv", 20), "0.2-0.4")
    frames = make_masks(20)
    expected = np.stack(frames[5:10])[..., 0] // 255
    given = frames if masks == "of all" else frames[5:10]
    folder = write_images(tmp_path / "m", given)
    np.testing.assert_array_equal(read_all_masks(folder, footage), expected)


def test_frames_and_masks_are_paired_from_any_frame_on(tmp_path: Path) -> None:
    footage = open_footage(make_video(tmp_path / "a.mkv", 9))
    mask = str(write_images(tmp_path / "m", make_masks(9)))
    whole = list(read_masked(footage, mask))
    part = list(read_masked(footage, mask, start=4))
    assert [picture.index for picture, _ in part] == [4, 5, 6, 7, 8]
    for (one, its_mask), (other, other_mask) in zip(part, whole[4:], strict=True):
        np.testing.assert_array_equal(one.rgb, other.rgb)
        np.testing.assert_array_equal(its_mask, other_mask)


@pytest.mark.slow
def test_reading_takes_the_memory_of_few_frames_at_any_length(tmp_path: Path) -> None:
    masks = itertools.islice(itertools.cycle(make_masks(10)), 400)
    path = make_video(tmp_path / "m.mkv", 400, pictures=list(masks))
    footage = open_footage(path)
    peaks = []
    for frames in (40, 400):
        tracemalloc.start()
        for _ in itertools.islice(read_masked(footage, str(path)), frames):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 48 * 32 * 3  # less than one frame's pixels


@pytest.mark.skipif(not REAL.is_dir(), reason="no real videos here")
def test_real_videos_are_read_whole() -> None:
    nasa = open_footage(REAL / "nasa_13013.mp4")
    assert (nasa.width, nasa.height, nasa.frames, nasa.rate) == (320, 180, 325, 25)
    assert not nasa.variable
    part = open_footage(REAL / "nasa_13013.mp4", "12-")
    assert len(list(read_masked(part, "10,10,50,50"))) == part.frames == 25
