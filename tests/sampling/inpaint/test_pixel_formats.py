from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from vidfill.sampling.inpaint.output import open_output
from vidfill.sampling.inpaint.video import Footage, open_footage, read_pictures

REAL = Path(__file__).parents[4] / "shared" / "videos" / "real"
SIZE = (48, 32)  # width, height


def frames_of(footage: Footage) -> list[av.VideoFrame]:
    return [picture.frame for picture in read_pictures(footage)]


def format_of(footage: Footage) -> str:
    return next(read_pictures(footage)).frame.format.name


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
    tmp_path: Path,
    pixel_format: str,
    size: tuple[int, int],
    planes_of: Callable[[av.VideoFrame], list[np.ndarray]],
    make_noise: Callable[..., av.VideoFrame],
    make_video: Callable[..., Path],
    make_masks: Callable[[Footage], np.ndarray],
    fill: Callable[..., Footage],
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


def test_frames_without_a_hole_are_the_videos_own(
    tmp_path: Path,
    planes_of: Callable[[av.VideoFrame], list[np.ndarray]],
    make_video: Callable[..., Path],
    fill: Callable[..., Footage],
) -> None:
    source = open_footage(make_video(tmp_path / "a.mkv"))
    nothing = np.zeros((6, SIZE[1], SIZE[0]), np.uint8)
    written = fill(source, tmp_path / "b.mkv", masks=nothing)
    for new, old in zip(frames_of(written), frames_of(source), strict=True):
        for one, other in zip(planes_of(new), planes_of(old), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("matrix", [Colorspace.ITU709, Colorspace.ITU601, 9, 2])
@pytest.mark.parametrize("colour_range", [ColorRange.MPEG, ColorRange.JPEG, 0])
def test_pixels_go_back_through_the_videos_own_matrix_and_range(
    tmp_path: Path,
    matrix: int,
    colour_range: int,
    planes_of: Callable[[av.VideoFrame], list[np.ndarray]],
    make_video: Callable[..., Path],
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


def test_a_full_range_film_stays_bit_for_bit_under_its_older_name(
    tmp_path: Path,
    planes_of: Callable[[av.VideoFrame], list[np.ndarray]],
    make_video: Callable[..., Path],
    fill: Callable[..., Footage],
) -> None:
    colours = (ColorRange.JPEG, Colorspace.ITU709, 2, 2)
    source = open_footage(make_video(tmp_path / "a.mp4", codec="libx264", colours=colours))
    assert format_of(source) == "yuvj420p"
    written = fill(source, tmp_path / "b.mkv", masks=np.zeros((6, 32, 48), np.uint8))
    assert format_of(written) == "yuv420p"
    for new, old in zip(read_pictures(written), read_pictures(source), strict=True):
        for one, other in zip(planes_of(new.frame), planes_of(old.frame), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(new.rgb, old.rgb)


def test_a_hole_lies_where_it_is_seen_in_a_video_that_is_turned(
    tmp_path: Path,
    make_noise: Callable[..., av.VideoFrame],
    make_video: Callable[..., Path],
    fill: Callable[..., Footage],
) -> None:
    for rotation in (0, 90, 180, 270):
        frames = [make_noise("yuv444p", SIZE, 0)]
        source = open_footage(make_video(tmp_path / f"{rotation}.mkv", frames, rotation=rotation))
        written = fill(source, tmp_path / f"{rotation}_.mkv")
        (new,), (old,) = read_pictures(written), read_pictures(source)
        changed = (new.rgb != old.rgb).any(axis=-1)
        assert changed[7:20, 5:30].mean() > 0.95
        assert changed.sum() == changed[7:20, 5:30].sum()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "I;16", "P"])
def test_images_become_images_with_all_their_bits(
    tmp_path: Path,
    mode: str,
    make_masks: Callable[[Footage], np.ndarray],
    fill: Callable[..., Footage],
) -> None:
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


def test_a_video_becomes_upright_images_and_images_a_video(
    tmp_path: Path,
    make_video: Callable[..., Path],
    make_masks: Callable[[Footage], np.ndarray],
    fill: Callable[..., Footage],
) -> None:
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


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="no real videos here")
def test_a_real_video_stays_itself_around_the_hole(
    tmp_path: Path,
    planes_of: Callable[[av.VideoFrame], list[np.ndarray]],
    make_masks: Callable[[Footage], np.ndarray],
    fill: Callable[..., Footage],
    times_of: Callable[[Footage], list[Fraction]],
) -> None:
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
