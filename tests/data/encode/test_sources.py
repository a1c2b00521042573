from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vidfill.data.encode.sources import Source, find_outside, find_sources, make_key_part
from vidfill.data.videos import UnreadableVideo, read_header
from vidfill.errors import BadInput

HEIGHT, WIDTH = 16, 24

Write = Callable[..., Path]


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def make_frames(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint8)[:, None, None, None] + np.zeros(
        (HEIGHT, WIDTH, 3), np.uint8
    )


def make_masks(count: int) -> np.ndarray:
    """A column of the hole that moves on by a pixel a frame."""
    return np.stack([np.eye(WIDTH, dtype=np.uint8)[[index] * HEIGHT] for index in range(count)])


def write_annotations(folder: Path, masks: np.ndarray, step: int = 1, first: int = 0) -> None:
    """As DAVIS has them: an object's number is an index into dark colours."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, mask in enumerate(masks):
        image = Image.frombytes("P", (WIDTH, HEIGHT), (2 * mask).tobytes())
        image.putpalette([0, 0, 0, 60, 0, 0, 0, 60, 0])
        image.save(folder / f"{first + step * index:05}.png")


def find_one(root: Path, mask_files: Path | None = None) -> Source:
    (source,) = find_sources(root, mask_files)
    return source


def read_masks(source: Source) -> np.ndarray:
    return np.stack(list(source.own_masks(read_header(source.path)).read()))


def labels(found: Sequence[Source]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for source in found:
        splits.setdefault(source.split, []).append(source.label)
    return splits


# Layouts.


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [("video_train", "video_validation", "video_test"), ("train", "val", "test")],
)
def test_splits_are_found_by_folder_names(
    tmp_path: Path, train: str, validation: str, test: str
) -> None:
    touch(tmp_path / train / "1" / "b.mp4")
    touch(tmp_path / train / "1" / "a.MKV")
    touch(tmp_path / train / "notes.txt")
    touch(tmp_path / train / ".hidden.mp4")
    touch(tmp_path / train / ".hidden" / "h.mp4")
    touch(tmp_path / validation / "c.webm")
    touch(tmp_path / test / "d.avi")
    outside = [touch(tmp_path / name) for name in ("more/e.mp4", "z.mp4")]
    found = find_sources(tmp_path)
    assert labels(found) == {
        "train": [f"{train}/1/a.MKV", f"{train}/1/b.mp4"],
        "validation": [f"{validation}/c.webm"],
        "test": [f"{test}/d.avi"],
    }
    assert all(source.path == tmp_path / source.label for source in found)
    assert find_outside(tmp_path, found, None) == outside


def test_a_folder_without_split_names_is_all_train(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.MP4", "video_00001.mp4"):
        touch(tmp_path / name)
    assert labels(find_sources(tmp_path)) == {"train": ["a.MP4", "b.mp4", "video_00001.mp4"]}


def test_clevrer_as_published_has_its_folders_as_splits(tmp_path: Path) -> None:
    numbers = {"video_train": 9_999, "video_validation": 10_000, "video_test": 19_999}
    for folder, number in numbers.items():
        first = number // 1000 * 1000
        part = f"video_{first:05}-{first + 1000:05}"
        touch(tmp_path / folder / part / f"video_{number:05}.mp4")
    assert {split: len(listed) for split, listed in labels(find_sources(tmp_path)).items()} == {
        "train": 1,
        "validation": 1,
        "test": 1,
    }


def test_clevrers_names_alone_give_its_official_splits(tmp_path: Path) -> None:
    for number in (19_999, 15_000, 14_999, 10_000, 9_999, 0):
        touch(tmp_path / f"disk {9 - number // 5000}" / f"video_{number:05}.mp4")
    expected = {
        "train": ["disk 8/video_09999.mp4", "disk 9/video_00000.mp4"],
        "validation": ["disk 7/video_10000.mp4", "disk 7/video_14999.mp4"],
        "test": ["disk 6/video_15000.mp4", "disk 6/video_19999.mp4"],
    }
    found = find_sources(tmp_path)
    assert labels(found) == expected
    assert [source.split for source in found] == ["train"] * 2 + ["validation"] * 2 + ["test"] * 2
    touch(tmp_path / "video_20000.mp4")
    assert list(labels(find_sources(tmp_path))) == ["train"]


@pytest.fixture
def make_davis(write_images: Write) -> Callable[..., None]:
    def make(root: Path, resolutions: Sequence[str] = ("1080p", "480p")) -> None:
        for resolution in resolutions:
            for name in ("bear", "camel", "dog", "unlisted"):
                write_images(root / "JPEGImages" / resolution / name, make_frames(3), "jpg")
                write_annotations(root / "Annotations" / resolution / name, make_masks(3))
        for year, train in (("2016", "unlisted"), ("2017", "dog\nbear")):
            lists = root / "ImageSets" / year
            lists.mkdir(parents=True)
            (lists / "train.txt").write_text(train + "\n")
            (lists / "val.txt").write_text("camel\n")
        (root / "ImageSets" / "2019").mkdir()

    return make


def test_davis_has_the_splits_of_its_newest_lists_and_its_annotations(
    tmp_path: Path, make_davis: Callable[..., None]
) -> None:
    make_davis(tmp_path)
    found = find_sources(tmp_path)
    folder = "JPEGImages/480p/"
    assert labels(found) == {
        "train": [folder + "bear", folder + "dog"],
        "validation": [folder + "camel"],
    }
    assert [source.name for source in found] == ["bear", "dog", "camel"]
    assert found[0].masks == tmp_path / "Annotations" / "480p" / "bear"
    for source in found:
        np.testing.assert_array_equal(read_masks(source), make_masks(3))
    outside = find_outside(tmp_path, found, None)
    assert tmp_path / folder / "unlisted" in outside
    assert not any("Annotations" in path.parts for path in outside)


def test_an_objects_number_in_grey_is_hole_in_annotations_and_refused_elsewhere(
    tmp_path: Path, write_images: Write, make_davis: Callable[..., None]
) -> None:
    make_davis(tmp_path / "davis")
    numbers = 2 * make_masks(3)
    write_images(tmp_path / "davis" / "Annotations" / "480p" / "bear", numbers)
    bear, _, _ = find_sources(tmp_path / "davis")
    np.testing.assert_array_equal(read_masks(bear), make_masks(3))
    write_images(tmp_path / "masks" / "JPEGImages" / "480p" / "bear", numbers)
    bear, _, _ = find_sources(tmp_path / "davis", tmp_path / "masks")
    with pytest.raises(UnreadableVideo, match="write 255 where it says 2"):
        read_masks(bear)


def test_davis_without_480p_takes_its_only_resolution(
    tmp_path: Path, make_davis: Callable[..., None]
) -> None:
    make_davis(tmp_path, ["Full-Resolution"])
    assert find_sources(tmp_path)[0].label == "JPEGImages/Full-Resolution/bear"
    (tmp_path / "JPEGImages" / "240p").mkdir()
    with pytest.raises(BadInput, match="resolutions 240p, Full-Resolution"):
        find_sources(tmp_path)


def test_davis_without_lists_is_refused(tmp_path: Path, make_davis: Callable[..., None]) -> None:
    make_davis(tmp_path)
    for file in (tmp_path / "ImageSets").rglob("*.txt"):
        file.unlink()
    with pytest.raises(BadInput, match=r"no YEAR/train\.txt"):
        find_sources(tmp_path)


def test_youtube_vos_takes_the_nearest_annotation_before_a_frame(
    tmp_path: Path, write_images: Write
) -> None:
    masks = make_masks(12)
    for split, first in (("train", 0), ("valid", 5)):
        folder = tmp_path / split
        write_images(folder / "JPEGImages" / "0a1b", make_frames(12), "jpg")
        write_annotations(folder / "Annotations" / "0a1b", masks[first::5], 5, first)
    write_images(tmp_path / "test" / "JPEGImages" / "2c", make_frames(3))
    touch(tmp_path / "test" / "Annotations" / "2c" / "empty")
    found = find_sources(tmp_path)
    assert labels(found) == {
        "train": ["train/JPEGImages/0a1b"],
        "validation": ["valid/JPEGImages/0a1b"],
        "test": ["test/JPEGImages/2c"],
    }
    assert len({source.name for source in found}) == 3
    train, validation, test = found
    np.testing.assert_array_equal(read_masks(train), masks[[0] * 5 + [5] * 5 + [10] * 2])
    np.testing.assert_array_equal(read_masks(validation), masks[[5] * 10 + [10] * 2])
    assert test.masks is None
    assert find_outside(tmp_path, found, None) == []


def test_folders_that_hold_images_and_no_video_are_videos(
    tmp_path: Path, write_images: Write
) -> None:
    write_images(tmp_path / "train" / "deep" / "a.b", make_frames(2))
    touch(tmp_path / "train" / "films" / "c.mp4")
    touch(tmp_path / "train" / "films" / "still.jpg")
    touch(tmp_path / "train" / "poster.jpg")
    write_images(tmp_path / "val", make_frames(2))
    found = find_sources(tmp_path)
    assert labels(found) == {
        "train": ["train/deep/a.b", "train/films/c.mp4"],
        "validation": ["val"],
    }
    assert [source.name for source in found] == ["a_b", "c", "val"]


def test_a_folder_of_frames_itself_is_one_video(tmp_path: Path, write_images: Write) -> None:
    write_images(tmp_path / "walk", make_frames(2))
    source = find_one(tmp_path / "walk")
    assert (source.label, source.name, source.path) == (".", "walk", tmp_path / "walk")


def test_folders_that_give_no_videos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no folder"):
        find_sources(tmp_path / "absent")
    with pytest.raises(BadInput, match="holds no video"):
        find_sources(tmp_path)
    touch(tmp_path / "train" / "a.mp4")
    touch(tmp_path / "video_train" / "a.mp4")
    with pytest.raises(BadInput, match="both video_train and train"):
        find_sources(tmp_path)


# Names.


def test_a_name_is_the_stem_or_the_path_where_stems_collide(tmp_path: Path) -> None:
    for name in ("train/a.1.mp4", "train/b.mp4", "val/b.mp4", "val/c d.mkv"):
        touch(tmp_path / name)
    names = [source.name for source in find_sources(tmp_path)]
    assert names == ["a_1", "train_b_mp4", "val_b_mp4", "c_d"]


def test_names_that_would_still_collide_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "a.b.mp4")
    touch(tmp_path / "a b.mp4")
    with pytest.raises(BadInput, match="share a key"):
        find_sources(tmp_path)


@settings(deadline=None, max_examples=20)
@given(name=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=200))
def test_every_name_makes_a_short_plain_key(name: str) -> None:
    part = make_key_part(name)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,48}", part)


def test_names_in_another_script_and_long_names_stay_apart(tmp_path: Path) -> None:
    for name in ("视频一", "视频二", "é", "x" * 60 + "1", "x" * 60 + "2"):
        touch(tmp_path / f"{name}.mp4")
    assert len({source.name for source in find_sources(tmp_path)}) == 5


# Masks of the user's own.


@pytest.fixture
def videos(tmp_path: Path, write_lossless: Write) -> Path:
    """One video of six frames."""
    write_lossless(tmp_path / "videos" / "a" / "b.mkv", make_frames(6))
    return tmp_path / "videos"


def test_masks_are_found_in_a_folder_that_mirrors_the_videos(
    videos: Path, tmp_path: Path, write_images: Write, write_lossless: Write
) -> None:
    white = make_masks(6) * 255
    write_lossless(tmp_path / "videos_of_masks" / "a" / "b.AVI", white[..., None].repeat(3, -1))
    write_images(tmp_path / "images" / "a" / "b", white)
    for kind in ("videos_of_masks", "images"):
        np.testing.assert_array_equal(read_masks(find_one(videos, tmp_path / kind)), make_masks(6))


def test_one_image_below_the_videos_is_the_mask_of_all_frames(videos: Path) -> None:
    (mask,) = make_masks(1)
    masks = videos / "masks"
    (masks / "a").mkdir(parents=True)
    Image.fromarray(mask * 255).save(masks / "a" / "b.PNG")
    source = find_one(videos, masks)
    np.testing.assert_array_equal(read_masks(source), [mask] * 6)
    assert find_outside(videos, [source], masks) == []


def test_given_masks_replace_annotations(tmp_path: Path, make_davis: Callable[..., None]) -> None:
    make_davis(tmp_path / "davis")
    mask = make_masks(3)[2]
    place = tmp_path / "masks" / "JPEGImages" / "480p"
    place.mkdir(parents=True)
    Image.fromarray(mask * 255).save(place / "bear.png")
    bear, dog, _ = find_sources(tmp_path / "davis", tmp_path / "masks")
    np.testing.assert_array_equal(read_masks(bear), [mask] * 3)
    assert dog.masks is None


def test_folders_of_masks_that_do_not_fit_are_refused(videos: Path, tmp_path: Path) -> None:
    for wrong in (tmp_path / "absent", videos):
        with pytest.raises(BadInput, match="mask_files is"):
            find_sources(videos, wrong)
    touch(tmp_path / "masks" / "elsewhere" / "b.png")
    with pytest.raises(BadInput, match="no mask for any of 1 videos"):
        find_sources(videos, tmp_path / "masks")
    touch(tmp_path / "masks" / "a" / "b.png")
    touch(tmp_path / "masks" / "a" / "b.mp4")
    with pytest.raises(BadInput, match=r"has b\.mp4 and b\.png for one video"):
        find_sources(videos, tmp_path / "masks")
