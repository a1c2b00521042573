from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from vidfill.data import videos
from vidfill.data.encode.plan import PLAN
from vidfill.data.encode.run import encode
from vidfill.data.encode.settings import EncodeConfig
from vidfill.data.masks import FAMILIES, fill_hole
from vidfill.data.shards.format import Example
from vidfill.data.shards.reading import ShardedDataset
from vidfill.data.shards.writing import read_index
from vidfill.data.videos import FrameSize
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import Autoencoder, to_pixels

FRAMES, SIDE = 4, 32  # of the videos that conftest.py writes

Configure = Callable[..., EncodeConfig]
Read = Callable[[Path], dict[str, bytes]]


def read_all(out: Path, split: str = "train") -> list[Example]:
    dataset = ShardedDataset(out, split)
    return [dataset[row] for row in range(len(dataset))]


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
    configure: Configure,
    tmp_path: Path,
    fill: str,
    write_images: Callable[..., Path],
    draw_video: Callable[..., np.ndarray],
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


def test_clips_begin_every_stride_frames(
    configure: Configure, tmp_path: Path, write_video: Callable[..., None]
) -> None:
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


@pytest.fixture
def write_davis(
    write_images: Callable[..., Path], draw_video: Callable[..., np.ndarray]
) -> Callable[[Path], None]:
    def write(root: Path) -> None:
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

    return write


def test_a_users_own_masks_are_the_holes(
    configure: Configure, tmp_path: Path, write_davis: Callable[[Path], None]
) -> None:
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
    configure: Configure, tmp_path: Path, write_davis: Callable[[Path], None]
) -> None:
    write_davis(tmp_path / "davis")
    config = configure(tmp_path / "davis", masks="box", held_out_masks="own")
    encode(config)
    assert len(ShardedDataset(config.out, "train")) == 3
    assert ShardedDataset(config.out, "validation").keys == ["cat_00000_own"]


def test_a_mask_that_leaves_no_colour_spoils_its_video_alone_and_one_that_hides_nothing_is_said(
    configure: Configure,
    tmp_path: Path,
    write_video: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("a", "b", "c"):
        write_video(tmp_path / "videos" / f"{name}.mp4", 0)
    (tmp_path / "masks").mkdir()
    white = Image.new("L", (SIDE, SIDE), 255)
    white.save(tmp_path / "masks" / "a.png")
    white.paste(0, (0, 0, 9, 9))
    white.save(tmp_path / "masks" / "b.png")
    Image.new("L", (SIDE, SIDE), 0).save(tmp_path / "masks" / "c.png")
    config = configure(
        tmp_path / "videos", masks="own", mask_files=tmp_path / "masks", max_skipped=1
    )
    encode(config)
    assert ShardedDataset(config.out, "train").keys == ["b_00000_own", "c_00000_own"]
    assert " 1 example(s) made now have a mask that hides nothing" in capsys.readouterr().err
    (skip,) = (config.out / "train" / "skipped.jsonl").read_text().splitlines()
    assert "leaves no colour" in skip
    coloured = dataclasses.replace(config, fill="0,0,0", out=tmp_path / "coloured")
    encode(coloured)
    assert len(ShardedDataset(coloured.out, "train")) == 3


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


@pytest.mark.parametrize("batch_size", [3, 64])
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


@pytest.mark.parametrize(("megabytes", "pixels"), [(0.05, "none"), (0.2, "all")])
def test_no_shard_exceeds_its_maximum(
    configure: Configure,
    tmp_path: Path,
    megabytes: float,
    pixels: str,
    write_video: Callable[..., None],
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


def test_a_shards_bytes_depend_on_no_other_shard(
    folder: Path, configure: Configure, read_bytes: Read
) -> None:
    config = configure(folder, masks="stationary variable", masks_per_clip=2, batch_size=10)
    encode(config)
    whole = read_bytes(config.out)
    tars = [name for name in whole if name.endswith(".tar")]
    assert len(tars) > 4
    for kept in (tars[0], tars[-1]):
        for name in whole:
            if "shard-" in name and not name.startswith(kept.removesuffix(".tar")):
                (config.out / name).unlink()
        encode(config)
        assert read_bytes(config.out) == whole


def test_a_resumed_job_writes_what_an_uninterrupted_one_does(
    folder: Path, configure: Configure, read_bytes: Read
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


@pytest.mark.slow
def test_memory_does_not_grow_with_a_videos_length(
    configure: Configure, tmp_path: Path, write_video: Callable[..., None]
) -> None:
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
