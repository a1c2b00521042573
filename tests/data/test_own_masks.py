from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from vidfill.data.own_masks import OwnMasks
from vidfill.data.videos import FrameSize, Header, Mask, UnreadableVideo

HEIGHT, WIDTH = 16, 24
VIDEO = Header(6, HEIGHT, WIDTH, Fraction(25))
BLACK_RED = (0, 0, 0, 60, 0, 0)  # dark, as the palette of DAVIS is
WHITE_BLACK = (255, 255, 255, 0, 0, 0)


def draw(count: int = 6, height: int = HEIGHT, width: int = WIDTH) -> list[np.ndarray]:
    """A column of the hole that moves on by a pixel a frame."""
    masks = np.zeros((count, height, width), np.uint8)
    for index, mask in enumerate(masks):
        mask[:, index % width] = 1
    return list(masks)


def write_video(path: Path, frames: Sequence[np.ndarray], rate: int = 25) -> Path:
    """Grey frames without loss."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width = frames[0].shape
        stream.pix_fmt = "gray"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="gray")))
        container.mux(stream.encode())
    return path


def write_images(folder: Path, frames: Sequence[np.ndarray], step: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    for index, pixels in enumerate(frames):
        Image.fromarray(pixels).save(folder / f"{step * index}.png")
    return folder


def read(masks: OwnMasks, **how: object) -> np.ndarray:
    return np.stack(list(masks.read(**how)))


def with_palette(indices: np.ndarray, palette: Sequence[int]) -> Image.Image:
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette(palette)
    return image


# How a hole that is 1 may be drawn.
KINDS: dict[str, Callable[[Mask], Image.Image]] = {
    "1": lambda mask: Image.fromarray(mask == 1),
    "L": lambda mask: Image.fromarray(mask * 255),
    "I;16": lambda mask: Image.fromarray(np.where(mask, 128 << 8, 127 << 8).astype(np.uint16)),
    "one channel": lambda mask: Image.fromarray(mask[..., None] * np.array([0, 128, 0], np.uint8)),
    "RGBA": lambda mask: Image.fromarray(mask * 255).convert("RGBA"),
    "objects in a palette": lambda mask: with_palette(mask, BLACK_RED),
    "white first in a palette": lambda mask: with_palette(1 - mask, WHITE_BLACK),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_hole_is_white_in_every_kind_of_image(tmp_path: Path, kind: str) -> None:
    (mask,) = draw(1)
    KINDS[kind](mask).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read(OwnMasks(tmp_path / "m.png", VIDEO)), [mask] * 6)


@pytest.mark.parametrize("write", [write_images, write_video])
@pytest.mark.parametrize(("grey", "is_hole"), [(127, False), (128, True)])
def test_the_hole_begins_at_half_of_255(
    tmp_path: Path, write: Callable[..., Path], grey: int, is_hole: bool
) -> None:
    masks = OwnMasks(write(tmp_path / "m.mkv", [mask * grey for mask in draw()]), VIDEO)
    np.testing.assert_array_equal(read(masks), np.stack(draw()) * is_hole)


@pytest.mark.parametrize("number", [1, 7])
@pytest.mark.parametrize("palette", [None, BLACK_RED, WHITE_BLACK])
def test_of_annotations_all_but_zero_is_the_hole(
    tmp_path: Path, number: int, palette: Sequence[int] | None
) -> None:
    (mask,) = draw(1)
    numbers = mask * number
    image = Image.fromarray(numbers) if palette is None else with_palette(numbers, palette)
    image.save(tmp_path / "m.png")
    masks = OwnMasks(tmp_path / "m.png", VIDEO, all_but_zero=True)
    np.testing.assert_array_equal(read(masks), [mask] * 6)


@pytest.mark.parametrize("write", [write_images, write_video])
def test_masks_are_read_from_any_frame_on(tmp_path: Path, write: Callable[..., Path]) -> None:
    masks = OwnMasks(write(tmp_path / "m.mkv", [mask * 255 for mask in draw()]), VIDEO)
    np.testing.assert_array_equal(read(masks, first=4), draw()[4:])


@pytest.mark.parametrize("write", [write_images, write_video])
def test_masks_may_be_of_all_frames_or_of_a_part(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    part = range(2, 5)
    for name, drawn in (("all", draw()), ("part", draw()[2:5])):
        path = write(tmp_path / f"{name}.mkv", [mask * 255 for mask in drawn])
        masks = read(OwnMasks(path, VIDEO, part=part), first=part.start)
        np.testing.assert_array_equal(masks[:3], draw()[2:5])


def test_masks_by_the_frames_names_need_not_be_all(tmp_path: Path) -> None:
    drawn = draw()
    path = write_images(tmp_path / "m", [mask * 255 for mask in drawn[::2]], step=2)
    masks = OwnMasks(path, VIDEO, [str(number) for number in range(6)])
    np.testing.assert_array_equal(read(masks), np.stack(drawn)[[0, 0, 2, 2, 4, 4]])
    (path / "0.png").unlink()
    np.testing.assert_array_equal(read(masks), np.stack(drawn)[[2, 2, 2, 2, 4, 4]])
    Image.fromarray(drawn[0]).save(path / "9.png")
    with pytest.raises(UnreadableVideo, match="its masks m: no frame has the name 9"):
        masks.check()


@pytest.mark.parametrize("write", [write_images, write_video])
def test_a_smaller_copy_fits_the_video_and_what_it_is_brought_to(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    drawn = np.stack(draw(6, HEIGHT // 2, WIDTH // 2))
    masks = OwnMasks(write(tmp_path / "m.mkv", [mask * 255 for mask in drawn]), VIDEO)
    masks.check()
    np.testing.assert_array_equal(read(masks), drawn.repeat(2, axis=1).repeat(2, axis=2))
    assert read(masks, size=FrameSize(7, 5)).shape == (6, 5, 7)


def write_broken(path: Path, masks: Sequence[np.ndarray]) -> Path:
    path.write_bytes(b"no video")
    return path


def write_twice(path: Path, masks: Sequence[np.ndarray]) -> Path:
    (write_images(path, masks) / "3.jpg").touch()
    return path


@pytest.mark.parametrize(
    ("write", "drawn", "said"),
    [
        (write_images, draw(5), "there are 5 for 6 frames: give one for each frame, or one image"),
        (write_video, draw(7), "there are 7 for 6 frames"),
        (write_images, draw(6, 16, 16), "they have 16x16 pixels, the video 24x16 .*: scale or"),
        (write_video, draw(6, 16, 16), "they have 16x16 pixels, the video 24x16"),
        (write_images, draw(), r"0\.png holds nothing brighter than 1: .*write 255"),
        (write_video, draw(), "it holds nothing brighter than 1"),
        (write_broken, draw(), "FFmpeg says: Invalid data"),
        (write_twice, draw(), r"both 3\.jpg and 3\.png"),
    ],
)
def test_masks_that_do_not_fit_are_named_with_the_remedy(
    tmp_path: Path, write: Callable[..., Path], drawn: list[np.ndarray], said: str
) -> None:
    masks = OwnMasks(write(tmp_path / "m.mkv", drawn), VIDEO)
    with pytest.raises(UnreadableVideo, match=f"its masks m.mkv: .*{said}") as refusal:
        masks.check()
    assert "\n" not in str(refusal.value)


def test_a_later_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    drawn = [*draw(5), *draw(1, 16, 16)]
    masks = OwnMasks(write_images(tmp_path / "m", [mask * 255 for mask in drawn]), VIDEO)
    masks.check()
    with pytest.raises(UnreadableVideo, match="16x16 pixels"):
        read(masks)


def numbered(path: Path, values: Sequence[int]) -> None:
    """A lossless image whose columns of 6 pixels have these values."""
    columns = np.repeat(np.array(values, np.uint8), 6)
    Image.fromarray(np.tile(columns, (HEIGHT, 1))).resize((WIDTH, HEIGHT), 0).save(path)


@pytest.mark.parametrize(("values", "named"), [((0, 1, 3), "3"), ((0, 7, 255), "7"), ((0, 2), "2")])
def test_numbers_of_objects_are_refused_with_the_remedy(
    tmp_path: Path, values: Sequence[int], named: str
) -> None:
    numbered(tmp_path / "m.png", values)
    with pytest.raises(UnreadableVideo, match=rf"{named}.*write 255"):
        OwnMasks(tmp_path / "m.png", VIDEO).check()


@pytest.mark.parametrize("colour", [0, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_the_shape_of_a_transparent_image_of_one_colour_is_what_is_opaque(
    tmp_path: Path, mode: str, colour: int
) -> None:
    shape = np.zeros((HEIGHT, WIDTH), np.uint8)
    shape[4:9, 3:15] = 1
    rgba = np.full((HEIGHT, WIDTH, 4), colour, np.uint8)
    rgba[..., 3] = 255 * shape
    Image.fromarray(rgba).convert(mode).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read(OwnMasks(tmp_path / "m.png", VIDEO))[0], shape)
    rgba[:2, :, :3] = 255 - colour
    Image.fromarray(rgba).convert(mode).save(tmp_path / "m.png")
    with pytest.raises(UnreadableVideo, match="without transparency"):
        OwnMasks(tmp_path / "m.png", VIDEO).check()
