"""Shards as they are written: a tar, an index, checksums."""

from __future__ import annotations

import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from ...files import aside, hash_file, write_atomically
from ...modeling.autoencoder import latent_mask
from ...records import read_small
from ..storage.names import index_name, shard_name
from .format import KEY_PATTERN, TRAINING, Example, MemberPlaces, ShardIndex, Skipped, in_blocks


def write_shard(
    folder: Path, number: int, sources: Sequence[str], outcomes: Iterable[Example | Skipped]
) -> ShardIndex:
    """Write the outcomes of encoding `sources` as one tar, then its index.

    Both appear whole or not at all, the index last. The same outcomes give the same bytes.
    """
    members: dict[str, list[tuple[int, int, str]]] = {}
    keys: list[str] = []
    skipped: list[Skipped] = []
    moments = Moments()
    with aside(folder / shard_name(number)) as partial:
        with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as tar:
            for outcome in outcomes:
                if isinstance(outcome, Skipped):
                    skipped.append(outcome)
                    continue
                keys.append(outcome.key)
                moments.add(outcome)
                for name, place in _add_example(tar, outcome).items():
                    members.setdefault(name, []).append(place)
        size, sha256 = partial.stat().st_size, hash_file(partial)
        spans = _hash_spans(partial, members)
    index = ShardIndex(
        sources=tuple(sources),
        keys=tuple(keys),
        members={
            name: MemberPlaces(*zip(*places, strict=True)) for name, places in members.items()
        },
        spans=spans,
        skipped=tuple(skipped),
        bytes=size,
        sha256=sha256,
        values=moments.values,
        sums=tuple(moments.sums.tolist()),
        squares=tuple(moments.squares.tolist()),
    )
    write_atomically(folder / index_name(number), index.to_json().encode())
    return index


def read_index(folder: Path, number: int) -> ShardIndex | None:
    """The index of a shard, where both were written whole and neither is damaged, else None."""
    shard = folder / shard_name(number)
    try:
        index = ShardIndex.from_json(read_small(folder / index_name(number)))
        return index if shard.stat().st_size == index.bytes else None
    except (FileNotFoundError, ValueError):
        return None


def latent_moments(indexes: Sequence[ShardIndex]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel over the latents of all `indexes`."""
    filled = [index for index in indexes if index.values]
    values = sum(index.values for index in filled)
    means, deviations = [], []
    for channel in range(len(filled[0].sums)):
        mean = math.fsum(index.sums[channel] for index in filled) / values
        square = math.fsum(index.squares[channel] for index in filled) / values
        means.append(mean)
        deviations.append(math.sqrt(max(square - mean**2, 0.0)))
    return means, deviations


class Moments:
    """Sums over latents and their squares, per channel, in float64."""

    def __init__(self) -> None:
        self.values = 0
        self.sums = self.squares = np.zeros(0)

    def add(self, example: Example) -> None:
        mean = example.latents.astype(np.float64)
        square = np.square(mean)
        if example.log_variance is not None:
            square += np.exp(example.log_variance.astype(np.float64))
        self.sums = (self.sums if self.values else 0.0) + mean.sum(axis=(0, 2, 3))
        self.squares = (self.squares if self.values else 0.0) + square.sum(axis=(0, 2, 3))
        self.values += mean.size // mean.shape[1]


def _add_example(tar: tarfile.TarFile, example: Example) -> dict[str, tuple[int, int, str]]:
    if not re.fullmatch(KEY_PATTERN, example.key):
        raise ValueError(f"key {example.key!r} has more than letters, digits, _ and -")
    shrunk = latent_mask(example.mask, *example.latents.shape[-2:]).numpy().astype(np.float16)
    arrays = (example.latents, example.masked_latents, shrunk, example.log_variance)
    training = zip(TRAINING, arrays, strict=True)
    members = {f"{name}.npy": _npy(array) for name, array in training if array is not None}
    members["mask.npz"] = _npz(example.mask)
    members["json"] = json.dumps(example.record, sort_keys=True).encode()
    if example.pixels is not None:
        members["pixels.npy"] = _npy(example.pixels)
    return {name: _add_member(tar, f"{example.key}.{name}", members[name]) for name in members}


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> tuple[int, int, str]:
    # TarInfo's defaults are constants (time 0, owner 0, mode 0644): the bytes depend on no clock.
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
    offset = tar.offset - in_blocks(len(content))
    return offset, len(content), xxhash.xxh3_64_hexdigest(content)


def _hash_spans(shard: Path, members: dict[str, list[tuple[int, int, str]]]) -> tuple[str, ...]:
    """The checksum of each example's span: its training members and the tar's headers between."""
    columns = [members[f"{name}.npy"] for name in TRAINING if f"{name}.npy" in members]
    if not columns:
        return ()
    with shard.open("rb") as file:
        return tuple(
            xxhash.xxh3_64_hexdigest(os.pread(file.fileno(), end + in_blocks(size) - start, start))
            for (start, _, _), (end, size, _) in zip(columns[0], columns[-1], strict=True)
        )


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _npz(mask: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, mask=mask)
    return buffer.getvalue()
