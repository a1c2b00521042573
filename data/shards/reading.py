"""Shards, read: plain WebDataset tars of encoded clips, an index to reach each, and a manifest.

docs/data.md specifies the format. What training reads of an example has the same size in every
example, and lies together, so that one read of one span of bytes brings all of it. Names follow
from numbers and keys: nothing in a split names a path. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
import os
import tarfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from jaxtyping import Float, UInt8
from torch import Tensor

from ...errors import BadInput
from ...files import hide_secrets
from ...records import LARGEST, Malformed, parse_json, read_archived, read_array, read_small
from ..storage.names import MANIFEST, index_name, shard_name
from ..storage.store import CacheConfig, Store, open_store
from ..storage.transfer import WrongFile
from .format import TRAINING, DamagedShard, Example, Manifest, ShardIndex, in_blocks

OPEN_SHARDS = 512  # that a dataset holds open at a time; each takes a file descriptor


class ArrayPlace(NamedTuple):
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
class ExampleLayout:
    """The training arrays of one example as they lie in a shard: the same for all examples."""

    bytes: int
    arrays: dict[str, ArrayPlace]  # by the array's name: "latents"

    @classmethod
    def of(cls, manifest: Manifest) -> ExampleLayout:
        frames, channels, h, w = manifest.latent_shape
        names = TRAINING if manifest.posterior == "moments" else TRAINING[:-1]
        arrays, offset = {}, 0
        for name in names:
            shape = (frames, 1 if name == "latent_mask" else channels, h, w)
            data = offset + len(npy_header(shape))
            arrays[name] = ArrayPlace(offset, data, data + math.prod(shape) * 2, shape)
            span = offset + in_blocks(arrays[name].size)
            offset = span + tarfile.BLOCKSIZE  # the next member's own header
        return cls(span, arrays)

    def views(
        self, raw: UInt8[Tensor, "batch span"]
    ) -> dict[str, Float[Tensor, "batch frames _ h w"]]:
        """The arrays inside a batch of spans, by their names: float16, not copied."""
        values = raw.view(torch.float16)
        return {
            name: values[:, place.data // 2 : place.end // 2].unflatten(1, place.shape)
            for name, place in self.arrays.items()
        }


def npy_header(shape: tuple[int, ...]) -> bytes:
    """What precedes the values of a float16 array in its .npy."""
    buffer = io.BytesIO()
    fields = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


class Shard:
    """One shard, opened to read examples from, by any number of threads."""

    def __init__(self, path: Path, number: int, manifest: Manifest) -> None:
        """Open the shard at `path`, and the index beside it; DamagedShard where either is wrong."""
        self.path, self.number = path, number
        self._manifest, self._layout = manifest, ExampleLayout.of(manifest)
        try:
            index = ShardIndex.from_json(read_small(path.with_name(index_name(number))))
            self._check_index(index)
        except FileNotFoundError:
            raise DamagedShard(path, "its index is missing", number) from None
        except ValueError as error:
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
        """Copy the training arrays of example `row` into a buffer of `ExampleLayout.bytes` bytes.

        DamagedShard says that they are not what was written.
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
        """Example `row` with all its members; DamagedShard where it is not what was written."""
        try:
            return self._parse(row)
        except Malformed as error:
            raise self._damage(row, str(error)) from error

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
        if not index.keys:
            return
        wanted = {f"{name}.npy" for name in self._layout.arrays} | {"mask.npz", "json"}
        if lacking := wanted - index.members.keys():
            raise ValueError(f"it lacks {min(lacking)}")
        if max(index.members["json"].sizes) > LARGEST:
            raise ValueError(f"json has more than {LARGEST >> 20} MiB")
        starts = np.array(index.members["latents.npy"].offsets, dtype=np.int64)
        for name, place in self._layout.arrays.items():
            column = index.members[f"{name}.npy"]
            if not (
                np.array_equal(column.offsets, starts + place.offset)
                and set(column.sizes) == {place.size}
            ):
                raise ValueError(f"{name} does not lie where the manifest's shapes put it")

    def _damage(self, row: int, reason: str) -> DamagedShard:
        return DamagedShard(self.path, reason, self.number, self.keys[row])

    def _parse(self, row: int) -> Example:
        contents = {name: self._read_member(row, name) for name in self.index.members}
        clip = tuple(self._manifest.clip[name] for name in ("frames", "height", "width"))
        latents = self._manifest.latent_shape

        def array(name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
            with _about(name):
                return read_array(contents[f"{name}.npy"], dtype, shape)

        with _about("mask"):
            mask = read_archived(contents["mask.npz"], "mask", np.uint8, clip)
        with _about("json"):
            record = parse_json(dict[str, Any], contents["json"])
        has_pixels, has_variance = (f"{name}.npy" in contents for name in ("pixels", TRAINING[-1]))
        return Example(
            key=self.keys[row],
            latents=array("latents", np.float16, latents),
            masked_latents=array("masked_latents", np.float16, latents),
            mask=mask,
            record=record,
            pixels=array("pixels", np.uint8, (*clip, 3)) if has_pixels else None,
            log_variance=array(TRAINING[-1], np.float16, latents) if has_variance else None,
        )

    def _read_member(self, row: int, name: str) -> bytes:
        column = self.index.members[name]
        try:
            content = os.pread(self._descriptor, column.sizes[row], column.offsets[row])
        except OSError as error:
            raise self._damage(row, f"it cannot be read: {error.strerror}") from error
        if xxhash.xxh3_64_hexdigest(content) != column.checksums[row]:
            raise self._damage(row, f"{name} has another checksum than its index says")
        return content


@contextlib.contextmanager
def _about(name: str) -> Iterator[None]:
    """Names the member in what is wrong with it."""
    try:
        yield
    except Malformed as error:
        raise Malformed(f"{name}: {error}") from error


class ShardedDataset:
    """Random access to the examples of one split of an encoded folder, or of one behind a URL."""

    def __init__(self, root: str | Path, split: str, cache: CacheConfig | None = None) -> None:
        """Open `root`/`split`: its manifest is read, its shards are not looked at.

        `root` is a folder, or a URL that fsspec opens.

        Raises:
            BadInput: there is no such split, or its manifest is damaged.
        """
        self.store = open_store(root, split, cache or CacheConfig())
        self.manifest = _read_manifest(self.store, root, split)
        self.store.expect(self.manifest.shards)
        self._ends = np.cumsum(self.manifest.shards.examples)
        self._open: dict[int, Shard] = {}  # the first opened first
        self._renewed: set[int] = set()
        self._lock = threading.Lock()

    def fingerprint(self) -> dict[str, str]:
        """What tells a split from others, wherever it lies."""
        return {"manifest": _hash(self.store.read(MANIFEST))}

    def __len__(self) -> int:
        return self.manifest.examples

    def __getitem__(self, index: int) -> Example:
        """Example `index` in the shards' order; DamagedShard where it is not what was written."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number]) - self.manifest.shards.examples[number]
        return self.shard(number).read(index - first)

    def shard(self, number: int) -> Shard:
        """Shard `number`, opened; behind a URL this waits until it is in the cache.

        Raises:
            DamagedShard: it is missing, of another size, or its index is not of the manifest.
            BadInput: it cannot be fetched.
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
        """Whether a damaged shard is fetched again: once, and only where there is another copy."""
        with self._lock:
            if number in self._renewed or not self.store.discard(number):
                return False
            self._renewed.add(number)
            self._open.pop(number, None)
        return True

    def _open_shard(self, number: int) -> Shard:
        try:
            return Shard(self.store.path(number), number, self.manifest)
        except WrongFile as error:
            where = self.store.describe(shard_name(number))
            raise DamagedShard(where, error.reason, number) from None
        except DamagedShard:
            if not self.renew(number):
                raise
        return self._open_shard(number)

    @functools.cached_property
    def keys(self) -> list[str]:
        """The examples' keys in the shards' order; every shard's index is read for them."""
        keys: list[str] = []
        for number in np.flatnonzero(self.manifest.shards.examples).tolist():
            name = index_name(number)
            try:
                keys += ShardIndex.from_json(self.store.read(name)).keys
            except (FileNotFoundError, ValueError) as error:
                raise DamagedShard(self.store.describe(name), str(error), number) from error
        return keys


def has_split(root: str | Path, split: str) -> bool:
    """Whether `root` holds an encoded split of that name."""
    return bool(fingerprint_splits(root, [split]))


def fingerprint_splits(root: str | Path, splits: Sequence[str]) -> dict[str, str]:
    """What tells splits from others, wherever they lie: of those that `root` holds."""
    found = {}
    for split in splits:
        with contextlib.suppress(FileNotFoundError):
            found[split] = _hash(open_store(root, split, CacheConfig()).read(MANIFEST))
    return found


def _hash(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()  # it has its shards' hashes


def _read_manifest(store: Store, root: str | Path, split: str) -> Manifest:
    try:
        content = store.read(MANIFEST)
    except FileNotFoundError:
        there = store.splits()
        remedy = f"it has {', '.join(there)}" if there else "make it with `vidfill encode`"
        place = hide_secrets(str(root))
        raise BadInput(f"{place} holds no encoded split {split!r}: {remedy}") from None
    try:
        return Manifest.from_json(content)
    except ValueError as error:
        raise BadInput(f"{store.describe(MANIFEST)}: {error}; encode again") from None
