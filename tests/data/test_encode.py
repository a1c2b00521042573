from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from vidfill.data import encode as job
from vidfill.data import shards, videos
from vidfill.data.encode import EncodeConfig, encode, main
from vidfill.data.masks import fill_hole
from vidfill.data.shards import ShardedDataset
from vidfill.jobs import BadInput

FRAMES, SIDE = 4, 32


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


def write_video(path: Path, seed: int, frames: int = FRAMES, side: int = SIDE) -> None:
    blocks = np.random.default_rng(seed).integers(0, 256, (frames, 4, 4, 3), dtype=np.uint8)
    videos.write_video(path, blocks.repeat(side // 4, axis=1).repeat(side // 4, axis=2), 12.5)


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
            videos, tmp_path / "out", autoencoder, frames=FRAMES, shard_size=2, device="cpu"
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


def test_both_protocols_give_every_clip_twice(folder: Path, configure: Configure) -> None:
    config = configure(folder, protocol="both")
    encode(config)
    train = ShardedDataset(config.out, "train")
    assert train.keys == [
        f"v{number}_{first:05}_{protocol}"
        for number in range(5)
        for first in ([0, FRAMES] if number == 1 else [0])
        for protocol in ("stationary", "variable")
    ]
    assert [entry.examples for entry in train.manifest.shards] == [6, 4, 2]
    assert train.manifest.latent_shape == (FRAMES, 4, 4, 4)
    assert len(ShardedDataset(config.out, "validation")) == 4


def test_an_example_is_the_clip_and_its_masked_clip_encoded(
    folder: Path, configure: Configure, autoencoder: str
) -> None:
    config = configure(folder, protocol="variable", pixels="all")
    encode(config)
    network = AutoencoderTiny.from_pretrained(autoencoder)
    for split, number in (("train", 2), ("validation", 1)):
        example = ShardedDataset(config.out, split)[number]
        frames, _ = videos.read_video(folder / example.record["source"])
        first = example.record["first_frame"]
        clip = frames[first : first + FRAMES]
        np.testing.assert_array_equal(example.pixels, clip)
        for latents, pixels in (
            (example.latents, clip),
            (example.masked_latents, fill_hole(clip, example.mask)),
        ):
            tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.no_grad():
                expected = network.encode(tensor).latents.numpy()
            np.testing.assert_allclose(latents, expected, atol=2e-3)


def test_the_manifest_has_the_moments_of_the_latents(folder: Path, configure: Configure) -> None:
    config = configure(folder)
    encode(config)
    dataset = ShardedDataset(config.out, "train")
    latents = np.stack([dataset[i].latents for i in range(len(dataset))]).astype(np.float64)
    manifest = dataset.manifest
    np.testing.assert_allclose(manifest.latents_mean, latents.mean(axis=(0, 1, 3, 4)), rtol=1e-9)
    np.testing.assert_allclose(manifest.latents_std, latents.std(axis=(0, 1, 3, 4)), rtol=1e-9)


@pytest.mark.parametrize("fill", ["median", "10,20,30"])
def test_what_lies_in_the_hole_does_not_reach_the_masked_latents(
    autoencoder: str, fill: str
) -> None:
    loaded = job.load_autoencoder(autoencoder)
    config = EncodeConfig(Path("videos"), Path("out"), fill=fill, frames=FRAMES)
    how = job.Encoding(config, job._parse_fill(fill), SIDE, SIDE, loaded)
    clip = np.random.default_rng(0).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    (example,) = job._encode_clip("a_00000", clip, {"split": "train"}, how)
    other = np.where(example.mask[..., None] == 1, 255 - clip, clip)
    (another,) = job._encode_clip("a_00000", other, {"split": "train"}, how)
    np.testing.assert_array_equal(example.masked_latents, another.masked_latents)
    assert not np.array_equal(example.latents, another.latents)


def test_a_resumed_job_writes_what_an_uninterrupted_one_does(
    folder: Path, configure: Configure
) -> None:
    config = configure(folder, protocol="both")
    encode(config)
    whole = read_bytes(config.out)
    for lost in ("train/manifest.json", "train/shard-00001.tar", "validation/shard-00000.tar"):
        (config.out / lost).unlink()
    for damaged in ("train/shard-00002.tar", "validation/shard-00000.index.json"):
        content = (config.out / damaged).read_bytes()
        (config.out / damaged).write_bytes(content[: len(content) // 2])
    kept = config.out / "train" / "shard-00000.tar"
    before = kept.stat().st_mtime_ns
    encode(config)
    assert read_bytes(config.out) == whole
    assert kept.stat().st_mtime_ns == before


def test_pixels_are_kept_for_validation_unless_told_otherwise(
    folder: Path, configure: Configure, tmp_path: Path
) -> None:
    for pixels, kept in (
        ("validation", [False, True]),
        ("all", [True, True]),
        ("none", [False, False]),
    ):
        config = configure(folder, pixels=pixels, out=tmp_path / pixels)
        encode(config)
        examples = [ShardedDataset(config.out, split)[0] for split in ("train", "validation")]
        assert [example.pixels is not None for example in examples] == kept


def test_videos_of_one_name_get_keys_of_their_own(configure: Configure, tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "a" / "clip.1.mp4", 0)
    write_video(tmp_path / "videos" / "b" / "clip.1.mp4", 1)
    config = configure(tmp_path / "videos")
    encode(config)
    assert ShardedDataset(config.out, "train").keys == [
        "a_clip_1_mp4_00000_stationary",
        "b_clip_1_mp4_00000_stationary",
    ]


def test_names_that_cannot_be_told_apart_are_refused(configure: Configure, tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "a.b.mp4", 0)
    write_video(tmp_path / "videos" / "a b.mp4", 1)
    with pytest.raises(BadInput, match="would share a key: rename one"):
        encode(configure(tmp_path / "videos"))


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
    copy: Path, configure: Configure
) -> None:
    (copy / "train" / "v3.mp4").write_bytes(b"no video")
    write_video(copy / "train" / "v4.mp4", 0, frames=FRAMES - 1)
    config = configure(copy, max_skipped=2)
    encode(config)
    listed = (config.out / "train" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in listed] == ["train/v3.mp4", "train/v4.mp4"]
    assert "it has 3 frames, a clip has 4" in listed[1]
    manifest = ShardedDataset(config.out, "train").manifest
    assert (manifest.skipped, manifest.examples) == (2, 4)


def test_a_video_damaged_inside_leaves_whole_shards_and_raising_the_limit_goes_on(
    copy: Path, configure: Configure, tmp_path: Path
) -> None:
    damaged = copy / "train" / "v3.mp4"
    content = bytearray(damaged.read_bytes())
    data = content.index(b"mdat") + 4
    content[data : data + 3000] = bytes(len(content[data : data + 3000]))
    index = damaged.read_bytes().index(b"moov") - 4
    content[index:] = damaged.read_bytes()[index:]
    damaged.write_bytes(content)
    config = configure(copy)
    with pytest.raises(BadInput, match=r"v3\.mp4: .*--max_skipped 1"):
        encode(config)
    names = sorted(read_bytes(config.out))
    assert names == ["job.json", "train/shard-00000.index.json", "train/shard-00000.tar"]
    resumed = dataclasses.replace(config, max_skipped=1)
    encode(resumed)
    assert json.loads((config.out / "job.json").read_text())["config"]["max_skipped"] == 1
    assert ShardedDataset(config.out, "train").manifest.skipped == 1


def test_a_changed_folder_of_videos_is_no_resumption(copy: Path, configure: Configure) -> None:
    config = configure(copy)
    encode(config)
    (copy / "train" / "v0.mp4").unlink()
    with pytest.raises(BadInput, match="made of other videos"):
        encode(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"fill": "red"}, "fill is 'red'"),
        ({"fill": "1,2,256"}, "fill is"),
        ({"max_skipped": -1}, "max_skipped is -1"),
        ({"size": 20}, "multiples of 8: give --size 16"),
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


def test_videos_of_several_sizes_need_a_size(copy: Path, configure: Configure) -> None:
    write_video(copy / "train" / "v4.mp4", 0, side=64)
    with pytest.raises(BadInput, match=r"v4\.mp4 is 64x64\): give --size"):
        encode(configure(copy))
    config = configure(copy, size=16)
    encode(config)
    assert ShardedDataset(config.out, "train").manifest.latent_shape == (FRAMES, 4, 2, 2)


def test_videos_outside_the_splits_are_counted(
    copy: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(copy / "extra" / "a.mp4", 0)
    write_video(copy / "b.mp4", 0)
    config = configure(copy)
    encode(config)
    assert f"left out 2 video(s) of {copy} that lie outside" in capsys.readouterr().err
    assert ShardedDataset(config.out, "train").manifest.skipped == 0


def test_the_default_autoencoder_is_the_papers_and_its_absence_names_the_remedy(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), str(tmp_path / "out"), "--frames", str(FRAMES)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "cannot load stabilityai/sd-vae-ft-mse" in said
    assert "give a local folder, or `--autoencoder shipped`" in said


def test_encode_refuses_to_run_on_many_processes(
    folder: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="WORLD_SIZE is 2"):
        encode(configure(folder))


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


def test_the_shards_are_named_by_the_manifest(folder: Path, configure: Configure) -> None:
    config = configure(folder)
    encode(config)
    manifest = ShardedDataset(config.out, "train").manifest
    for entry in manifest.shards:
        index = shards.read_index(config.out / "train" / entry.name)
        assert index is not None
        assert (index.bytes, index.sha256) == (entry.bytes, entry.sha256)
