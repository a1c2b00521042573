from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vidfill.data.encode.clips import read_clips
from vidfill.data.encode.plan import Piece, Plan, Surveyed, plan_shards, survey
from vidfill.data.encode.sources import Source, _key_part, find_outside, find_sources
from vidfill.data.videos import FrameSize, Header, UnreadableVideo, cut_clips, write_video
from vidfill.errors import BadInput

COLLISIONS = Path(__file__).parents[4] / "shared" / "videos" / "collisions"
HEIGHT, WIDTH = 16, 24


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def make_frames(count: int, seed: int = 0) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, 256, (count, 2, 3, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


def make_holes(count: int) -> np.ndarray:
    """A column of the hole that moves on by a pixel a frame."""
    holes = np.zeros((count, HEIGHT, WIDTH), np.uint8)
    for index in range(count):
        holes[index, :, index % WIDTH] = 1
    return holes


def write_lossless(path: Path, frames: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_images(
    folder: Path, images: Sequence[Image.Image], step: int = 1, suffix: str = "png"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        image.save(folder / f"{step * index:05}.{suffix}")
    return folder


def to_images(frames: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in frames]


def to_palette(hole: np.ndarray, index: int = 1) -> Image.Image:
    """An annotation as DAVIS has it: an object's number is an index into dark colours."""
    image = Image.fromarray(hole * index, mode=None).convert("L")
    indexed = Image.frombytes("P", image.size, image.tobytes())
    indexed.putpalette([0, 0, 0, 60, 0, 0, 0, 60, 0])
    return indexed


def find_one(root: Path, mask_files: Path | None = None) -> Source:
    (source,) = find_sources(root, mask_files)
    return source


def read_masks(source: Source, length: int, **how: object) -> np.ndarray:
    """The masks of a source's only clip."""
    (clip,) = read_clips(Piece(source), length, length, own_masks=True, **how)
    assert clip.mask is not None
    return clip.mask


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


def make_davis(root: Path, resolutions: Sequence[str] = ("1080p", "480p")) -> None:
    for resolution in resolutions:
        for seed, name in enumerate(("bear", "camel", "dog", "unlisted")):
            frames = to_images(make_frames(3, seed))
            write_images(root / "JPEGImages" / resolution / name, frames, suffix="jpg")
            holes = [to_palette(hole, index=2) for hole in make_holes(3)]
            write_images(root / "Annotations" / resolution / name, holes)
    for year, train in (("2016", "unlisted"), ("2017", "dog\nbear")):
        lists = root / "ImageSets" / year
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text(train + "\n")
        (lists / "val.txt").write_text("camel\n")
    (root / "ImageSets" / "2019").mkdir()


def test_davis_has_the_splits_of_its_newest_lists_and_its_annotations(tmp_path: Path) -> None:
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
        np.testing.assert_array_equal(read_masks(source, 3), make_holes(3))
    outside = find_outside(tmp_path, found, None)
    assert tmp_path / folder / "unlisted" in outside
    assert not any("Annotations" in path.parts for path in outside)


def test_an_objects_number_as_a_grey_value_is_hole_in_annotations_alone(tmp_path: Path) -> None:
    make_davis(tmp_path / "davis")
    numbers = 2 * make_holes(3)
    write_images(tmp_path / "davis" / "Annotations" / "480p" / "bear", to_images(numbers))
    bear, _, _ = find_sources(tmp_path / "davis")
    np.testing.assert_array_equal(read_masks(bear, 3), make_holes(3))
    write_images(tmp_path / "masks" / "JPEGImages" / "480p" / "bear", to_images(numbers))
    bear, _, _ = find_sources(tmp_path / "davis", tmp_path / "masks")
    assert not read_masks(bear, 3).any()


def test_davis_without_480p_takes_its_only_resolution(tmp_path: Path) -> None:
    make_davis(tmp_path, ["Full-Resolution"])
    assert find_sources(tmp_path)[0].label == "JPEGImages/Full-Resolution/bear"
    (tmp_path / "JPEGImages" / "240p").mkdir()
    with pytest.raises(BadInput, match="resolutions 240p, Full-Resolution"):
        find_sources(tmp_path)


def test_davis_without_lists_is_refused(tmp_path: Path) -> None:
    make_davis(tmp_path)
    for file in (tmp_path / "ImageSets").rglob("*.txt"):
        file.unlink()
    with pytest.raises(BadInput, match=r"no YEAR/train\.txt"):
        find_sources(tmp_path)


def test_youtube_vos_takes_the_nearest_annotation_before_a_frame(tmp_path: Path) -> None:
    holes = make_holes(12)
    for split, first in (("train", 0), ("valid", 5)):
        folder = tmp_path / split
        write_images(folder / "JPEGImages" / "0a1b", to_images(make_frames(12)), suffix="jpg")
        annotations = folder / "Annotations" / "0a1b"
        annotations.mkdir(parents=True)
        for index in range(first, 12, 5):
            to_palette(holes[index]).save(annotations / f"{index:05}.png")
    write_images(tmp_path / "test" / "JPEGImages" / "2c", to_images(make_frames(3)))
    touch(tmp_path / "test" / "Annotations" / "2c" / "empty")
    found = find_sources(tmp_path)
    assert labels(found) == {
        "train": ["train/JPEGImages/0a1b"],
        "validation": ["valid/JPEGImages/0a1b"],
        "test": ["test/JPEGImages/2c"],
    }
    assert len({source.name for source in found}) == 3
    train, validation, test = found
    np.testing.assert_array_equal(read_masks(train, 12), holes[[0] * 5 + [5] * 5 + [10] * 2])
    np.testing.assert_array_equal(read_masks(validation, 12), holes[[5] * 10 + [10] * 2])
    assert test.masks is None
    assert find_outside(tmp_path, found, None) == []


def test_folders_that_hold_images_and_no_video_are_videos(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "deep" / "a.b", to_images(make_frames(2)))
    touch(tmp_path / "train" / "films" / "c.mp4")
    touch(tmp_path / "train" / "films" / "still.jpg")
    touch(tmp_path / "train" / "poster.jpg")
    write_images(tmp_path / "val", to_images(make_frames(2)))
    found = find_sources(tmp_path)
    assert labels(found) == {
        "train": ["train/deep/a.b", "train/films/c.mp4"],
        "validation": ["val"],
    }
    assert [source.name for source in found] == ["a_b", "c", "val"]


def test_a_folder_of_frames_itself_is_one_video(tmp_path: Path) -> None:
    write_images(tmp_path / "walk", to_images(make_frames(2)))
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


@settings(deadline=None)
@given(name=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=200))
def test_every_name_makes_a_short_plain_key(name: str) -> None:
    part = _key_part(name)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,48}", part)


def test_names_in_another_script_and_long_names_stay_apart(tmp_path: Path) -> None:
    for name in ("视频一", "视频二", "é", "x" * 60 + "1", "x" * 60 + "2"):
        touch(tmp_path / f"{name}.mp4")
    assert len({source.name for source in find_sources(tmp_path)}) == 5


# Masks of the user's own.


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """One video of six frames, whose masks `make_holes(6)` are to be found."""
    write_lossless(tmp_path / "videos" / "a" / "b.mkv", make_frames(6))
    return tmp_path / "videos"


def grey(holes: np.ndarray) -> np.ndarray:
    """What a compressed mask looks like: neither black nor white."""
    return np.where(holes[..., None] == 1, 150, 100).astype(np.uint8).repeat(3, axis=-1)


@pytest.mark.parametrize("kind", ["video", "folder", "palette"])
def test_masks_are_found_in_a_folder_that_mirrors_the_videos(
    videos: Path, tmp_path: Path, kind: str
) -> None:
    holes = make_holes(6)
    masks = tmp_path / "masks" / "a"
    if kind == "video":
        write_lossless(masks / "b.AVI", grey(holes))
    elif kind == "folder":
        write_images(masks / "b", to_images(grey(holes)[..., 0]))
    else:
        write_images(masks / "b", [to_palette(hole) for hole in holes])
    source = find_one(videos, tmp_path / "masks")
    np.testing.assert_array_equal(read_masks(source, 6), holes)


def test_one_image_is_the_mask_of_all_frames(videos: Path) -> None:
    hole = make_holes(6)[3]
    masks = videos / "masks"  # below the videos, and none of them
    (masks / "a").mkdir(parents=True)
    Image.fromarray(hole * 255).save(masks / "a" / "b.PNG")
    source = find_one(videos, masks)
    np.testing.assert_array_equal(read_masks(source, 6), np.stack([hole] * 6))
    assert find_outside(videos, [source], masks) == []


def test_given_masks_replace_annotations(tmp_path: Path) -> None:
    make_davis(tmp_path / "davis")
    hole = make_holes(1)[0]
    place = tmp_path / "masks" / "JPEGImages" / "480p"
    place.mkdir(parents=True)
    Image.fromarray(hole * 255).save(place / "bear.png")
    bear, dog, _ = find_sources(tmp_path / "davis", tmp_path / "masks")
    np.testing.assert_array_equal(read_masks(bear, 3), np.stack([hole] * 3))
    assert dog.masks is None


def test_a_mask_is_cropped_and_resized_as_its_frame_is(tmp_path: Path) -> None:
    holes = make_holes(4)
    holes[:, :8] = 1
    write_lossless(tmp_path / "videos" / "a.mkv", np.stack([holes * 255] * 3, axis=-1))
    write_images(tmp_path / "masks" / "a", to_images(holes * 255))
    source = find_one(tmp_path / "videos", tmp_path / "masks")
    for fit in ("crop", "resize"):
        for size in (FrameSize(16, 16), FrameSize(8, 8), FrameSize(48, 32), FrameSize(20, 60)):
            how = {"size": size, "fit": fit}
            (clip,) = read_clips(Piece(source), 4, 4, own_masks=True, **how)
            assert clip.mask is not None
            assert clip.mask.shape == (4, size.height, size.width)
            assert set(np.unique(clip.mask)) == {0, 1}
            differ = clip.mask != (clip.frames[..., 0] > 127)
            # The columns are a pixel wide: what is left of one depends on the interpolation.
            assert differ.mean() < 0.12
            assert not differ[:, : size.height // 2 - 1].any()


def test_masks_that_are_missing_or_do_not_fit_make_a_video_unusable(
    videos: Path, tmp_path: Path
) -> None:
    (seen,) = survey([find_one(videos)], 6, own_masks=True)
    assert seen.reason == "it has no masks of its own"
    write_images(tmp_path / "masks" / "a" / "b", to_images(make_frames(5)))
    source = find_one(videos, tmp_path / "masks")
    (seen,) = survey([source], 6, own_masks=True)
    assert "its masks b: there are 5 for 6 frames" in seen.reason
    with pytest.raises(UnreadableVideo, match="there are 5 for 6 frames"):
        read_masks(source, 6)


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


# Looking at them.


def test_survey_tells_in_order_what_is_usable_and_why_not(tmp_path: Path) -> None:
    for index, count in enumerate((6, 3, 9)):
        write_lossless(tmp_path / f"{index}.mkv", make_frames(count))
    (tmp_path / "3.mp4").write_bytes(b"not a video")
    write_images(tmp_path / "4", to_images(make_frames(7)))
    found = find_sources(tmp_path)
    surveyed = survey(found, 6, frame_rate=12.5)
    assert [seen.source for seen in surveyed] == found
    assert [seen.header and seen.header.frames for seen in surveyed] == [6, None, 9, None, 7]
    assert surveyed[4].header == Header(7, HEIGHT, WIDTH, Fraction(25, 2))
    assert surveyed[1].reason == "it has 3 frames, a clip has 6"
    assert "Invalid data" in surveyed[3].reason
    assert [seen.bytes for seen in surveyed[:4]] == [s.path.stat().st_size for s in found[:4]]
    assert surveyed[4].bytes == sum(file.stat().st_size for file in found[4].path.iterdir())


def test_a_listed_video_that_is_not_there_is_unusable(tmp_path: Path) -> None:
    make_davis(tmp_path)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("zebra")
    surveyed = survey(find_sources(tmp_path), 2)
    assert [bool(seen.header) for seen in surveyed] == [True, True, False]
    assert "No such file" in surveyed[2].reason


# Plans.


def make_surveyed(counts: Sequence[int | None], split: str = "train") -> list[Surveyed]:
    """Sources of so many frames; None is unusable."""
    return [
        Surveyed(
            Source(f"{split}/{index}.mp4", f"{split}_{index}", split, Path(f"{split}/{index}.mp4")),
            index,
            None if count is None else Header(count, HEIGHT, WIDTH, Fraction(25)),
            "" if count is not None else "it is no video",
        )
        for index, count in enumerate(counts)
    ]


counts_of_frames = st.lists(st.none() | st.integers(4, 80), min_size=1, max_size=12)


@settings(deadline=None)
@given(
    train=counts_of_frames,
    validation=counts_of_frames,
    stride=st.integers(1, 9),
    clip_bytes=st.integers(1, 50),
    shard_bytes=st.integers(1, 400),
)
def test_a_plan_has_every_clip_once_in_order_and_no_shard_too_large(
    train: list[int | None],
    validation: list[int | None],
    stride: int,
    clip_bytes: int,
    shard_bytes: int,
) -> None:
    length = 4
    surveyed = make_surveyed(train) + make_surveyed(validation, "validation")
    plan = plan_shards(surveyed, length, stride, clip_bytes, shard_bytes)
    clips = {
        seen.source.label: len(cut_clips(seen.header.frames, length, stride)) if seen.header else 0
        for seen in surveyed
    }
    planned = []
    for split, shards in plan.shards.items():
        for shard in shards:
            assert shard
            total = 0
            for piece in shard:
                label = piece.source.label
                assert piece.source.split == split
                follow = clips[label] - piece.first_clip
                count = follow if piece.clips is None else piece.clips
                total += count
                planned += [(label, piece.first_clip + index) for index in range(count)]
            assert total * clip_bytes <= shard_bytes or total == 1
    assert planned == [(label, clip) for label, count in clips.items() for clip in range(count)]
    listed = Counter(
        piece.source.label for shards in plan.shards.values() for s in shards for piece in s
    )
    assert listed.keys() == clips.keys()
    whole = max(1, shard_bytes // clip_bytes)
    assert all(listed[label] == max(1, -(-count // whole)) for label, count in clips.items())
    last = {p.source.label: p for shards in plan.shards.values() for s in shards for p in s}
    assert all(piece.clips is None for piece in last.values())


def test_pieces_fill_shards_and_say_what_they_are() -> None:
    surveyed = make_surveyed([8, None, 44, 4])
    plan = plan_shards(surveyed, 4, 4, clip_bytes=10, shard_bytes=59)
    assert [[str(piece) for piece in shard] for shard in plan.shards["train"]] == [
        ["train/0.mp4", "train/1.mp4"],
        ["train/2.mp4[0:5]"],
        ["train/2.mp4[5:10]"],
        ["train/2.mp4[10:]", "train/3.mp4"],
    ]


def test_a_plan_survives_its_json_and_another_place(videos: Path, tmp_path: Path) -> None:
    write_lossless(tmp_path / "masks" / "a" / "b.mkv", make_frames(6))
    write_lossless(videos / "c.mkv", make_frames(2))
    found = find_sources(videos, tmp_path / "masks")
    surveyed = survey(found, 2, own_masks=True)
    assert [bool(seen.header) for seen in surveyed] == [True, False]
    plan = plan_shards(surveyed, 2, 2, 10, 20)
    text = plan.to_json(videos, tmp_path / "masks")
    assert Plan.from_json(text, videos, tmp_path / "masks") == plan
    assert str(tmp_path) not in text
    moved = Plan.from_json(json.dumps(json.loads(text)), tmp_path / "new", Path("m"))
    assert moved.surveyed["a/b.mkv"].source.path == tmp_path / "new" / "a" / "b.mkv"
    assert moved.surveyed["a/b.mkv"].source.masks == Path("m/a/b.mkv")


def test_a_plan_of_annotated_frames_survives_its_json(tmp_path: Path) -> None:
    make_davis(tmp_path)
    plan = plan_shards(survey(find_sources(tmp_path), 2), 2, 2, 1, 1)
    assert Plan.from_json(plan.to_json(tmp_path, None), tmp_path, None) == plan


def test_a_plan_tells_what_changed_in_the_folder(videos: Path, tmp_path: Path) -> None:
    write_images(videos / "frames", to_images(make_frames(3)))
    for name in ("c.mkv", "d.mkv"):
        write_lossless(videos / name, make_frames(2))
    plan = plan_shards(survey(find_sources(videos), 2), 2, 2, 10, 20)
    assert plan.differs(find_sources(videos)) == ""
    (videos / "d.mkv").rename(videos / "e.mkv")
    assert plan.differs(find_sources(videos)) == (
        "1 added (the first is e.mkv), 1 removed (the first is d.mkv)"
    )
    (videos / "e.mkv").rename(videos / "d.mkv")
    (videos / "frames" / "00002.png").unlink()
    with (videos / "c.mkv").open("ab") as file:
        file.write(b"more")
    assert plan.differs(find_sources(videos)) == "2 of another size (the first is c.mkv)"


# Reading.


@settings(deadline=None, max_examples=50)
@given(
    count=st.integers(5, 40),
    length=st.integers(1, 5),
    stride=st.integers(1, 9),
    most=st.integers(1, 4),
)
def test_the_pieces_of_a_plan_are_slices_of_the_video(
    tmp_path_factory: pytest.TempPathFactory, count: int, length: int, stride: int, most: int
) -> None:
    root = tmp_path_factory.getbasetemp() / f"pieces-{count}"
    frames, holes = make_frames(count), make_holes(count)
    if not root.exists():
        write_lossless(root / "videos" / "a.mkv", frames)
        write_images(root / "masks" / "a", to_images(holes * 255))
    found = find_sources(root / "videos", root / "masks")
    plan = plan_shards(survey(found, length), length, stride, 1, most)
    firsts = []
    for shard in plan.shards["train"]:
        for clip in read_clips(shard[0], length, stride, own_masks=True):
            firsts.append(clip.first)
            np.testing.assert_array_equal(clip.frames, frames[clip.first : clip.first + length])
            np.testing.assert_array_equal(clip.mask, holes[clip.first : clip.first + length])
    assert firsts == list(cut_clips(count, length, stride))


def test_a_late_piece_of_a_compressed_video_is_the_same_to_the_bit(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", make_frames(40), 25.0)
    source = find_one(tmp_path)
    whole = list(read_clips(Piece(source), 4, 6, FrameSize(12, 10)))
    late = list(read_clips(Piece(source, 3, 2), 4, 6, FrameSize(12, 10)))
    assert [clip.first for clip in late] == [18, 24]
    for clip, same in zip(late, whole[3:5], strict=True):
        np.testing.assert_array_equal(clip.frames, same.frames)
        assert clip.mask is None


def test_a_piece_that_its_video_does_not_fill_says_so(tmp_path: Path) -> None:
    write_lossless(tmp_path / "a.mkv", make_frames(10))
    source = find_one(tmp_path)
    for piece, clips in ((Piece(source, 0, 4), 3), (Piece(source, 3), 0)):
        read = []
        with pytest.raises(UnreadableVideo, match="it ends before frame 12"):
            for clip in read_clips(piece, 3, 3):
                read.append(clip)
        assert len(read) == clips


@pytest.mark.skipif(not COLLISIONS.is_dir(), reason="no collisions in ../shared")
def test_the_collisions_are_planned_whole() -> None:
    found = find_sources(COLLISIONS)
    assert {split: len(listed) for split, listed in labels(found).items()} == {
        "train": 900,
        "validation": 100,
    }
    part = found[:8] + found[-8:]
    surveyed = survey(part, 20)
    assert {seen.header for seen in surveyed} == {Header(24, 128, 128, Fraction(25, 2))}
    plan = plan_shards(surveyed, 20, 20, 1, 3)
    assert [len(shard) for shard in plan.shards["train"]] == [3, 3, 2]
    (clip,) = read_clips(plan.shards["validation"][2][1], 20, 20)
    assert clip.frames.shape == (20, 128, 128, 3)
