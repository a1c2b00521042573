from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from vidfill.data import videos
from vidfill.data.encode.plan import Piece
from vidfill.data.encode.run import PLAN, _load, _read_plan, encode, main
from vidfill.data.encode.settings import EncodeConfig, _check
from vidfill.data.masks import FAMILIES, fill_hole
from vidfill.data.shards.format import Example, ShardTable
from vidfill.data.shards.reading import ShardedDataset
from vidfill.data.shards.writing import read_index
from vidfill.data.videos import FrameSize
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import Autoencoder, to_pixels

FRAMES, SIDE = 4, 32
SHARD = 0.03  # megabytes: two clips of that size, without pixels


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random autoencoder of downsampling 8."""
    torch.manual_seed(0)
    network = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    folder = tmp_path_factory.mktemp("autoencoder")
    network.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def variational(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random AutoencoderKL of downsampling 4."""
    torch.manual_seed(0)
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    folder = tmp_path_factory.mktemp("variational")
    network.save_pretrained(folder)
    return str(folder)


def draw_video(seed: int, frames: int = FRAMES, side: int = SIDE) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, 256, (frames, 4, 4, 3), dtype=np.uint8)
    return blocks.repeat(side // 4, axis=1).repeat(side // 4, axis=2)


def write_video(path: Path, seed: int, frames: int = FRAMES, side: int = SIDE) -> None:
    videos.write_video(path, draw_video(seed, frames, side), 12.5)


def write_images(folder: Path, frames: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for number, pixels in enumerate(frames):
        Image.fromarray(pixels).save(folder / f"{number:05}.png")


def damage(path: Path) -> None:
    """Spoil a video's data but not its header."""
    content = bytearray(path.read_bytes())
    first, last = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[first + (last - first) // 2 : last] = bytes(last - first - (last - first) // 2)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five training and two validation videos; the second has two clips."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(5):
        write_video(root / "train" / f"v{number}.mp4", number, FRAMES * 2 if number == 1 else 5)
    for number in range(5, 7):
        write_video(root / "val" / f"v{number}.mp4", number)
    return root


@pytest.fixture
def configure(autoencoder: str, tmp_path: Path) -> Callable[..., EncodeConfig]:
    def make(videos: Path, **changes: object) -> EncodeConfig:
        plain = EncodeConfig(
            videos,
            tmp_path / "out",
            autoencoder,
            frames=FRAMES,
            shard_megabytes=SHARD,
            pixels="none",
            device="cpu",
        )
        return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]

    return make


Configure = Callable[..., EncodeConfig]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The videos, to be spoilt."""
    return Path(shutil.copytree(folder, tmp_path / "videos"))


def read_bytes(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def read_all(out: Path, split: str = "train") -> list[Example]:
    dataset = ShardedDataset(out, split)
    return [dataset[row] for row in range(len(dataset))]


# What an example is


def test_every_clip_is_there_once_under_each_of_its_masks(
    folder: Path, configure: Configure
) -> None:
    config = configure(folder, masks="stationary variable", masks_per_clip=2)
    encode(config)
    train = ShardedDataset(config.out, "train")
    assert sorted(train.keys) == [
        f"v{number}_{first:05}_{family}"
        for number in range(5)
        for first in ([0, FRAMES] if number == 1 else [0])
        for family in ("stationary", "variable")
    ]
    assert train.manifest.latent_shape == (FRAMES, 4, 4, 4)
    assert train.manifest.masks == {
        "families": {"stationary": 1.0, "variable": 1.0},
        "per_clip": 2,
        "seed": 0,
    }
    assert len(ShardedDataset(config.out, "validation")) == 4


def test_masks_of_one_family_on_one_clip_differ_and_are_numbered(
    folder: Path, configure: Configure
) -> None:
    config = configure(folder / "val", masks="strokes", masks_per_clip=3, shard_megabytes=1.0)
    encode(config)
    first, second, third = read_all(config.out)[:3]
    assert [first.key, second.key, third.key] == [
        f"v5_00000_strokes{suffix}" for suffix in ("", "-2", "-3")
    ]
    np.testing.assert_array_equal(first.latents, third.latents)
    for one, other in ((first, second), (second, third), (first, third)):
        assert not np.array_equal(one.mask, other.mask)


def test_an_example_is_the_clip_and_its_masked_clip_encoded(
    folder: Path, configure: Configure, autoencoder: str
) -> None:
    config = configure(folder, masks="variable", pixels="all", shard_megabytes=1.0)
    encode(config)
    network = AutoencoderTiny.from_pretrained(autoencoder)
    for split in ("train", "validation"):
        for example in read_all(config.out, split):
            frames, fps = videos.read_video(folder / example.record["source"])
            first = example.record["first_frame"]
            clip = frames[first : first + FRAMES]
            np.testing.assert_array_equal(example.pixels, clip)
            colour = tuple(example.record["fill"])
            for latents, pixels in (
                (example.latents, clip),
                (example.masked_latents, fill_hole(clip, example.mask, colour)),
            ):
                with torch.no_grad():
                    expected = network.encode(to_pixels(pixels)).latents.numpy()
                np.testing.assert_allclose(latents, expected, atol=2e-3)
            assert example.record["split"] == split
            assert example.record["family"] == "variable"
            assert example.record["fps"] == float(fps)


def test_the_manifest_has_the_moments_of_the_latents(folder: Path, configure: Configure) -> None:
    config = configure(folder)
    encode(config)
    latents = np.stack([e.latents for e in read_all(config.out)]).astype(np.float64)
    manifest = ShardedDataset(config.out, "train").manifest
    np.testing.assert_allclose(manifest.latents_mean, latents.mean(axis=(0, 1, 3, 4)), rtol=1e-9)
    np.testing.assert_allclose(manifest.latents_std, latents.std(axis=(0, 1, 3, 4)), rtol=1e-9)


@pytest.mark.parametrize("fill", ["median", "10,20,30"])
def test_what_lies_in_the_hole_does_not_reach_the_masked_latents(
    configure: Configure, tmp_path: Path, fill: str
) -> None:
    clip = draw_video(0)
    write_images(tmp_path / "a" / "clip", clip)
    config = configure(tmp_path / "a", fill=fill, out=tmp_path / "out_a")
    encode(config)
    (example,) = read_all(config.out)
    write_images(tmp_path / "b" / "clip", np.where(example.mask[..., None] == 1, 255 - clip, clip))
    other = configure(tmp_path / "b", fill=fill, out=tmp_path / "out_b")
    encode(other)
    (another,) = read_all(other.out)
    np.testing.assert_array_equal(example.masked_latents, another.masked_latents)
    assert not np.array_equal(example.latents, another.latents)


def test_moments_are_the_posteriors_of_the_clip(
    folder: Path, configure: Configure, variational: str
) -> None:
    config = configure(
        folder / "val",
        autoencoder=variational,
        posterior="moments",
        pixels="all",
        shard_megabytes=1.0,
    )
    encode(config)
    network = AutoencoderKL.from_pretrained(variational)
    for example in read_all(config.out):
        with torch.no_grad():
            posterior = network.encode(to_pixels(example.pixels)).latent_dist
        np.testing.assert_allclose(example.latents, posterior.mean * 0.5, atol=2e-3)
        assert example.log_variance is not None
        np.testing.assert_allclose(
            np.exp(example.log_variance.astype(np.float32)), posterior.var * 0.25, rtol=5e-3
        )
    manifest = ShardedDataset(config.out, "train").manifest
    assert (manifest.posterior, manifest.latent_shape) == ("moments", (FRAMES, 4, 8, 8))


def test_an_autoencoder_without_a_posterior_has_no_moments(
    folder: Path, configure: Configure
) -> None:
    config = configure(folder, posterior="moments")
    with pytest.raises(BadInput, match="has no posterior"):
        encode(config)
    assert not config.out.exists()


def test_pixels_are_kept_for_held_out_splits_unless_told_otherwise(
    folder: Path, configure: Configure, tmp_path: Path
) -> None:
    for pixels, kept in (
        ("held_out", [False, True]),
        ("all", [True, True]),
        ("none", [False, False]),
    ):
        config = configure(folder, pixels=pixels, shard_megabytes=1.0, out=tmp_path / pixels)
        encode(config)
        for split, keeps in zip(("train", "validation"), kept, strict=True):
            dataset = ShardedDataset(config.out, split)
            assert (dataset[0].pixels is not None, dataset.manifest.pixels) == (keeps, keeps)


@pytest.mark.parametrize(("fit", "size"), [("crop", "16x24"), ("resize", "24x16"), ("crop", "16")])
def test_frames_get_the_size_that_was_asked_for(
    folder: Path, configure: Configure, fit: str, size: str
) -> None:
    config = configure(folder / "val", size=size, fit=fit, pixels="all", shard_megabytes=1.0)
    encode(config)
    wanted = FrameSize.parse(size)
    for example in read_all(config.out):
        frames, _ = videos.read_video(folder / "val" / example.record["source"], wanted, fit)
        np.testing.assert_array_equal(example.pixels, frames[:FRAMES])
    shape = ShardedDataset(config.out, "train").manifest.latent_shape
    assert wanted and shape == (FRAMES, 4, wanted.height // 8, wanted.width // 8)


def test_clips_begin_every_stride_frames(configure: Configure, tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "a.mp4", 0, frames=11)
    config = configure(tmp_path / "videos", stride=3)
    encode(config)
    firsts = [example.record["first_frame"] for example in read_all(config.out)]
    assert firsts == [0, 3, 6]


# Masks


def test_the_other_splits_can_have_a_family_that_training_never_sees(
    folder: Path, configure: Configure
) -> None:
    config = configure(
        folder,
        masks="stationary box:3",
        held_out_masks="border",
        masks_per_clip=4,
        shard_megabytes=1.0,
    )
    encode(config)
    families = {
        split: {example.record["family"] for example in read_all(config.out, split)}
        for split in ("train", "validation")
    }
    assert families == {"train": {"stationary", "box"}, "validation": {"border"}}
    manifest = ShardedDataset(config.out, "validation").manifest
    assert manifest.masks["families"] == {"border": 1.0}


def test_every_family_can_be_encoded(folder: Path, configure: Configure) -> None:
    config = configure(
        folder / "val", masks=" ".join(FAMILIES), masks_per_clip=len(FAMILIES), shard_megabytes=1.0
    )
    encode(config)
    families = [example.record["family"] for example in read_all(config.out)]
    assert sorted(families) == sorted([*FAMILIES] * 2)


def write_davis(root: Path) -> None:
    """Three sequences with annotations, one without."""
    for name in ("bear", "bus", "cat", "dog"):
        write_images(root / "JPEGImages" / "480p" / name, draw_video(len(name)))
    for name in ("bear", "bus", "cat"):
        hole = np.zeros((FRAMES, SIDE, SIDE), dtype=np.uint8)
        hole[:, 8:16, 8 : 16 + len(name)] = 38
        write_images(root / "Annotations" / "480p" / name, hole)
    lists = root / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("bear\nbus\ndog\n")
    (lists / "val.txt").write_text("cat\n")


def test_a_users_own_masks_are_the_holes(configure: Configure, tmp_path: Path) -> None:
    write_davis(tmp_path / "davis")
    config = configure(tmp_path / "davis", masks="own", max_skipped=1)
    encode(config)
    (bear, bus), (cat,) = read_all(config.out), read_all(config.out, "validation")
    assert [e.key for e in (bear, bus, cat)] == [f"{n}_00000_own" for n in ("bear", "bus", "cat")]
    for example, width in ((bear, 12), (bus, 11), (cat, 11)):
        expected = np.zeros((FRAMES, SIDE, SIDE), dtype=np.uint8)
        expected[:, 8:16, 8 : 8 + width] = 1
        np.testing.assert_array_equal(example.mask, expected)
    (skip,) = (config.out / "train" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skip) == {
        "source": "JPEGImages/480p/dog",
        "reason": "it has no masks of its own",
    }


def test_own_masks_are_not_asked_for_where_the_mix_has_none(
    configure: Configure, tmp_path: Path
) -> None:
    write_davis(tmp_path / "davis")
    config = configure(tmp_path / "davis", masks="box", held_out_masks="own")
    encode(config)
    assert len(ShardedDataset(config.out, "train")) == 3
    assert ShardedDataset(config.out, "validation").keys == ["cat_00000_own"]


def test_a_mask_that_leaves_no_colour_spoils_its_video_alone(
    configure: Configure, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        write_video(tmp_path / "videos" / f"{name}.mp4", 0)
    (tmp_path / "masks").mkdir()
    white = Image.new("L", (SIDE, SIDE), 255)
    white.save(tmp_path / "masks" / "a.png")
    white.paste(0, (0, 0, 9, 9))
    white.save(tmp_path / "masks" / "b.png")
    config = configure(
        tmp_path / "videos", masks="own", mask_files=tmp_path / "masks", max_skipped=1
    )
    encode(config)
    assert ShardedDataset(config.out, "train").keys == ["b_00000_own"]
    (skip,) = (config.out / "train" / "skipped.jsonl").read_text().splitlines()
    assert "leaves no colour" in skip
    coloured = dataclasses.replace(config, fill="0,0,0", out=tmp_path / "coloured")
    encode(coloured)
    assert len(ShardedDataset(coloured.out, "train")) == 2


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Frames of each call of the autoencoder."""
    seen: list[int] = []
    encode_frames = Autoencoder.encode

    def count(self: Autoencoder, pixels: torch.Tensor, per_call: int | None = None) -> torch.Tensor:
        seen.append(pixels.shape[0] * pixels.shape[1])
        assert seen[-1] == per_call
        return encode_frames(self, pixels, per_call)

    monkeypatch.setattr(Autoencoder, "encode", count)
    return seen


def test_frames_that_are_equal_are_encoded_once(
    folder: Path, configure: Configure, batches: list[int]
) -> None:
    config = configure(folder / "val", masks="prediction infilling", masks_per_clip=2)
    encode(config)
    # The clip's own, and one that is all hole, for each mask has the same colour or another.
    assert all(FRAMES < frames <= FRAMES + 2 for frames in batches)
    for example in read_all(config.out):
        visible = ~example.mask.any(axis=(1, 2))
        assert 0 < visible.sum() < FRAMES
        np.testing.assert_array_equal(example.latents[visible], example.masked_latents[visible])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_batches_are_full_but_for_a_shards_last_and_change_no_value(
    folder: Path, configure: Configure, batches: list[int], tmp_path: Path, batch_size: int
) -> None:
    config = configure(folder, batch_size=batch_size, shard_megabytes=1.0)
    encode(config)
    plan = json.loads((config.out / PLAN).read_text())["shards"]
    assert [len(listed) for listed in plan.values()] == [1, 1]
    frames = [6 * 2 * FRAMES, 2 * 2 * FRAMES]
    assert batches == [
        size
        for all_frames in frames
        for size in [batch_size] * (all_frames // batch_size) + [all_frames % batch_size]
        if size
    ]
    batches.clear()
    whole = dataclasses.replace(config, batch_size=1000, out=tmp_path / "whole")
    encode(whole)
    assert batches == frames
    for one, other in zip(read_all(config.out), read_all(whole.out), strict=True):
        assert one.key == other.key
        np.testing.assert_allclose(one.latents, other.latents, atol=2e-3)
        np.testing.assert_allclose(one.masked_latents, other.masked_latents, atol=2e-3)


# Shards


@pytest.mark.parametrize("megabytes", [0.05, 0.2])
@pytest.mark.parametrize("pixels", ["none", "all"])
def test_no_shard_exceeds_its_maximum(
    configure: Configure, tmp_path: Path, megabytes: float, pixels: str
) -> None:
    for number in range(8):
        write_video(tmp_path / "videos" / f"{'é' * number}{number}.mp4", number, frames=13)
    config = configure(
        tmp_path / "videos",
        shard_megabytes=megabytes,
        pixels=pixels,
        masks="variable strokes",
        masks_per_clip=1,
    )
    encode(config)
    table = ShardedDataset(config.out, "train").manifest.shards
    assert len(table.bytes) > 1
    assert max(table.bytes) <= megabytes * 1e6
    # Nor are shards much smaller than they may be.
    assert max(table.bytes) > 0.4 * (megabytes * 1e6 - 10_240)


def test_a_shard_that_cannot_hold_a_clip_is_refused_with_what_could(
    folder: Path, configure: Configure
) -> None:
    config = configure(folder, shard_megabytes=0.01)
    with pytest.raises(BadInput, match=r"give --shard_megabytes 0\.\d"):
        encode(config)
    assert not config.out.exists()


def test_a_shards_bytes_depend_on_no_other_shard(folder: Path, configure: Configure) -> None:
    config = configure(folder, masks="stationary variable", masks_per_clip=2, batch_size=10)
    encode(config)
    whole = read_bytes(config.out)
    tars = [name for name in whole if name.endswith(".tar")]
    assert len(tars) > 4
    for kept in tars:
        for name in whole:
            if "shard-" in name and not name.startswith(kept.removesuffix(".tar")):
                (config.out / name).unlink()
        encode(config)
        assert read_bytes(config.out) == whole


def test_a_resumed_job_writes_what_an_uninterrupted_one_does(
    folder: Path, configure: Configure
) -> None:
    config = configure(folder)
    encode(config)
    whole = read_bytes(config.out)
    for lost in ("train/manifest.json", "train/shard-000001.tar", "validation/shard-000000.tar"):
        (config.out / lost).unlink()
    for damaged in ("train/shard-000002.tar", "validation/shard-000000.index.json"):
        content = (config.out / damaged).read_bytes()
        (config.out / damaged).write_bytes(content[: len(content) // 2])
    for suffix in (".tar", ".index.json"):  # whole, but another shard
        shutil.copy(
            config.out / "train" / f"shard-000000{suffix}",
            config.out / "train" / f"shard-000003{suffix}",
        )
    kept = config.out / "train" / "shard-000000.tar"
    before = kept.stat().st_mtime_ns
    timings = encode(config)
    assert read_bytes(config.out) == whole
    assert kept.stat().st_mtime_ns == before
    assert timings is not None
    assert timings.clips == sum(
        len(read_index(config.out / split, number).keys)  # type: ignore[union-attr]
        for split, number in (("train", 1), ("train", 2), ("train", 3), ("validation", 0))
    )


def test_the_manifest_tells_of_every_shard(folder: Path, configure: Configure) -> None:
    config = configure(folder)
    encode(config)
    manifest = ShardedDataset(config.out, "train").manifest
    indexes = [read_index(config.out / "train", n) for n in range(len(manifest.shards.bytes))]
    assert manifest.shards == ShardTable.of(indexes)  # type: ignore[arg-type]
    assert manifest.examples == 6


def test_memory_does_not_grow_with_a_videos_length(configure: Configure, tmp_path: Path) -> None:
    peaks = []
    for frames in (200, 1400):
        write_video(tmp_path / f"videos{frames}" / "a.mp4", 0, frames)
        config = configure(
            tmp_path / f"videos{frames}",
            stride=50,
            shard_megabytes=1.0,
            out=tmp_path / f"o{frames}",
        )
        tracemalloc.start()
        encode(config)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(ShardedDataset(config.out, "train")) == len(range(0, frames - 3, 50))
    longer = (1400 - 200) * SIDE * SIDE * 3  # bytes of pixels
    assert peaks[1] - peaks[0] < longer / 5


# What cannot be used


def test_an_unusable_video_ends_the_job_before_anything_is_written(
    copy: Path, configure: Configure
) -> None:
    (copy / "train" / "v3.mp4").write_bytes(b"no video")
    write_video(copy / "train" / "v4.mp4", 0, frames=FRAMES - 1)
    config = configure(copy)
    with pytest.raises(BadInput, match=r"v3\.mp4: .*2 unusable"):
        encode(config)
    assert not config.out.exists()


def test_videos_that_may_be_skipped_are_counted_and_listed(
    copy: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "train" / "v3.mp4").write_bytes(b"no video")
    write_video(copy / "train" / "v4.mp4", 0, frames=FRAMES - 1)
    config = configure(copy, max_skipped=2)
    encode(config)
    listed = (config.out / "train" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in listed] == ["train/v3.mp4", "train/v4.mp4"]
    assert "it has 3 frames, a clip has 4" in listed[1]
    assert (config.out / "validation" / "skipped.jsonl").read_text() == ""
    manifest = ShardedDataset(config.out, "train").manifest
    assert (manifest.skipped, manifest.examples) == (2, 4)
    assert "2 video(s) gave no clip" in capsys.readouterr().err


def test_a_video_damaged_inside_gives_no_clip_and_raising_the_limit_goes_on(
    copy: Path, configure: Configure
) -> None:
    write_video(copy / "train" / "v3.mp4", 3, frames=40)
    damage(copy / "train" / "v3.mp4")
    config = configure(copy, shard_megabytes=0.3)
    with pytest.raises(BadInput, match=r"v3\.mp4: .*--max_skipped 1"):
        encode(config)
    before = read_bytes(config.out)
    assert not [name for name in before if "manifest" in name or "partial" in name]
    resumed = dataclasses.replace(config, max_skipped=1)
    encode(resumed)
    assert json.loads((config.out / "job.json").read_text())["config"]["max_skipped"] == 1
    train = ShardedDataset(config.out, "train")
    assert train.manifest.skipped == 1
    assert sorted({key[:2] for key in train.keys}) == ["v0", "v1", "v2", "v4"]
    after = read_bytes(config.out)
    assert all(after[name] == before[name] for name in before if "shard-" in name)


def test_a_name_in_another_encoding_is_a_name(configure: Configure, tmp_path: Path) -> None:
    root = os.fsencode(tmp_path / "videos")
    write_video(tmp_path / "videos" / "a.mp4", 0)
    for name, source in ((b"caf\xe9.mp4", b"a.mp4"), (b"no\xebl.mp4", b"b.txt")):
        (tmp_path / "videos" / "b.txt").write_text("no video")
        shutil.copy(os.path.join(root, source), os.path.join(root, name))
    with pytest.raises(BadInput, match="unusable"):
        encode(configure(tmp_path / "videos"))
    config = configure(tmp_path / "videos", max_skipped=1)
    encode(config)
    examples = read_all(config.out)
    assert [os.fsencode(e.record["source"]) for e in examples] == [b"a.mp4", b"caf\xe9.mp4"]


def test_a_damaged_video_of_several_shards_counts_once(
    configure: Configure, tmp_path: Path
) -> None:
    write_video(tmp_path / "videos" / "a.mp4", 0, frames=80)
    write_video(tmp_path / "videos" / "b.mp4", 1)
    damage(tmp_path / "videos" / "a.mp4")
    config = configure(tmp_path / "videos", max_skipped=1)
    encode(config)
    listed = (config.out / "train" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in listed] == ["a.mp4"]
    assert ShardedDataset(config.out, "train").manifest.skipped == 1


@pytest.mark.parametrize("header_tells", [True, False])
def test_a_split_of_which_nothing_is_usable_is_refused_with_the_first_reason(
    copy: Path, configure: Configure, header_tells: bool
) -> None:
    for path in (copy / "val").iterdir():
        if header_tells:
            path.write_bytes(b"no video")
        else:
            write_video(path, 3, frames=40)
            damage(path)
    config = configure(copy, max_skipped=9, frames=40 if not header_tells else FRAMES)
    if not header_tells:
        for path in (copy / "train").iterdir():
            write_video(path, 3, frames=40)
        config = dataclasses.replace(config, shard_megabytes=1.0)
    with pytest.raises(BadInput, match=r"no video of the split validation .*val/v5\.mp4: "):
        encode(config)
    assert not (config.out / "validation" / "manifest.json").exists()


def test_a_changed_folder_of_videos_is_no_resumption(copy: Path, configure: Configure) -> None:
    config = configure(copy)
    encode(config)
    (copy / "train" / "v0.mp4").unlink()
    with pytest.raises(BadInput, match=r"begun with other videos .*train/v0\.mp4"):
        encode(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"masks_per_clip": 0}, "masks_per_clip is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"shard_megabytes": 0.0}, r"shard_megabytes is 0\.0"),
        ({"frame_rate": float("nan")}, "frame_rate is nan"),
        ({"masks": "stationery"}, "nearest is stationary"),
        ({"held_out_masks": "bocks"}, "'bocks' is no family"),
        ({"masks": "own"}, "no masks of its own"),
        ({"frames": 1, "masks": "prediction"}, "prediction"),
        ({"fill": "red"}, "fill is 'red'"),
        ({"fill": "1,2,256"}, "fill is"),
        ({"max_skipped": -1}, "max_skipped is -1"),
        ({"size": "20"}, "multiples of 8: give --size 16x16"),
        ({"size": "wide"}, "size is 'wide'"),
        ({"autoencoder": "/absent"}, "cannot load /absent"),
        ({"device": "nonsense"}, "device is 'nonsense'"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_written(
    folder: Path, configure: Configure, changes: dict[str, object], message: str
) -> None:
    config = configure(folder, **changes)
    with pytest.raises(BadInput, match=message):
        encode(config)
    assert not config.out.exists()


def test_videos_of_other_sizes_need_a_size(copy: Path, configure: Configure) -> None:
    write_video(copy / "train" / "v0.mp4", 0, side=64)
    with pytest.raises(BadInput, match=r"v0\.mp4 is 64x64, train/v1\.mp4 is 32x32\): give --size"):
        encode(configure(copy))
    encode(configure(copy, size="16"))


def test_videos_outside_the_splits_are_counted(
    copy: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(copy / "extra" / "a.mp4", 0)
    write_video(copy / "b.mp4", 0)
    config = configure(copy)
    encode(config)
    assert f"left out 2 video(s) of {copy} that lie outside" in capsys.readouterr().err
    assert ShardedDataset(config.out, "train").manifest.skipped == 0


# The command


def test_the_default_autoencoder_is_the_papers_and_its_absence_names_the_remedy(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), str(tmp_path / "out"), "--frames", str(FRAMES)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "cannot load stabilityai/sd-vae-ft-mse" in said
    assert "give a local folder, or `--autoencoder shipped`" in said


def test_a_folder_that_is_not_ours_is_left_alone(folder: Path, configure: Configure) -> None:
    config = configure(folder)
    config.out.mkdir()
    (config.out / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        encode(config)
    assert read_bytes(config.out) == {"mine.txt": b"mine"}


def test_the_command_says_bad_input_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "holds no video" in lines[0]
    assert not (tmp_path / "out").exists()


def test_the_help_names_every_family_of_masks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {family} " in said for family in [*FAMILIES, "own"])


def test_it_is_said_how_far_the_job_is_and_where_its_time_went(
    folder: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(folder)
    timings = encode(config)
    said = capsys.readouterr().err
    assert "encode: 8/8 clips" in said
    assert "clips/s" in said
    assert timings is not None
    assert str(timings) in said.splitlines()[-1]
    assert (timings.processes, timings.clips) == (1, 8)
    assert list(timings.stages) == ["decode", "masks", "autoencoder", "write"]
    assert all(0 < seconds <= timings.elapsed for seconds in timings.stages.values())


@contextlib.contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[None]:
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_ends_the_job_in_one_line_and_with_space_it_goes_on(
    folder: Path, configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = configure(folder, out=tmp_path / "whole", pixels="all", shard_megabytes=0.06)
    encode(whole)
    expected = read_bytes(whole.out)
    with small_disk(tmp_path / "disk", 256):
        ballast = tmp_path / "disk" / "ballast"
        out = tmp_path / "disk" / "out"
        command = [str(folder), str(out), "--autoencoder", whole.autoencoder, "--device", "cpu"]
        command += ["--frames", str(FRAMES), "--pixels", "all", "--shard_megabytes", "0.06"]
        statuses = []
        for kilobytes in (252, 240, 200, 160, 100, 60, 8, 4):
            ballast.write_bytes(bytes(kilobytes * 1024))
            capsys.readouterr()
            statuses.append(main(command))
            last = capsys.readouterr().err.splitlines()[-1]
            assert statuses[-1] == 0 or "No space left on device" in last
            left = read_bytes(out)
            assert not [name for name in left if "partial" in name]
            for name in left.keys() - {"job.json"}:
                assert left[name] == expected[name], name
        ballast.unlink()
        assert 2 in statuses
        assert main(command) == 0
        left = read_bytes(out)
    assert left.keys() == expected.keys()
    assert {n: c for n, c in left.items() if n != "job.json"} == {
        n: c for n, c in expected.items() if n != "job.json"
    }


def test_a_piece_counts_the_clips_that_the_plan_gives_it(
    folder: Path, configure: Configure, autoencoder: str
) -> None:
    config = configure(folder, stride=2, shard_megabytes=1.0)
    encode(config)
    settings = _check(config)
    how = _load(config, settings, _read_plan(config))
    long = next(one.source for one in how.plan.surveyed.values() if "v1" in one.source.label)
    assert how.count_clips(Piece(long)) == 3
    assert how.count_clips(Piece(long, 1)) == 2
    assert how.count_clips(Piece(long, 1, 1)) == 1
