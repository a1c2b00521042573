from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from vidfill.data import shards
from vidfill.data.shards import Example, ShardedDataset, Skipped
from vidfill.jobs import BadInput

MakeExample = Callable[..., Example]
WriteDataset = Callable[..., list[Example]]


def assert_same(a: Example, b: Example) -> None:
    assert (a.key, a.record) == (b.key, b.record)
    np.testing.assert_array_equal(a.latents, b.latents)
    np.testing.assert_array_equal(a.masked_latents, b.masked_latents)
    np.testing.assert_array_equal(a.mask, b.mask)
    np.testing.assert_array_equal(a.pixels, b.pixels)  # type: ignore[arg-type]


@pytest.mark.parametrize("pixels", [False, True])
def test_dataset_returns_what_was_written(
    tmp_path: Path, write_dataset: WriteDataset, pixels: bool
) -> None:
    examples = write_dataset(tmp_path, pixels=pixels)
    dataset = ShardedDataset(tmp_path, "train")
    assert len(dataset) == 5
    assert dataset.keys == [example.key for example in examples]
    for index in (4, 0, 2, 1, 3):
        assert_same(dataset[index], examples[index])
    with pytest.raises(IndexError):
        dataset[5]


# webdataset leaves its stream to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards_unaided(tmp_path: Path, write_dataset: WriteDataset) -> None:
    examples = write_dataset(tmp_path, pixels=True)
    urls = [str(tmp_path / "train" / shards.shard_name(number)) for number in range(2)]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    for found, example in zip(read, examples, strict=True):
        again = Example(
            key=found["__key__"],
            latents=found["latents.npy"],
            masked_latents=found["masked_latents.npy"],
            mask=found["mask.npz"]["mask"],
            record=found["json"],
            pixels=found["pixels.npy"],
        )
        assert_same(again, example)


def test_same_examples_give_the_same_bytes(tmp_path: Path, write_dataset: WriteDataset) -> None:
    for name in ("a", "b"):
        write_dataset(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_moments_are_those_of_all_latents(tmp_path: Path, write_dataset: WriteDataset) -> None:
    latents = np.stack([e.latents for e in write_dataset(tmp_path)]).astype(np.float64)
    manifest = ShardedDataset(tmp_path, "train").manifest
    np.testing.assert_allclose(manifest.latents_mean, latents.mean(axis=(0, 1, 3, 4)), rtol=1e-12)
    np.testing.assert_allclose(manifest.latents_std, latents.std(axis=(0, 1, 3, 4)), rtol=1e-12)


def test_an_index_remembers_what_was_skipped(tmp_path: Path, make_example: MakeExample) -> None:
    shard = tmp_path / shards.shard_name(0)
    outcomes = [Skipped("bad.mp4", "it has no frame"), make_example(0)]
    index = shards.write_shard(shard, ["bad.mp4", "0.mp4"], outcomes)
    assert index.skipped == (Skipped("bad.mp4", "it has no frame"),)
    read = shards.read_index(shard)
    assert read is not None
    assert json.loads(read.to_json()) == json.loads(index.to_json())


def test_a_failing_source_leaves_no_shard(tmp_path: Path, make_example: MakeExample) -> None:
    def outcomes():
        yield make_example(0)
        raise BadInput("stop")

    with pytest.raises(BadInput, match="stop"):
        shards.write_shard(tmp_path / shards.shard_name(0), ["0.mp4"], outcomes())
    assert not list(tmp_path.iterdir())


def test_a_key_with_a_dot_is_our_own_bug(tmp_path: Path, make_example: MakeExample) -> None:
    dotted = dataclasses.replace(make_example(0), key="a.b")
    with pytest.raises(ValueError, match="dot"):
        shards.write_shard(tmp_path / shards.shard_name(0), ["0.mp4"], [dotted])


def test_a_truncated_shard_is_named(tmp_path: Path, write_dataset: WriteDataset) -> None:
    write_dataset(tmp_path)
    shard = tmp_path / "train" / shards.shard_name(1)
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(BadInput, match=r"shard-00001\.tar has \d+ bytes"):
        ShardedDataset(tmp_path, "train")
    shard.unlink()
    with pytest.raises(BadInput, match=r"shard-00001\.tar is missing"):
        ShardedDataset(tmp_path, "train")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe\x00", b'{"sources": 1}'])
def test_a_damaged_index_or_manifest_is_no_traceback(
    tmp_path: Path, write_dataset: WriteDataset, content: bytes
) -> None:
    write_dataset(tmp_path)
    shard = tmp_path / "train" / shards.shard_name(0)
    shards.index_path(shard).write_bytes(content)
    assert shards.read_index(shard) is None
    with pytest.raises(BadInput, match="missing or damaged"):
        ShardedDataset(tmp_path, "train")[0]
    (tmp_path / "train" / shards.MANIFEST).write_bytes(content)
    with pytest.raises(BadInput, match=r"manifest\.json.*encode again"):
        ShardedDataset(tmp_path, "train")


@pytest.mark.parametrize("member", ["latents.npy", "mask.npz", "json"])
@pytest.mark.parametrize("part", [0.0, 0.2, 0.4])
def test_a_damaged_example_is_named(
    tmp_path: Path, write_dataset: WriteDataset, member: str, part: float
) -> None:
    examples = write_dataset(tmp_path)
    shard = tmp_path / "train" / shards.shard_name(0)
    index = shards.read_index(shard)
    assert index is not None
    offset, size = index.examples[examples[1].key][member]
    content = bytearray(shard.read_bytes())
    first = round(part * size)
    content[offset + first : offset + size] = b"\xff" * (size - first)
    shard.write_bytes(content)
    dataset = ShardedDataset(tmp_path, "train")
    assert_same(dataset[0], examples[0])
    with pytest.raises(BadInput, match=rf"shard-00000\.tar is damaged .*{examples[1].key}"):
        dataset[1]


def test_pickles_in_a_shard_are_never_loaded(tmp_path: Path, write_dataset: WriteDataset) -> None:
    examples = write_dataset(tmp_path)
    shard = tmp_path / "train" / shards.shard_name(0)
    index = shards.read_index(shard)
    assert index is not None
    offset, size = index.examples[examples[0].key]["latents.npy"]
    pickled = io.BytesIO()
    np.save(pickled, np.array([None], dtype=object), allow_pickle=True)
    content = bytearray(shard.read_bytes())
    content[offset : offset + size] = pickled.getvalue().ljust(size, b"\0")[:size]
    shard.write_bytes(content)
    with pytest.raises(BadInput, match="allow_pickle"):
        ShardedDataset(tmp_path, "train")[0]


def test_tar_members_carry_no_clock_and_no_owner(
    tmp_path: Path, write_dataset: WriteDataset
) -> None:
    write_dataset(tmp_path)
    with tarfile.open(tmp_path / "train" / shards.shard_name(0)) as tar:
        members = tar.getmembers()
    assert len(members) == 8
    assert {(m.mtime, m.uid, m.gid, m.mode) for m in members} == {(0, 0, 0, 0o644)}


def test_a_missing_split_says_which_there_are(tmp_path: Path, write_dataset: WriteDataset) -> None:
    write_dataset(tmp_path)
    with pytest.raises(BadInput, match="'validation': it has train"):
        ShardedDataset(tmp_path, "validation")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "format is 2"),
        (lambda m: m.pop("clip"), "field clip is missing"),
        (lambda m: m.update(extra=1), "field extra is unknown"),
        (lambda m: m.update(examples="5"), "examples is '5'"),
        (lambda m: m["autoencoder"].pop("sha256"), r"autoencoder\.sha256 is missing"),
        (lambda m: m["latents_mean"].pop(), "latents_mean has 1 values for 2 channels"),
        (lambda m: m.update(examples=6), "examples is 6"),
        (lambda m: m["shards"][0].pop("sha256"), "shards has the entry"),
        (lambda m: m["shards"][0].update(examples="2"), "shards has examples '2'"),
        (lambda m: m["shards"][1].update(name=None), "shards has name None"),
        (lambda m: m.update(latent_shape=[1, 2]), "latent_shape is"),
    ],
)
def test_a_wrong_manifest_is_refused_by_field(
    tmp_path: Path, write_dataset: WriteDataset, change: Callable[[dict], object], message: str
) -> None:
    write_dataset(tmp_path)
    path = tmp_path / "train" / shards.MANIFEST
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(BadInput, match=message):
        ShardedDataset(tmp_path, "train")
