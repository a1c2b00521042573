from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vidfill.data.encode.plan import (
    ClipRange,
    ShardId,
    ShardPlan,
    SurveyedVideo,
    plan_shards,
    survey,
)
from vidfill.data.encode.sources import Source, find_sources
from vidfill.data.encode.stages import read_clips
from vidfill.data.videos import (
    FrameSize,
    Header,
    UnreadableVideo,
    cut_clips,
    read_header,
    write_video,
)
from vidfill.files import Fingerprint

COLLISIONS = Path(__file__).parents[4] / "shared" / "videos" / "collisions"
HEIGHT, WIDTH = 16, 24

Write = Callable[..., Path]


def make_frames(count: int) -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 256, (count, 2, 3, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


def make_masks(count: int) -> np.ndarray:
    """A column of the hole that moves on by a pixel a frame."""
    columns = np.arange(count) % WIDTH
    return np.stack([np.eye(WIDTH, dtype=np.uint8)[[column] * HEIGHT] for column in columns])


# Looking at them.


def test_survey_tells_in_order_what_is_usable_and_why_not(
    tmp_path: Path, write_images: Write, write_lossless: Write
) -> None:
    for index, count in enumerate((6, 3, 9)):
        write_lossless(tmp_path / f"{index}.mkv", make_frames(count))
    (tmp_path / "3.mp4").write_bytes(b"not a video")
    write_images(tmp_path / "4", make_frames(7))
    found = find_sources(tmp_path)
    surveyed = survey(found, 6, frame_rate=12.5)
    assert [seen.source for seen in surveyed] == found
    assert [seen.header and seen.header.frames for seen in surveyed] == [6, None, 9, None, 7]
    assert surveyed[4].header == Header(7, HEIGHT, WIDTH, Fraction(25, 2))
    assert surveyed[1].reason == "it has 3 frames, a clip has 6"
    assert "Invalid data" in surveyed[3].reason
    assert [video.seen.bytes for video in surveyed[:4]] == [
        s.path.stat().st_size for s in found[:4]
    ]
    assert surveyed[4].seen.bytes == sum(file.stat().st_size for file in found[4].path.iterdir())


def test_masks_that_are_missing_or_do_not_fit_make_a_video_unusable(
    tmp_path: Path, write_images: Write, write_lossless: Write
) -> None:
    for name in ("a", "b"):
        write_lossless(tmp_path / "videos" / f"{name}.mkv", make_frames(6))
    write_images(tmp_path / "masks" / "b", make_frames(5))
    found = find_sources(tmp_path / "videos", tmp_path / "masks")
    missing, short = survey(found, 6, own_masks=True)
    assert missing.reason == "it has no masks of its own"
    assert "its masks b: there are 5 for 6 frames" in short.reason


def test_a_video_that_is_not_there_is_unusable(tmp_path: Path) -> None:
    (seen,) = survey([Source("a.mp4", "a", "train", tmp_path / "a.mp4")], 2)
    assert "No such file" in seen.reason


# Plans.


def make_surveyed(counts: Sequence[int | None], split: str = "train") -> list[SurveyedVideo]:
    """Sources of so many frames; None is unusable."""
    return [
        SurveyedVideo(
            Source(f"{split}/{index}.mp4", f"{split}_{index}", split, Path(f"{split}/{index}.mp4")),
            Fingerprint(index, str(index), "a"),
            None if count is None else Header(count, HEIGHT, WIDTH, Fraction(25)),
            "" if count is not None else "it is no video",
        )
        for index, count in enumerate(counts)
    ]


counts_of_frames = st.lists(st.none() | st.integers(4, 80), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
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
    bounds = dict.fromkeys(("train", "validation"), clip_bytes)
    plan = plan_shards(surveyed, length, stride, bounds, shard_bytes)
    clips = {
        seen.source.label: len(cut_clips(seen.header.frames, length, stride)) if seen.header else 0
        for seen in surveyed
    }
    planned = []
    for shard, parts in plan.shards.items():
        assert parts
        assert all(part.source.split == shard.split for part in parts)
        assert (
            plan.count_clips([shard]) * clip_bytes <= shard_bytes or plan.count_clips([shard]) == 1
        )
        planned += [
            (part.source.label, part.first_clip + index)
            for part in parts
            for index in range(plan.count_range(part))
        ]
    assert planned == [(label, clip) for label, count in clips.items() for clip in range(count)]
    labels = [part.source.label for parts in plan.shards.values() for part in parts]
    most = max(1, shard_bytes // clip_bytes)
    assert Counter(labels) == {label: max(1, -(-count // most)) for label, count in clips.items()}
    last = {part.source.label: part for parts in plan.shards.values() for part in parts}
    assert all(part.clips is None for part in last.values())


def test_ranges_fill_shards_and_say_what_they_are() -> None:
    plan = plan_shards(make_surveyed([8, None, 44, 4]), 4, 4, {"train": 10}, shard_bytes=59)
    assert [plan.names(shard) for shard in plan.shards] == [
        ("train/0.mp4", "train/1.mp4"),
        ("train/2.mp4[0:5]",),
        ("train/2.mp4[5:10]",),
        ("train/2.mp4[10:]", "train/3.mp4"),
    ]


def test_a_plan_survives_its_json_and_another_place(
    tmp_path: Path, write_images: Write, write_lossless: Write
) -> None:
    videos, masks = tmp_path / "videos", tmp_path / "masks"
    write_lossless(videos / "a" / "b.mkv", make_frames(6))
    write_lossless(videos / "c.mkv", make_frames(2))
    write_lossless(masks / "a" / "b.mkv", make_frames(6))
    surveyed = survey(find_sources(videos, masks), 2, own_masks=True)
    assert [bool(seen.header) for seen in surveyed] == [True, False]
    plan = plan_shards(surveyed, 2, 2, {"train": 10}, 20)
    text = plan.to_json(videos, masks)
    assert ShardPlan.from_json(text, videos, masks, 2, 2) == plan
    assert str(tmp_path) not in text
    moved = ShardPlan.from_json(text, tmp_path / "new", Path("m"), 2, 2)
    assert moved.videos["a/b.mkv"].source.path == tmp_path / "new" / "a" / "b.mkv"
    assert moved.videos["a/b.mkv"].source.masks == Path("m/a/b.mkv")


def test_a_plan_of_annotated_frames_survives_its_json(tmp_path: Path, write_images: Write) -> None:
    for kind in ("JPEGImages", "Annotations"):
        write_images(tmp_path / "train" / kind / "a", make_frames(3))
    surveyed = survey(find_sources(tmp_path), 2)
    assert surveyed[0].source.annotated
    plan = plan_shards(surveyed, 2, 2, {"train": 1}, 1)
    assert ShardPlan.from_json(plan.to_json(tmp_path, None), tmp_path, None, 2, 2) == plan


def test_a_plan_of_an_earlier_version_is_read() -> None:
    text = """{"sources": [["a.mp4", "a", "train", null, false, 9, [8, 16, 24, "25"], ""],
        ["b.mp4", "b", "train", "b.png", false, 7, null, "it is no video"]],
        "shards": {"train": [[[0, 0, 1]], [[0, 1, null], [1, 0, null]]]}}"""
    plan = ShardPlan.from_json(text, Path("v"), Path("m"), 4, 4)
    assert [plan.names(shard) for shard in plan.shards] == [("a.mp4[0:1]",), ("a.mp4[1:]", "b.mp4")]
    assert plan.videos["a.mp4"].header == Header(8, 16, 24, Fraction(25))
    assert plan.videos["b.mp4"].source.masks == Path("m/b.png")
    tree = json.loads(text)
    for row, size in zip(tree["sources"], (9, 7), strict=True):
        row[5] = [size, "", ""]  # only the size was recorded, and only that is compared
    assert json.loads(plan.to_json(Path("v"), Path("m"))) == tree


def test_a_plan_tells_what_changed_in_the_folder(
    tmp_path: Path, write_images: Write, write_lossless: Write
) -> None:
    write_images(tmp_path / "frames", make_frames(3))
    for name in ("c.mkv", "d.mkv"):
        write_lossless(tmp_path / name, make_frames(2))
    plan = plan_shards(survey(find_sources(tmp_path), 2), 2, 2, {"train": 10}, 20)
    assert plan.differs(find_sources(tmp_path)) == ""
    (tmp_path / "d.mkv").rename(tmp_path / "e.mkv")
    assert plan.differs(find_sources(tmp_path)) == (
        "1 added (the first is e.mkv), 1 removed (the first is d.mkv)"
    )
    (tmp_path / "e.mkv").rename(tmp_path / "d.mkv")
    (tmp_path / "frames" / "00002.png").unlink()
    with (tmp_path / "c.mkv").open("ab") as file:
        file.write(b"more")
    assert plan.differs(find_sources(tmp_path)) == "2 written anew (the first is c.mkv)"


# Reading.


@settings(deadline=None, max_examples=12)
@given(
    count=st.integers(5, 25),
    length=st.integers(1, 5),
    stride=st.integers(1, 9),
    most=st.integers(1, 4),
)
def test_the_ranges_of_a_plan_are_slices_of_the_video(
    tmp_path_factory: pytest.TempPathFactory,
    write_images: Write,
    write_lossless: Write,
    count: int,
    length: int,
    stride: int,
    most: int,
) -> None:
    root = tmp_path_factory.getbasetemp() / f"ranges-{count}"
    frames, masks = make_frames(count), make_masks(count)
    if not root.exists():
        write_lossless(root / "videos" / "a.mkv", frames)
        write_images(root / "masks" / "a", masks * 255)
    found = find_sources(root / "videos", root / "masks")
    plan = plan_shards(survey(found, length), length, stride, {"train": 1}, most)
    firsts = []
    for (part,) in plan.shards.values():
        for clip in read_clips(part, length, stride, own_masks=read_header(part.source.path)):
            firsts.append(clip.first)
            np.testing.assert_array_equal(clip.frames, frames[clip.first : clip.first + length])
            np.testing.assert_array_equal(clip.mask, masks[clip.first : clip.first + length])
    assert firsts == list(cut_clips(count, length, stride))


@pytest.mark.parametrize("fit", ["crop", "resize"])
@pytest.mark.parametrize("size", ["16", "8", "48x32", "20x60"])
def test_a_mask_is_cropped_and_resized_as_its_frame_is(
    tmp_path: Path, write_images: Write, write_lossless: Write, fit: str, size: str
) -> None:
    masks = make_masks(4)
    masks[:, :8] = 1
    write_lossless(tmp_path / "videos" / "a.mkv", np.stack([masks * 255] * 3, axis=-1))
    write_images(tmp_path / "masks" / "a", masks * 255)
    (source,) = find_sources(tmp_path / "videos", tmp_path / "masks")
    given_size = FrameSize.parse(size)
    header = read_header(source.path)
    (clip,) = read_clips(ClipRange(source), 4, 4, given_size, fit, own_masks=header)
    assert given_size and clip.mask is not None
    assert clip.mask.shape == (4, given_size.height, given_size.width)
    assert set(np.unique(clip.mask)) == {0, 1}
    differ = clip.mask != (clip.frames[..., 0] > 127)
    # The columns are a pixel wide: what is left of one depends on the interpolation.
    assert differ.mean() < 0.12
    assert not differ[:, : given_size.height // 2 - 1].any()


def test_a_late_range_of_a_compressed_video_is_the_same_to_the_bit(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", make_frames(40), 25.0)
    source = find_sources(tmp_path)[0]
    whole = list(read_clips(ClipRange(source), 4, 6, FrameSize(12, 10)))
    late = list(read_clips(ClipRange(source, 3, 2), 4, 6, FrameSize(12, 10)))
    assert [clip.first for clip in late] == [18, 24]
    for clip, same in zip(late, whole[3:5], strict=True):
        np.testing.assert_array_equal(clip.frames, same.frames)
        assert clip.mask is None


def test_a_range_that_its_video_does_not_fill_says_so(
    tmp_path: Path, write_lossless: Write
) -> None:
    write_lossless(tmp_path / "a.mkv", make_frames(10))
    source = find_sources(tmp_path)[0]
    read = []
    with pytest.raises(UnreadableVideo, match="it ends before frame 12"):
        for clip in read_clips(ClipRange(source, 0, 4), 3, 3):
            read.append(clip)
    assert len(read) == 3
    with pytest.raises(UnreadableVideo, match="it ends before frame 11"):
        list(read_clips(ClipRange(source), 11, 11))


def test_a_last_range_has_the_clips_that_there_are(tmp_path: Path, write_lossless: Write) -> None:
    write_lossless(tmp_path / "a.mkv", make_frames(10))
    source = find_sources(tmp_path)[0]
    assert len(list(read_clips(ClipRange(source, 2), 3, 3))) == 1
    assert not list(read_clips(ClipRange(source, 3), 3, 3))  # its header said more


@pytest.mark.skipif(not COLLISIONS.is_dir(), reason="no collisions in ../shared")
def test_the_collisions_are_planned_whole() -> None:
    found = find_sources(COLLISIONS)
    assert Counter(source.split for source in found) == {"train": 900, "validation": 100}
    surveyed = survey(found[:8] + found[-8:], 20)
    assert {seen.header for seen in surveyed} == {Header(24, 128, 128, Fraction(25, 2))}
    plan = plan_shards(surveyed, 20, 20, {"train": 1, "validation": 1}, 3)
    assert [len(parts) for parts in plan.shards.values()] == [3, 3, 2] * 2
    (clip,) = read_clips(plan.shards[ShardId("validation", 2)][1], 20, 20)
    assert clip.frames.shape == (20, 128, 128, 3)
