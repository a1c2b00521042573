from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vidfill.data.shards import writing
from vidfill.data.shards.format import (
    TRAINING,
    DamagedShard,
    Example,
    Manifest,
    ShardIndex,
    Skipped,
)
from vidfill.data.shards.reading import ExampleLayout, ShardedDataset
from vidfill.data.shards.writing import write_shard
from vidfill.data.storage.names import MANIFEST, index_name, shard_name
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import latent_mask

MakeExample = Callable[..., Example]
TAR = "shard-000000.tar"
WriteDataset = Callable[..., list[Example]]


def assert_same(a: Example, b: Example) -> None:
    assert (a.key, a.record) == (b.key, b.record)
    np.testing.assert_array_equal(a.latents, b.latents)
    np.testing.assert_array_equal(a.masked_latents, b.masked_latents)
    np.testing.assert_array_equal(a.mask, b.mask)
    np.testing.assert_array_equal(a.pixels, b.pixels)  # type: ignore[arg-type]
    np.testing.assert_array_equal(a.log_variance, b.log_variance)  # type: ignore[arg-type]


def read_index(folder: Path, number: int = 0) -> ShardIndex:
    index = writing.read_index(folder / "train", number)
    assert index is not None
    return index


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("pixels", [False, True])
def test_dataset_returns_what_was_written(
    tmp_path: Path, write_dataset: WriteDataset, pixels: bool, moments: bool
) -> None:
    examples = write_dataset(tmp_path, pixels=pixels, moments=moments)
    dataset = ShardedDataset(tmp_path, "train")
    assert len(dataset) == 5
    assert dataset.keys == [example.key for example in examples]
    for index in (4, 0, 2, 1, 3):
        assert_same(dataset[index], examples[index])
    with pytest.raises(IndexError):
        dataset[5]


@pytest.mark.parametrize("moments", [False, True])
def test_a_span_holds_the_training_arrays(
    tmp_path: Path, write_dataset: WriteDataset, moments: bool
) -> None:
    examples = write_dataset(tmp_path, moments=moments)
    dataset = ShardedDataset(tmp_path, "train")
    span = ExampleLayout.of(dataset.manifest)
    raw = np.zeros((3, span.bytes), np.uint8)
    for row in range(3):
        dataset.shard(1).read_span(row, raw[row].data)
    views = span.views(torch.from_numpy(raw))
    assert list(views) == list(TRAINING if moments else TRAINING[:-1])
    for row, example in enumerate(examples[2:]):
        shrunk = latent_mask(example.mask, *example.latents.shape[-2:])
        assert torch.equal(views["latent_mask"][row].float(), shrunk)
        for name in ("latents", "masked_latents", "log_variance"):
            if name in views:
                np.testing.assert_array_equal(views[name][row].numpy(), getattr(example, name))


# webdataset leaves its stream to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards_unaided(tmp_path: Path, write_dataset: WriteDataset) -> None:
    examples = write_dataset(tmp_path, pixels=True)
    urls = [str(tmp_path / "train" / shard_name(number)) for number in range(2)]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    for found, example in zip(read, examples, strict=True):
        np.testing.assert_array_equal(
            found["latent_mask.npy"], latent_mask(example.mask, 2, 2).numpy()
        )
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


def test_the_variance_is_that_of_draws_from_the_posterior(
    tmp_path: Path, write_dataset: WriteDataset
) -> None:
    examples = write_dataset(tmp_path, moments=True)
    mean = np.stack([e.latents for e in examples]).astype(np.float64)
    variance = np.exp(np.stack([e.log_variance for e in examples]).astype(np.float64))
    expected = mean.var(axis=(0, 1, 3, 4)) + variance.mean(axis=(0, 1, 3, 4))
    manifest = ShardedDataset(tmp_path, "train").manifest
    np.testing.assert_allclose(np.square(manifest.latents_std), expected, rtol=1e-12)


def test_moments_are_those_of_all_latents(tmp_path: Path, write_dataset: WriteDataset) -> None:
    latents = np.stack([e.latents for e in write_dataset(tmp_path)]).astype(np.float64)
    manifest = ShardedDataset(tmp_path, "train").manifest
    np.testing.assert_allclose(manifest.latents_mean, latents.mean(axis=(0, 1, 3, 4)), rtol=1e-12)
    np.testing.assert_allclose(manifest.latents_std, latents.std(axis=(0, 1, 3, 4)), rtol=1e-12)


def test_an_index_remembers_what_was_skipped(tmp_path: Path, make_example: MakeExample) -> None:
    outcomes = [Skipped("bad.mp4", "it has no frame"), make_example(0)]
    index = write_shard(tmp_path, 0, ["bad.mp4", "0.mp4"], outcomes)
    assert index.skipped == (Skipped("bad.mp4", "it has no frame"),)
    assert writing.read_index(tmp_path, 0) == index


def test_a_shard_may_hold_nothing(tmp_path: Path, write_dataset: WriteDataset) -> None:
    examples = write_dataset(tmp_path, sizes=(2, 0, 1))
    dataset = ShardedDataset(tmp_path, "train")
    assert dataset.keys == [example.key for example in examples]
    assert_same(dataset[2], examples[2])
    assert dataset.shard(1).keys == ()


def test_a_failing_source_leaves_no_shard(tmp_path: Path, make_example: MakeExample) -> None:
    def outcomes():
        yield make_example(0)
        raise BadInput("stop")

    with pytest.raises(BadInput, match="stop"):
        write_shard(tmp_path, 0, ["0.mp4"], outcomes())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["a.b", "../a", "a/b", "", "a b", "é"])
def test_a_key_that_is_no_plain_name_is_our_own_bug(
    tmp_path: Path, make_example: MakeExample, key: str
) -> None:
    dotted = dataclasses.replace(make_example(0), key=key)
    with pytest.raises(ValueError, match="has more than letters"):
        write_shard(tmp_path, 0, ["0.mp4"], [dotted])


def test_a_truncated_or_missing_shard_is_named(tmp_path: Path, write_dataset: WriteDataset) -> None:
    write_dataset(tmp_path)
    shard = tmp_path / "train" / TAR
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DamagedShard, match=r"shard-000000\.tar is damaged \(it has \d+ bytes"):
        ShardedDataset(tmp_path, "train")[0]
    shard.unlink()
    with pytest.raises(DamagedShard, match=r"shard-000000\.tar is damaged \(it is missing"):
        ShardedDataset(tmp_path, "train")[1]
    ShardedDataset(tmp_path, "train")[2]


def test_a_shard_truncated_while_it_is_read_is_named(
    tmp_path: Path, write_dataset: WriteDataset
) -> None:
    write_dataset(tmp_path)
    dataset = ShardedDataset(tmp_path, "train")
    shard = dataset.shard(0)
    os.truncate(tmp_path / "train" / TAR, 700)
    raw = np.zeros(ExampleLayout.of(dataset.manifest).bytes, np.uint8)
    with pytest.raises(DamagedShard, match="it ends too early"):
        shard.read_span(0, raw.data)
    with pytest.raises(DamagedShard, match="checksum"):
        shard.read(0)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff\xfe\x00", b'{"sources": 1}', b"[" * 100_000]
)
def test_a_damaged_index_or_manifest_is_no_traceback(
    tmp_path: Path, write_dataset: WriteDataset, content: bytes
) -> None:
    write_dataset(tmp_path)
    (tmp_path / "train" / index_name(0)).write_bytes(content)
    assert writing.read_index(tmp_path / "train", 0) is None
    with pytest.raises(DamagedShard, match="its index is damaged"):
        ShardedDataset(tmp_path, "train")[0]
    with pytest.raises(DamagedShard, match=r"shard-000000\.index\.json is damaged"):
        _ = ShardedDataset(tmp_path, "train").keys
    (tmp_path / "train" / MANIFEST).write_bytes(content)
    with pytest.raises(BadInput, match=r"manifest\.json.*encode again"):
        ShardedDataset(tmp_path, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda index: index["keys"].__setitem__(0, "../../a"),
            "keys.0 is .*: String should match",
        ),
        (lambda index: index["keys"].pop(), "spans has 2 entries for 1 keys"),
        (lambda index: index["spans"].pop(), "spans has 1 entries for 2 keys"),
        (lambda index: index["members"].pop("json"), "it lacks json"),
        (
            lambda index: index["members"]["mask.npz"]["offsets"].pop(),
            "offsets has 1 entries for 2",
        ),
        (
            lambda index: index["members"]["latents.npy"]["offsets"].__setitem__(0, 0),
            "masked_latents does not lie where",
        ),
        (lambda index: index.update(sha256="0" * 64), "of another shard than the manifest's"),
    ],
)
def test_an_index_that_disagrees_is_refused(
    tmp_path: Path, write_dataset: WriteDataset, change: Callable[[dict], object], message: str
) -> None:
    write_dataset(tmp_path)
    path = tmp_path / "train" / index_name(0)
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(DamagedShard, match=message):
        ShardedDataset(tmp_path, "train").shard(0)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_flipped_bit_is_never_read_as_if_it_were_whole(
    tmp_path_factory: pytest.TempPathFactory, write_dataset: WriteDataset, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("flipped")
    examples = write_dataset(root, sizes=(2,), pixels=True, moments=True)
    index = read_index(root)
    name = data.draw(st.sampled_from(sorted(index.members)))
    column = index.members[name]
    at = data.draw(st.integers(0, column.sizes[1] - 1))
    shard = root / "train" / TAR
    content = bytearray(shard.read_bytes())
    content[column.offsets[1] + at] ^= 1 << data.draw(st.integers(0, 7))
    shard.write_bytes(content)
    dataset = ShardedDataset(root, "train")
    assert_same(dataset[0], examples[0])
    with pytest.raises(DamagedShard, match=rf"{TAR} is damaged .*{examples[1].key}.*{name}"):
        dataset[1]
    if name.removesuffix(".npy") in TRAINING:
        raw = np.zeros(ExampleLayout.of(dataset.manifest).bytes, np.uint8)
        with pytest.raises(DamagedShard, match="it has another checksum"):
            dataset.shard(0).read_span(1, raw.data)


def test_pickles_in_a_shard_are_never_loaded(tmp_path: Path, write_dataset: WriteDataset) -> None:
    examples = write_dataset(tmp_path)
    shard = tmp_path / "train" / TAR
    index = read_index(tmp_path)
    column = index.members["latents.npy"]
    pickled = io.BytesIO()
    np.save(pickled, np.array([None], dtype=object), allow_pickle=True)
    content = bytearray(shard.read_bytes())
    planted = pickled.getvalue().ljust(column.sizes[0], b"\0")[: column.sizes[0]]
    content[column.offsets[0] : column.offsets[0] + column.sizes[0]] = planted
    shard.write_bytes(content)
    path = tmp_path / "train" / index_name(0)
    fields = json.loads(path.read_text())
    fields["members"]["latents.npy"]["checksums"][0] = xxhash.xxh3_64_hexdigest(planted)
    path.write_text(json.dumps(fields))
    dataset = ShardedDataset(tmp_path, "train")
    with pytest.raises(DamagedShard, match=rf"{examples[0].key}.*latents: it is object"):
        dataset[0]
    raw = np.zeros(ExampleLayout.of(dataset.manifest).bytes, np.uint8)
    with pytest.raises(DamagedShard, match="it has another checksum"):
        dataset.shard(0).read_span(0, raw.data)


def test_tar_members_carry_no_clock_and_no_owner(
    tmp_path: Path, write_dataset: WriteDataset
) -> None:
    write_dataset(tmp_path)
    with tarfile.open(tmp_path / "train" / TAR) as tar:
        members = tar.getmembers()
    assert len(members) == 10
    assert {(m.mtime, m.uid, m.gid, m.mode) for m in members} == {(0, 0, 0, 0o644)}


def test_a_manifest_that_is_read_and_written_keeps_its_bytes(
    tmp_path: Path, write_dataset: WriteDataset
) -> None:
    write_dataset(tmp_path)
    fields = json.loads((tmp_path / "train" / MANIFEST).read_text())
    fields["autoencoder"] = {"precision": "bf16"} | fields["autoencoder"]
    text = json.dumps(fields, indent=1) + "\n"
    assert Manifest.from_json(text).to_json() == text


def test_a_missing_split_says_which_there_are(tmp_path: Path, write_dataset: WriteDataset) -> None:
    write_dataset(tmp_path)
    with pytest.raises(BadInput, match="'validation': it has train"):
        ShardedDataset(tmp_path, "validation")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=1), "format is 1"),
        (lambda m: m.pop("clip"), "field clip is missing"),
        (lambda m: m.update(extra=1), "field extra is unknown"),
        (lambda m: m.update(examples="5"), "examples is '5'"),
        (lambda m: m["autoencoder"].pop("sha256"), r"autoencoder\.sha256 is missing"),
        (lambda m: m["latents_mean"].pop(), "latents_mean has 1 values for 2 channels"),
        (
            lambda m: m["latents_std"].__setitem__(0, "1"),
            "latents_std.0 is '1'",
        ),
        (lambda m: m.update(examples=6), "examples is 6, and its shards hold 5"),
        (lambda m: m.update(posterior="mode"), "posterior is 'mode'"),
        (lambda m: m.update(lanes=0), "lanes is 0"),
        (lambda m: m.update(latent_shape=[1, 2]), r"latent_shape\.2 is missing"),
        (lambda m: m.update(latent_shape=[1, 2, 3, "4"]), r"latent_shape\.3 is '4'"),
        (lambda m: m["shards"].pop("sha256"), r"shards\.sha256 is missing"),
        (
            lambda m: m["shards"].update(names=["../../etc/passwd", "b"]),
            r"shards\.names is unknown",
        ),
        (lambda m: m["shards"]["examples"].append(0), "lists of different lengths"),
        (lambda m: m["shards"]["bytes"].__setitem__(0, -1), r"shards\.bytes\.0 is -1"),
        (lambda m: m["shards"]["bytes"].__setitem__(0, 10**30), r"shards\.bytes\.0 is 10000"),
        (lambda m: m["autoencoder"].update(channels=0), r"autoencoder\.channels is 0"),
        (lambda m: m["clip"].update(frames="3"), r"clip\.frames is '3'"),
        (lambda m: m["shards"]["examples"].__setitem__(0, True), r"shards\.examples\.0 is True"),
        (lambda m: m["shards"]["sha256"].__setitem__(1, "../a"), r"shards\.sha256\.1 is '\.\./a'"),
    ],
)
def test_a_wrong_manifest_is_refused_by_field(
    tmp_path: Path, write_dataset: WriteDataset, change: Callable[[dict], object], message: str
) -> None:
    write_dataset(tmp_path)
    path = tmp_path / "train" / MANIFEST
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(BadInput, match=message):
        ShardedDataset(tmp_path, "train")
