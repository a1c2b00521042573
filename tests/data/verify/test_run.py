"""What concerns a whole split, or all of a data set; repair; the command line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from vidfill.data.encode.run import encode
from vidfill.data.encode.settings import EncodeConfig
from vidfill.data.shards.reading import ShardedDataset
from vidfill.data.storage.names import MANIFEST, shard_name
from vidfill.data.verify.defects import MOST_LISTED, is_sound
from vidfill.data.verify.run import main, verify
from vidfill.data.verify.settings import VerifyConfig
from vidfill.errors import BadInput

Find = Callable[..., tuple[dict[str, int], str]]
Hash = Callable[[Path], dict[str, str]]
TAR, INDEX = "shard-000000.tar", "shard-000000.index.json"


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def test_what_encode_wrote_is_sound(pristine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(pristine), "--samples", "3", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count("│ ok") == 20
    assert "BAD" not in said


@pytest.mark.slow
def test_moments_and_pixels_are_sound_too(pristine: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        layers_per_block=1,
    ).save_pretrained(tmp_path / "autoencoder")
    encode(
        EncodeConfig(
            pristine.parent / "videos",
            tmp_path / "shards",
            autoencoder=str(tmp_path / "autoencoder"),
            frames=6,
            masks="strokes box infilling",
            posterior="moments",
            pixels="all",
            device="cpu",
        )
    )
    found = verify(VerifyConfig(str(tmp_path / "shards"), samples=2, device="cpu"))
    assert is_sound(found)
    assert [split.checked["encoded again"] for split in found] == [2, 2]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1024])


FILE_DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("shards", lambda f: cut(f / TAR), "bytes where its manifest says"),
    ("shards", lambda f: (f / TAR).unlink(), "it is missing"),
    ("shards", lambda f: (f / INDEX).unlink(), "its index is missing"),
    ("shards", lambda f: (f / INDEX).write_bytes(b"{"), "its index is damaged"),
    (
        "shards",
        lambda f: shutil.copy(f / "shard-000001.index.json", f / INDEX),
        "of another shard",
    ),
    ("manifest", lambda f: shutil.copy(f / TAR, f / "shard-000099.tar"), "no shard of the"),
    ("manifest", lambda f: (f / "extra.tar").write_bytes(b""), "no shard of the manifest"),
    ("manifest", lambda f: (f / MANIFEST).unlink(), "it is missing"),
    ("manifest", lambda f: cut(f / MANIFEST), "is no JSON"),
    ("manifest", lambda f: (f / "skipped.jsonl").unlink(), "skipped.jsonl it is missing"),
    ("manifest", lambda f: (f / "skipped.jsonl").write_text("x"), "not what was written"),
    (
        "manifest",
        lambda f: (f / "skipped.jsonl").write_text('{"source": "a", "reason": "b"}'),
        "skipped.jsonl it is not what was written",
    ),
    (
        "shards",
        lambda f: change_json(
            f / MANIFEST,
            lambda m: (
                m.update(examples=m["examples"] + 1),
                m["shards"]["examples"].__setitem__(0, m["shards"]["examples"][0] + 1),
            ),
        ),
        "of another shard than the manifest's",
    ),
    (
        "manifest",
        lambda f: change_json(f / MANIFEST, lambda m: m.update(skipped=3)),
        "it says that 3 videos were skipped",
    ),
    (
        "manifest",
        lambda f: change_json(f / MANIFEST, lambda m: m.update(lanes=10**9)),
        "1000000000 lanes",
    ),
    (
        "manifest",
        lambda f: change_json(f / MANIFEST, lambda m: m.update(split="test")),
        "the split 'test'",
    ),
    (
        "manifest",
        lambda f: change_json(f / MANIFEST, lambda m: m["autoencoder"].update(scaling_factor=0)),
        "scaling_factor is 0",
    ),
    (
        "statistics",
        lambda f: change_json(f / MANIFEST, lambda m: m["latents_std"].__setitem__(1, 0.25)),
        "latents_std of channel 1 is 0.25",
    ),
    (
        "statistics",
        lambda f: change_json(f / INDEX, lambda i: i["sums"].__setitem__(0, 1e6)),
        "other sums of latents",
    ),
    (
        "tar members",
        lambda f: change_json(
            f / INDEX,
            lambda i: i["members"]["json"]["offsets"].__setitem__(
                0, i["members"]["json"]["offsets"][1]
            ),
        ),
        "where its index has",
    ),
]


@pytest.mark.parametrize(("check", "damage", "reason"), FILE_DAMAGE)
def test_damaged_files_are_named(
    dataset: Path, find: Find, check: str, damage: Callable[[Path], object], reason: str
) -> None:
    damage(dataset / "train")
    wrong, said = find(dataset)
    assert wrong[check]
    assert reason in said
    assert all("train/" in line for line in said.splitlines())


def test_splits_of_two_autoencoders_are_named(dataset: Path, find: Find) -> None:
    change_json(dataset / "train" / MANIFEST, lambda m: m["autoencoder"].update(scaling_factor=9.0))
    wrong, said = find(dataset)
    assert wrong["manifest"] == 1
    assert "whose scaling_factor is 9.0: they are of no use together" in said


def test_videos_and_autoencoder_may_lie_elsewhere(dataset: Path, pristine: Path) -> None:
    videos = shutil.copytree(pristine.parent / "videos", dataset.parent / "moved")
    for split in ("train", "validation"):
        change_json(dataset / split / MANIFEST, lambda m: m["autoencoder"].update(name="/nowhere"))
    [without, _] = verify(VerifyConfig(str(dataset), samples=2))
    assert without.checked["encoded again"] == 0
    assert "cannot load /nowhere" in without.notes["encoded again"]
    change_json(dataset / "job.json", lambda job: job["config"].update(videos="/nowhere"))
    autoencoder = str(pristine.parent / "autoencoder")
    options = {"samples": 2, "autoencoder": autoencoder, "device": "cpu"}
    [train, validation] = verify(VerifyConfig(str(dataset), **options))
    assert "give --videos" in train.notes["encoded again"]
    assert validation.checked["encoded again"] == 2  # of the pixels that it keeps
    [train, _] = verify(VerifyConfig(str(dataset), videos=videos, **options))
    assert train.checked["encoded again"] == 2
    assert is_sound([train, validation])


def test_a_repair_that_cannot_begin_leaves_all_as_it_was(
    dataset: Path, tmp_path: Path, hash_files: Hash
) -> None:
    shard = dataset / "train" / TAR
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    (tmp_path / "others").mkdir()
    before = hash_files(dataset)
    assert main([str(dataset), "--repair", "--samples", "0", "--videos", str(tmp_path / "others")])
    assert hash_files(dataset) == before


def damage_much(root: Path) -> None:
    tar = bytearray((root / "train" / TAR).read_bytes())
    tar[3000] ^= 1
    (root / "train" / TAR).write_bytes(tar)
    cut(root / "train" / "shard-000001.tar")
    (root / "validation" / INDEX).unlink()
    (root / "validation" / MANIFEST).write_text("{}")
    (root / "train" / "skipped.jsonl").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(damage_much, marks=pytest.mark.slow),
        lambda root: shutil.rmtree(root / "validation"),
    ],
)
def test_repair_gives_back_the_very_bytes(
    dataset: Path, pristine: Path, hash_files: Hash, damage: Callable[[Path], object]
) -> None:
    damage(dataset)
    assert main([str(dataset), "--samples", "0", "--repair", "true", "--device", "cpu"]) == 0
    before, after = hash_files(pristine), hash_files(dataset)
    del before["job.json"], after["job.json"]  # it names the folder, which is a copy
    assert after == before


@pytest.mark.slow
def test_repair_gives_back_what_was_written_wrong(
    dataset: Path, pristine: Path, rewrite: Callable[..., None], hash_files: Hash
) -> None:
    rewrite(dataset, lambda e: dataclasses.replace(e, latents=e.latents * np.nan), numbers={2})
    assert main([str(dataset), "--samples", "0", "--repair", "--device", "cpu"]) == 0
    shards = [name for name in hash_files(pristine) if name.endswith(".tar")]
    assert all(hash_files(dataset)[name] == hash_files(pristine)[name] for name in shards)


@pytest.mark.slow
def test_repair_says_what_it_lacks(
    dataset: Path, pristine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--samples", "0", "--repair", "true", "--device", "cpu"]
    (dataset / "train" / "extra.tar").write_bytes(b"")
    assert main([str(dataset), *arguments]) == 1
    assert "encoding again repairs none of this" in capsys.readouterr().err
    (dataset / "train" / "extra.tar").unlink()
    (dataset / "train" / TAR).unlink()
    moved = shutil.copytree(pristine.parent / "videos", dataset.parent / "moved")
    assert main([str(dataset), *arguments, "--videos", str(moved)]) == 0
    (dataset / "train" / TAR).unlink()
    change_json(dataset / "job.json", lambda job: job["config"].update(videos="/nowhere"))
    assert main([str(dataset), *arguments]) == 2
    assert "the videos are not in /nowhere; give --videos" in capsys.readouterr().err
    (dataset / "job.json").unlink()
    assert main([str(dataset), *arguments]) == 2
    assert "does not say how this was encoded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "/nowhere"}, "/nowhere holds no encoded split"),
        ({"samples": -1}, "samples is -1"),
        ({"split": "test"}, "split is 'test'; .* has train, validation"),
        ({"videos": Path("/nowhere")}, "videos is /nowhere"),
        ({"autoencoder": "/nowhere"}, "cannot load /nowhere"),
        ({"autoencoder": "shipped"}, "name that one"),
        ({"dataset": "https://a.b/c", "repair": True}, "is a URL: repair the folder"),
    ],
)
def test_bad_input_is_one_line(pristine: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        verify(VerifyConfig(**{"dataset": str(pristine), "samples": 1, "device": "cpu", **options}))


def test_what_lies_behind_a_url_is_checked_too(
    dataset: Path, pristine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"memory://{dataset}"
    memory = fsspec.filesystem("memory")
    memory.put(str(pristine), str(dataset), recursive=True)
    videos = ["--videos", str(pristine.parent / "videos"), "--device", "cpu"]
    assert main([url, "--samples", "1", *videos]) == 0
    assert capsys.readouterr().out.count("│ ok") == 20
    memory.pipe(f"{dataset}/train/{TAR}", b"other")
    memory.rm(f"{dataset}/validation/{INDEX}")
    assert main([url, "--samples", "0"]) == 1
    said = capsys.readouterr().out
    assert f"train/{TAR}" in said
    assert f"validation/{TAR}" in said
    assert "repair the original" in said


def test_many_defects_are_shown_by_a_few_of_each_kind(
    dataset: Path, rewrite: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(dataset, lambda e: dataclasses.replace(e, mask=e.mask * 2))
    for number in range(100, 120):
        (dataset / "train" / shard_name(number)).write_bytes(b"")
    assert main([str(dataset), "--samples", "0"]) == 1
    said = capsys.readouterr().out
    assert said.count("has the value 2") == said.count("remove it") == MOST_LISTED
    examples = len(ShardedDataset(dataset, "train"))
    assert f"and {20 + examples - 2 * MOST_LISTED} more" in said
