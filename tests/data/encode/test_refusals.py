from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed import HashStore
from vidfill.data.encode.run import encode, main
from vidfill.data.encode.settings import EncodeConfig
from vidfill.data.masks import FAMILIES
from vidfill.data.shards.format import Example
from vidfill.data.shards.reading import ShardedDataset
from vidfill.errors import BadInput
from vidfill.files import hash_file
from vidfill.modeling.autoencoder import load_autoencoder
from vidfill.processes import Crew

FRAMES, SIDE = 4, 32  # of the videos that conftest.py writes

Configure = Callable[..., EncodeConfig]
Read = Callable[[Path], dict[str, bytes]]


def read_all(out: Path, split: str = "train") -> list[Example]:
    dataset = ShardedDataset(out, split)
    return [dataset[row] for row in range(len(dataset))]


# What cannot be used


def test_an_unusable_video_ends_the_job_before_anything_is_written(
    copy: Path, configure: Configure, write_video: Callable[..., None]
) -> None:
    (copy / "train" / "v3.mp4").write_bytes(b"no video")
    write_video(copy / "train" / "v4.mp4", 0, frames=FRAMES - 1)
    config = configure(copy)
    with pytest.raises(BadInput, match=r"v3\.mp4: .*2 unusable"):
        encode(config)
    assert not config.out.exists()


def test_videos_that_may_be_skipped_are_counted_and_listed(
    copy: Path,
    configure: Configure,
    capsys: pytest.CaptureFixture[str],
    write_video: Callable[..., None],
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
    copy: Path,
    configure: Configure,
    write_video: Callable[..., None],
    damage: Callable[[Path], None],
    read_bytes: Read,
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


def test_a_name_in_another_encoding_is_a_name(
    configure: Configure, tmp_path: Path, write_video: Callable[..., None]
) -> None:
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
    configure: Configure,
    tmp_path: Path,
    write_video: Callable[..., None],
    damage: Callable[[Path], None],
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
    copy: Path,
    configure: Configure,
    header_tells: bool,
    write_video: Callable[..., None],
    damage: Callable[[Path], None],
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


def test_a_process_with_another_autoencoder_than_the_first_one_is_refused(
    folder: Path,
    configure: Configure,
    autoencoder: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configure(folder)
    encode(config)
    first = {**load_autoencoder(autoencoder).identity(), "scaling_factor": 2.0}
    store = HashStore()
    for name, value in (("plan", hash_file(config.out / "plan.json")), ("autoencoder", first)):
        store.set(f"value {name}", json.dumps(value))
    second = Crew("encode", store, rank=1, size=2, hosts=False)
    monkeypatch.setattr(Crew, "join", lambda job: second)
    with pytest.raises(SystemExit):
        encode(config)
    assert f"process 1 found another autoencoder in {autoencoder}" in capsys.readouterr().err


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


def test_videos_of_other_sizes_need_a_size(
    copy: Path, configure: Configure, write_video: Callable[..., None]
) -> None:
    write_video(copy / "train" / "v0.mp4", 0, side=64)
    with pytest.raises(BadInput, match=r"v0\.mp4 is 64x64, train/v1\.mp4 is 32x32\): give --size"):
        encode(configure(copy))
    encode(configure(copy, size="16"))


def test_videos_outside_the_splits_are_counted(
    copy: Path,
    configure: Configure,
    capsys: pytest.CaptureFixture[str],
    write_video: Callable[..., None],
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


def test_a_folder_that_is_not_ours_is_left_alone(
    folder: Path, configure: Configure, read_bytes: Read
) -> None:
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


@pytest.mark.slow
def test_a_full_disk_ends_the_job_in_one_line_and_with_space_it_goes_on(
    folder: Path,
    configure: Configure,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    read_bytes: Read,
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
