"""Damage inside a shard is found and named."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vidfill.data.shards.format import Example, Manifest
from vidfill.data.shards.reading import ExampleLayout
from vidfill.data.shards.writing import read_index
from vidfill.data.storage.names import MANIFEST

Find = Callable[..., tuple[dict[str, int], str]]
TAR, INDEX = "shard-000000.tar", "shard-000000.index.json"


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def plant(root: Path, at: int, content: bytes, member: str = "") -> None:
    """Overwrite bytes of the first shard, with all checksums made consistent."""
    path = root / "train" / TAR
    manifest = Manifest.from_json((root / "train" / MANIFEST).read_bytes())
    span = ExampleLayout.of(manifest).bytes
    tar = bytearray(path.read_bytes())
    tar[at : at + len(content)] = content
    path.write_bytes(tar)
    sha256 = hashlib.sha256(tar).hexdigest()

    def mend_index(index: dict) -> None:
        index["sha256"] = sha256
        if member:
            column = index["members"][member]
            first, size = column["offsets"][0], column["sizes"][0]
            column["checksums"][0] = xxhash.xxh3_64_hexdigest(bytes(tar[first : first + size]))
        first = index["members"]["latents.npy"]["offsets"][0]
        index["spans"][0] = xxhash.xxh3_64_hexdigest(bytes(tar[first : first + span]))

    change_json(root / "train" / INDEX, mend_index)
    change_json(
        root / "train" / MANIFEST,
        lambda manifest: manifest["shards"]["sha256"].__setitem__(0, sha256),
    )


def place_of(root: Path, member: str) -> tuple[int, int]:
    index = read_index(root / "train", 0)
    assert index is not None
    return index.members[member].offsets[0], index.members[member].sizes[0]


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_tar_is_found(
    dataset: Path, find: Find, place: float, bit: int
) -> None:
    path = dataset / "train" / TAR
    whole = path.read_bytes()
    tar = bytearray(whole)
    tar[int(place * len(tar))] ^= 1 << bit
    path.write_bytes(tar)
    wrong, said = find(dataset, split="train")
    path.write_bytes(whole)
    assert wrong["SHA-256"] == 1
    assert f"train/{TAR}" in said


def with_mask(example: Example, mask: np.ndarray) -> Example:
    return dataclasses.replace(example, mask=mask)


def with_nan(example: Example) -> Example:
    latents = example.latents.copy()
    latents[2, 1, 0, 0] = np.nan
    return dataclasses.replace(example, latents=latents)


VALUE_DAMAGE: list[tuple[str, Callable[[Example], Example], str]] = [
    ("finite values", with_nan, "latents holds NaN"),
    ("masks", lambda e: with_mask(e, e.mask * 0), "hides nothing"),
    ("masks", lambda e: with_mask(e, e.mask * 0 + 1), "hides the whole clip"),
    ("masks", lambda e: with_mask(e, e.mask * 2), "has the value 2"),
    (
        "XXH3, shapes",
        lambda e: dataclasses.replace(e, record={**e.record, "source": "../../secret.mp4"}),
        "outside the folder of videos",
    ),
    ("XXH3, shapes", lambda e: dataclasses.replace(e, record={}), "has no source"),
    (
        "XXH3, shapes",
        lambda e: dataclasses.replace(e, record={**e.record, "fill": [1, 2]}),
        "which is no colour",
    ),
    (
        "XXH3, shapes",
        lambda e: dataclasses.replace(e, record={**e.record, "split": "test"}),
        "of the split test",
    ),
    (
        "XXH3, shapes",
        lambda e: with_mask(e, np.repeat(e.mask, 2, axis=1)),
        "is expected",
    ),
    ("keys", lambda e: dataclasses.replace(e, key="same_stationary"), "has this key too"),
]


@pytest.mark.parametrize(("check", "change", "reason"), VALUE_DAMAGE)
def test_wrong_values_under_right_checksums_are_named(
    dataset: Path,
    find: Find,
    rewrite: Callable[..., None],
    check: str,
    change: Callable[[Example], Example],
    reason: str,
) -> None:
    rewrite(dataset, change, numbers={1})
    wrong, said = find(dataset)
    assert wrong[check]
    assert reason in said
    assert "shard-000001.tar video_" in said or "same_stationary" in said
    assert "shard-000000.tar" not in said


def test_a_latent_mask_of_another_mask_is_found(dataset: Path, find: Find) -> None:
    first, size = place_of(dataset, "latent_mask.npy")
    plant(dataset, first + size - 2, np.float16(0.5).tobytes(), "latent_mask.npy")
    wrong, said = find(dataset)
    assert wrong == {"masks": 1}
    assert "its latent_mask is not its mask's" in said


def test_a_pickle_is_found_and_never_loaded(dataset: Path, find: Find) -> None:
    first, size = place_of(dataset, "masked_latents.npy")
    content = io.BytesIO()
    np.save(content, np.array([Path("x")], dtype=object), allow_pickle=True)
    assert pickle.PROTO in content.getvalue()
    plant(dataset, first, content.getvalue().ljust(size, b"\0"), "masked_latents.npy")
    wrong, _ = find(dataset)
    assert wrong["XXH3, shapes"] == 1


@pytest.mark.parametrize("member", ["latents.npy", "latent_mask.npy"])
def test_an_array_in_another_order_than_training_takes_it_for_is_found(
    dataset: Path, find: Find, member: str
) -> None:
    first, _ = place_of(dataset, member)
    tar = (dataset / "train" / TAR).read_bytes()
    at = tar.index(b"False", first)
    assert b"fortran_order" in tar[first:at]
    plant(dataset, at, b"True ", member)
    wrong, said = find(dataset)
    assert wrong["XXH3, shapes"] == 1
    said_of = {"latents.npy": "latents: it lies by columns"}
    assert said_of.get(member, "latent_mask is no array of the manifest's shape") in said


@pytest.mark.parametrize("name", ["../../../tmp/a.json", "a.json"])
def test_a_member_of_another_name_is_found(dataset: Path, find: Find, name: str) -> None:
    first, size = place_of(dataset, "json")
    header = tarfile.TarInfo(name)
    header.size = size
    plant(dataset, first - 512, header.tobuf(tarfile.GNU_FORMAT))
    wrong, said = find(dataset)
    assert wrong == {"tar members": 1}
    assert f"it has {name!r} where its index has video_" in said
