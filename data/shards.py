"""Shards: plain WebDataset tars of encoded clips, with an index to reach each and a manifest.

A split is a folder, on a disk or behind a URL:

    manifest.json             what its latents are, and every shard's size; written last
    shard-000000.tar          the members of its examples, one example after the other
    shard-000000.index.json   where each member lies, its checksum, and the shard's moments
    skipped.jsonl             the videos that gave no clip, and why

The members of an example, in this order:

    KEY.latents.npy           float16 [frames, channels, h, w], scaled, never clamped
    KEY.masked_latents.npy    float16, the same of the masked clip
    KEY.latent_mask.npy       float16 [frames, 1, h, w], the hidden share of each latent's pixels
    KEY.log_variance.npy      float16, of the latents; only where the posterior is "moments"
    KEY.mask.npz              uint8 [frames, height, width], 1 in the hole
    KEY.json                  where the clip is from, and its mask
    KEY.pixels.npy            uint8 [frames, height, width, 3]; only where pixels are kept

The first three or four are what training reads. Their sizes are the same in every example, so that
one read of one span of bytes brings all of them. Names follow from numbers and keys: nothing here
names a path. Nothing is ever unpickled. docs/data.md is the format's specification.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import os
import re
import tarfile
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

from .. import jobs
from .cache import CacheConfig, LocalStore, NodeCache, open_store
from .layout import MANIFEST, index_name, shard_name
from .masks import latent_mask
from .remote import WrongFile

FORMAT = 2
TRAINING = ("latents", "masked_latents", "latent_mask", "log_variance")  # arrays, in their order
OPEN_SHARDS = 512  # that a dataset holds open at a time; each takes a file descriptor

_KEY = re.compile(r"[\w-]+", re.ASCII)  # a dot would end the key, a slash would leave the folder
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError)  # of reading JSON that is not ours

Text = str | bytes
Latents = Float16[np.ndarray, "frames channels h w"]


class DamagedShard(jobs.BadInput):
    """A shard, or one example of it, is not what was written."""

    def __init__(self, where: str | Path, reason: str, number: int, key: str = "") -> None:
        place = f" at example {key}" if key else ""
        super().__init__(
            f"{where} is damaged{place} ({reason}): `vidfill verify` tells and repairs"
        )
        self.number = number
        self.key = key  # "" is the whole shard
        self.reason = reason


@dataclass(frozen=True)
class Example:
    """One clip as the shards hold it.

    Latents are those of the posterior's mean; `mask` is 1 in the hole.
    """

    key: str
    latents: Latents
    masked_latents: Latents
    mask: UInt8[np.ndarray, "frames height width"]
    record: dict[str, Any]
    pixels: UInt8[np.ndarray, "frames height width 3"] | None = None
    log_variance: Latents | None = None


@dataclass(frozen=True)
class Skipped:
    """A video that gave no clip, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Column:
    """One member of every example of a shard, by row: where it lies, and XXH3's 64 bits in hex."""

    offsets: tuple[int, ...]  # bytes from the tar's start
    sizes: tuple[int, ...]  # bytes
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class ShardIndex:
    """What is known of one shard: its sources, where its members lie, and its latents' moments."""

    sources: tuple[str, ...]
    keys: tuple[str, ...]
    members: dict[str, Column]  # by the name behind the key: "latents.npy"
    spans: tuple[str, ...]  # XXH3 of what training reads at a time, by row
    skipped: tuple[Skipped, ...]
    bytes: int
    sha256: str
    values: int  # latent values per channel
    sums: tuple[float, ...]  # per channel, float64
    squares: tuple[float, ...]  # per channel, float64; of draws where there is a log-variance

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: Text) -> ShardIndex:
        """Read an index; one of `_MALFORMED` is raised where it is none, or its parts disagree."""
        fields: dict[str, Any] = json.loads(text)
        for name in ("sources", "keys", "spans", "sums", "squares"):
            fields[name] = tuple(fields[name])
        fields["skipped"] = tuple(Skipped(**skip) for skip in fields["skipped"])
        fields["members"] = {
            name: Column(*(tuple(column[part]) for part in ("offsets", "sizes", "checksums")))
            for name, column in fields["members"].items()
        }
        index = cls(**fields)
        index._check()
        return index

    def _check(self) -> None:
        if bad := [key for key in self.keys if not _KEY.fullmatch(key)]:
            raise ValueError(f"the key {bad[0]!r} is no name of a member")
        rows = len(self.keys)
        for name, column in self.members.items():
            if {len(column.offsets), len(column.sizes), len(column.checksums)} != {rows}:
                raise ValueError(f"{name} has not one place for each of {rows} examples")
            if rows and not _are_places(column, self.bytes):
                raise ValueError(f"{name} has places that are not in the shard")
        if len(self.spans) != rows:
            raise ValueError(f"spans has not one checksum for each of {rows} examples")


def _are_places(column: Column, size: int) -> bool:
    """Whether all offsets and sizes are numbers within a file of `size` bytes."""
    offsets, sizes = np.array(column.offsets), np.array(column.sizes)
    if offsets.dtype != np.int64 or sizes.dtype != np.int64:
        return False
    return bool(min(offsets.min(), sizes.min()) >= 0 and max(offsets.max(), sizes.max()) <= size)


@dataclass(frozen=True)
class ShardTable:
    """What a manifest says of its shards, by their numbers."""

    examples: tuple[int, ...]
    bytes: tuple[int, ...]
    sha256: tuple[str, ...]

    @classmethod
    def of(cls, indexes: Sequence[ShardIndex]) -> ShardTable:
        return cls(
            tuple(len(index.keys) for index in indexes),
            tuple(index.bytes for index in indexes),
            tuple(index.sha256 for index in indexes),
        )


@dataclass(frozen=True)
class Manifest:
    """What a split's shards hold."""

    split: str
    autoencoder: dict[str, Any]  # Autoencoder.identity()
    posterior: str  # "mean", or "moments": shards hold the log-variance too
    pixels: bool  # shards hold the clips' pixels too
    clip: dict[str, int]  # frames, height, width
    latent_shape: tuple[int, int, int, int]  # frames, channels, h, w
    masks: dict[str, Any]  # families with their weights, per_clip, seed
    fill: str | list[int]  # "median", or one colour for all clips
    latents_mean: tuple[float, ...]  # per channel, over `latents`
    latents_std: tuple[float, ...]
    examples: int
    shards: ShardTable
    lanes: int  # of the stream's order
    block: int  # examples that a lane permutes at a time
    skipped: int  # videos
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: Text, where: str | Path) -> Manifest:
        """Read a manifest and check it.

        Raises:
            jobs.BadInput: naming the field of `where` that is missing or wrong.
        """
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise jobs.BadInput(f"{where} is no JSON ({error}): encode again") from None
        _check_manifest(fields, where)
        for name in ("latent_shape", "latents_mean", "latents_std"):
            fields[name] = tuple(fields[name])
        fields["shards"] = ShardTable(
            **{name: tuple(column) for name, column in fields["shards"].items()}
        )
        return cls(**fields)


_MANIFEST_TYPES: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "split": str,
    "autoencoder": dict,
    "posterior": str,
    "pixels": bool,
    "clip": dict,
    "latent_shape": list,
    "masks": dict,
    "fill": (str, list),
    "latents_mean": list,
    "latents_std": list,
    "examples": int,
    "shards": dict,
    "lanes": int,
    "block": int,
    "skipped": int,
}
_MANIFEST_KEYS = {
    "autoencoder": {"name", "kind", "sha256", "scaling_factor", "downsampling", "channels"},
    "clip": {"frames", "height", "width"},
    "masks": {"families", "per_clip", "seed"},
    "shards": {"examples", "bytes", "sha256"},
}


def _check_manifest(fields: Any, where: str | Path) -> None:
    def refuse(what: str) -> jobs.BadInput:
        return jobs.BadInput(f"{where}: {what}; encode again")

    if not isinstance(fields, dict) or "format" not in fields:
        raise refuse("no field format: this is no manifest")
    if fields["format"] != FORMAT:
        raise refuse(f"format is {fields['format']!r}, this version reads {FORMAT}")
    if unknown := sorted(fields.keys() ^ _MANIFEST_TYPES.keys()):
        raise refuse(f"field {unknown[0]} is {'unknown' if unknown[0] in fields else 'missing'}")
    for name, types in _MANIFEST_TYPES.items():
        if not isinstance(fields[name], types):
            raise refuse(f"{name} is {fields[name]!r:.80}, which is of the wrong type")
    for name, keys in _MANIFEST_KEYS.items():
        if missing := sorted(keys - fields[name].keys()):
            raise refuse(f"{name}.{missing[0]} is missing")
    if fields["posterior"] not in ("mean", "moments"):
        raise refuse(f"posterior is {fields['posterior']!r}")
    shape = fields["latent_shape"]
    if len(shape) != 4 or not all(_is_count(length) and length for length in shape):
        raise refuse(f"latent_shape is {shape!r}, not four numbers")
    for name in ("latents_mean", "latents_std"):
        if len(fields[name]) != shape[1]:
            raise refuse(f"{name} has {len(fields[name])} values for {shape[1]} channels")
        if not all(isinstance(value, int | float) for value in fields[name]):
            raise refuse(f"{name} is {fields[name]!r:.80}, which are not numbers")
    if wrong := _find_wrong_table(fields["shards"]):
        raise refuse(wrong)
    for name in ("examples", "lanes", "block"):
        if fields[name] < 1:
            raise refuse(f"{name} is {fields[name]}: it must be 1 or more")
    if fields["examples"] != sum(fields["shards"]["examples"]):
        raise refuse(f"examples is {fields['examples']}, not the sum of its shards'")


def _find_wrong_table(table: dict[str, Any]) -> str | None:
    if unknown := sorted(table.keys() - _MANIFEST_KEYS["shards"]):
        return f"shards.{unknown[0]} is unknown"
    if not all(isinstance(column, list) for column in table.values()):
        return "shards has something else than lists"
    if len({len(column) for column in table.values()}) != 1:
        return "shards has lists of different lengths"
    for name in ("examples", "bytes"):
        if bad := [value for value in table[name] if not _is_count(value)]:
            return f"shards.{name} has {bad[0]!r}, which is no count"
    for value in table["sha256"]:
        if not isinstance(value, str) or not _DIGEST.fullmatch(value):
            return f"shards.sha256 has {value!r}, which is no SHA-256"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def family_of(key: str) -> str:
    """The mask's family, which ends an example's key: FAMILY, or FAMILY-2 for its second mask."""
    return key.rpartition("_")[2].partition("-")[0]


# Writing


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
    with jobs.aside(folder / shard_name(number)) as partial:
        with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as tar:
            for outcome in outcomes:
                if isinstance(outcome, Skipped):
                    skipped.append(outcome)
                    continue
                keys.append(outcome.key)
                moments.add(outcome)
                for name, place in _add_example(tar, outcome).items():
                    members.setdefault(name, []).append(place)
        size, sha256 = partial.stat().st_size, jobs.hash_file(partial)
        spans = _hash_spans(partial, members)
    index = ShardIndex(
        sources=tuple(sources),
        keys=tuple(keys),
        members={name: Column(*zip(*places, strict=True)) for name, places in members.items()},
        spans=spans,
        skipped=tuple(skipped),
        bytes=size,
        sha256=sha256,
        values=moments.values,
        sums=tuple(moments.sums),
        squares=tuple(moments.squares),
    )
    jobs.write_atomically(folder / index_name(number), index.to_json().encode())
    return index


def read_index(folder: Path, number: int) -> ShardIndex | None:
    """The index of a shard, where both were written whole and neither is damaged, else None."""
    shard = folder / shard_name(number)
    try:
        index = ShardIndex.from_json((folder / index_name(number)).read_bytes())
        return index if shard.stat().st_size == index.bytes else None
    except (FileNotFoundError, *_MALFORMED):
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
        self.sums: list[float] = []
        self.squares: list[float] = []

    def add(self, example: Example) -> None:
        mean = example.latents.astype(np.float64)
        square = np.square(mean)
        if example.log_variance is not None:
            square += np.exp(example.log_variance.astype(np.float64))
        sums, squares = mean.sum(axis=(0, 2, 3)).tolist(), square.sum(axis=(0, 2, 3)).tolist()
        self.sums = [a + b for a, b in zip(self.sums or [0.0] * len(sums), sums, strict=True)]
        self.squares = [
            a + b for a, b in zip(self.squares or [0.0] * len(sums), squares, strict=True)
        ]
        self.values += mean.size // len(sums)


def _add_example(tar: tarfile.TarFile, example: Example) -> dict[str, tuple[int, int, str]]:
    if not _KEY.fullmatch(example.key):
        raise ValueError(f"key {example.key!r} has more than letters, digits, _ and -")
    shrunk = latent_mask(example.mask, *example.latents.shape[-2:]).numpy().astype(np.float16)
    members = {
        "latents.npy": _npy(example.latents),
        "masked_latents.npy": _npy(example.masked_latents),
        "latent_mask.npy": _npy(shrunk),
    }
    if example.log_variance is not None:
        members["log_variance.npy"] = _npy(example.log_variance)
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
    offset = tar.offset - _in_blocks(len(content))
    return offset, len(content), xxhash.xxh3_64_hexdigest(content)


def _hash_spans(shard: Path, members: dict[str, list[tuple[int, int, str]]]) -> tuple[str, ...]:
    """The checksum of each example's span: its training members and the tar's headers between."""
    columns = [members[f"{name}.npy"] for name in TRAINING if f"{name}.npy" in members]
    if not columns:
        return ()
    with shard.open("rb") as file:
        return tuple(
            xxhash.xxh3_64_hexdigest(os.pread(file.fileno(), end + _in_blocks(size) - start, start))
            for (start, _, _), (end, size, _) in zip(columns[0], columns[-1], strict=True)
        )


def _in_blocks(size: int) -> int:
    """Bytes that a member's content takes in a tar, which is written in blocks."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _npz(mask: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, mask=mask)
    return buffer.getvalue()


# Reading


class Field(NamedTuple):
    """One array of a span; its .npy begins with a header."""

    offset: int  # bytes from the span's start to the .npy
    data: int  # bytes from the span's start to the array's first value
    end: int
    shape: tuple[int, int, int, int]

    @property
    def size(self) -> int:
        """Bytes of the .npy."""
        return self.end - self.offset


@dataclass(frozen=True)
class Span:
    """The training arrays of one example as they lie in a shard: the same for all examples."""

    bytes: int
    fields: dict[str, Field]  # by the array's name: "latents"

    @classmethod
    def of(cls, manifest: Manifest) -> Span:
        frames, channels, h, w = manifest.latent_shape
        names = TRAINING if manifest.posterior == "moments" else TRAINING[:-1]
        fields, offset = {}, 0
        for name in names:
            shape = (frames, 1 if name == "latent_mask" else channels, h, w)
            data = offset + _npy_header_size(shape)
            fields[name] = Field(offset, data, data + math.prod(shape) * 2, shape)
            span = offset + _in_blocks(fields[name].size)
            offset = span + tarfile.BLOCKSIZE  # the next member's own header
        return cls(span, fields)

    def views(
        self, raw: UInt8[Tensor, "batch span"]
    ) -> dict[str, Float[Tensor, "batch frames _ h w"]]:
        """The arrays inside a batch of spans, by their names: float16, not copied."""
        values = raw.view(torch.float16)
        return {
            name: values[:, field.data // 2 : field.end // 2].unflatten(1, field.shape)
            for name, field in self.fields.items()
        }


def _npy_header_size(shape: tuple[int, ...]) -> int:
    empty = np.broadcast_to(np.float16(0), shape)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(empty))
    return len(buffer.getvalue())


class Shard:
    """One shard, opened to read examples from, by any number of threads."""

    def __init__(self, path: Path, number: int, manifest: Manifest) -> None:
        """Open the shard at `path`, whose index lies beside it.

        Raises:
            DamagedShard: it is missing, of another size, or its index is not of the manifest.
        """
        self.path, self.number = path, number
        self._manifest, self._span = manifest, Span.of(manifest)
        try:
            index = ShardIndex.from_json(path.with_name(index_name(number)).read_bytes())
            self._check_index(index)
        except FileNotFoundError:
            raise DamagedShard(path, "its index is missing", number) from None
        except _MALFORMED as error:
            reason = f"its index is damaged: {error}"
            raise DamagedShard(path, reason, number) from error
        self.index = index
        self._starts = index.members["latents.npy"].offsets if index.keys else ()
        self._descriptor = self._open()
        weakref.finalize(self, os.close, self._descriptor)

    @property
    def keys(self) -> tuple[str, ...]:
        return self.index.keys

    @property
    def is_removed(self) -> bool:
        """Whether the file has no name any more: a cache gave its place to another shard."""
        return os.fstat(self._descriptor).st_nlink == 0

    def read_span(self, row: int, into: memoryview) -> None:
        """Copy the training arrays of example `row` into a buffer of `Span.bytes` bytes.

        Raises:
            DamagedShard: the bytes are not those that were written.
        """
        # Once an example of training: what can be known before is not worked out here.
        try:
            read = os.preadv(self._descriptor, (into,), self._starts[row])
        except OSError as error:
            raise self._damage(row, f"it cannot be read: {error.strerror}") from error
        if read != len(into):
            raise self._damage(row, "it ends too early")
        if xxhash.xxh3_64_hexdigest(into) != self.index.spans[row]:
            raise self._damage(row, "it has another checksum than its index says")

    def read(self, row: int) -> Example:
        """Example `row` with all its members.

        Raises:
            DamagedShard: the bytes are not those that were written.
        """
        try:
            example = self._parse(row)
            _check_example(example, self._manifest)
        except DamagedShard:
            raise
        except Exception as error:  # of damaged bytes numpy and zipfile raise a dozen kinds
            raise self._damage(row, str(error)) from error
        return example

    def _open(self) -> int:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DamagedShard(self.path, "it is missing", self.number) from None
        size, expected = os.fstat(descriptor).st_size, self._manifest.shards.bytes[self.number]
        if size != expected:
            os.close(descriptor)
            reason = f"it has {size} bytes where its manifest says {expected}"
            raise DamagedShard(self.path, reason, self.number)
        return descriptor

    def _check_index(self, index: ShardIndex) -> None:
        table = self._manifest.shards
        if index.sha256 != table.sha256[self.number] or (
            len(index.keys) != table.examples[self.number]
        ):
            raise ValueError("it is of another shard than the manifest's")
        wanted = {f"{name}.npy" for name in self._span.fields} | {"mask.npz", "json"}
        if index.keys and not wanted <= index.members.keys():
            raise ValueError(f"it lacks {sorted(wanted - index.members.keys())[0]}")
        if index.keys:
            self._check_places(index)

    def _check_places(self, index: ShardIndex) -> None:
        starts = np.array(index.members["latents.npy"].offsets, dtype=np.int64)
        for name, field in self._span.fields.items():
            column = index.members[f"{name}.npy"]
            if not (
                np.array_equal(column.offsets, starts + field.offset)
                and set(column.sizes) == {field.size}
            ):
                raise ValueError(f"{name} does not lie where the manifest's shapes put it")

    def _damage(self, row: int, reason: str) -> DamagedShard:
        return DamagedShard(self.path, reason, self.number, self.keys[row])

    def _parse(self, row: int) -> Example:
        contents = {name: self._read_member(row, name) for name in self.index.members}

        def array(name: str) -> np.ndarray:
            return np.load(io.BytesIO(contents[name]), allow_pickle=False)

        with np.load(io.BytesIO(contents["mask.npz"]), allow_pickle=False) as arrays:
            mask = arrays["mask"]
        return Example(
            key=self.keys[row],
            latents=array("latents.npy"),
            masked_latents=array("masked_latents.npy"),
            mask=mask,
            record=json.loads(contents["json"]),
            pixels=array("pixels.npy") if "pixels.npy" in contents else None,
            log_variance=array("log_variance.npy") if "log_variance.npy" in contents else None,
        )

    def _read_member(self, row: int, name: str) -> bytes:
        column = self.index.members[name]
        content = os.pread(self._descriptor, column.sizes[row], column.offsets[row])
        if xxhash.xxh3_64_hexdigest(content) != column.checksums[row]:
            raise self._damage(row, f"{name} has another checksum than its index says")
        return content


def _check_example(example: Example, manifest: Manifest) -> None:
    clip = (manifest.clip["frames"], manifest.clip["height"], manifest.clip["width"])
    expected: list[tuple[str, np.ndarray | None, tuple[int, ...], type]] = [
        ("latents", example.latents, manifest.latent_shape, np.float16),
        ("masked_latents", example.masked_latents, manifest.latent_shape, np.float16),
        ("mask", example.mask, clip, np.uint8),
        ("pixels", example.pixels, (*clip, 3), np.uint8),
        ("log_variance", example.log_variance, manifest.latent_shape, np.float16),
    ]
    for name, array, shape, dtype in expected:
        if array is not None and (array.shape != shape or array.dtype != dtype):
            raise ValueError(
                f"{name} is {array.dtype} {list(array.shape)}, "
                f"the manifest says {np.dtype(dtype)} {list(shape)}"
            )


class ShardedDataset:
    """Random access to the examples of one split of an encoded folder, or of one behind a URL."""

    def __init__(self, root: str | Path, split: str, cache: CacheConfig | None = None) -> None:
        """Open `root`/`split`: its manifest is read, its shards are not looked at.

        Args:
            root: A folder, or a URL that fsspec opens.
            split: Its name.
            cache: Where the shards behind a URL are kept while they are in use.

        Raises:
            jobs.BadInput: there is no such split, or its manifest is damaged.
        """
        self.store = open_store(root, split, cache or CacheConfig())
        self.manifest = _read_manifest(self.store, root, split)
        self.store.expect(self.manifest.shards)
        self._ends = np.cumsum(self.manifest.shards.examples)
        self._open: dict[int, Shard] = {}  # the first opened first
        self._renewed: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.manifest.examples

    def __getitem__(self, index: int) -> Example:
        """Example `index` in the shards' order.

        Raises:
            IndexError: `index` is not in 0 to len - 1.
            DamagedShard: it is not what was written.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number]) - self.manifest.shards.examples[number]
        return self.shard(number).read(index - first)

    def shard(self, number: int) -> Shard:
        """Shard `number`, opened; behind a URL this waits until it is in the cache.

        Raises:
            DamagedShard: it is missing, of another size, or its index is not of the manifest.
            jobs.BadInput: it cannot be fetched.
        """
        if opened := self._open.get(number):
            return opened
        shard = self._open_shard(number)
        with self._lock:
            self._open[number] = shard
            for old in [n for n, opened in self._open.items() if opened.is_removed]:
                del self._open[old]
            while len(self._open) > OPEN_SHARDS:
                del self._open[next(iter(self._open))]
        return shard

    def renew(self, number: int) -> bool:
        """Have a shard fetched again that was damaged in the cache.

        Returns:
            Whether it may be whole now: not where it is read in place, and only once.
        """
        with self._lock:
            if number in self._renewed or not self.store.discard(number):
                return False
            self._renewed.add(number)
            self._open.pop(number, None)
        return True

    def _open_shard(self, number: int) -> Shard:
        try:
            return Shard(self._bring(number), number, self.manifest)
        except DamagedShard:
            if not self.renew(number):
                raise
            return Shard(self._bring(number), number, self.manifest)

    def _bring(self, number: int) -> Path:
        try:
            return self.store.path(number)
        except WrongFile as error:
            where = self.store.describe(shard_name(number))
            raise DamagedShard(where, error.reason, number) from None

    @functools.cached_property
    def keys(self) -> list[str]:
        """The examples' keys in the shards' order; every shard's index is read for them."""
        filled = [number for number, count in enumerate(self.manifest.shards.examples) if count]
        return [key for number in filled for key in self._read_index(number).keys]

    def _read_index(self, number: int) -> ShardIndex:
        name = index_name(number)
        try:
            return ShardIndex.from_json(self.store.read(name))
        except (FileNotFoundError, *_MALFORMED) as error:
            raise DamagedShard(self.store.describe(name), str(error), number) from error


def has_split(root: str | Path, split: str) -> bool:
    """Whether `root` holds an encoded split of that name."""
    try:
        open_store(root, split, CacheConfig()).read(MANIFEST)
    except FileNotFoundError:
        return False
    return True


def _read_manifest(store: LocalStore | NodeCache, root: str | Path, split: str) -> Manifest:
    try:
        content = store.read(MANIFEST)
    except FileNotFoundError:
        there = store.splits()
        remedy = f"it has {', '.join(there)}" if there else "make it with `vidfill encode`"
        place = jobs.hide_secrets(str(root))
        raise jobs.BadInput(f"{place} holds no encoded split {split!r}: {remedy}") from None
    return Manifest.from_json(content, store.describe(MANIFEST))
