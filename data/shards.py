"""Shards: plain WebDataset tars of encoded clips, with an index to reach each and a manifest.

A split is a folder:

    manifest.json            what its latents are and where; written last
    shard-00000.tar          per clip KEY.latents.npy, KEY.masked_latents.npy, KEY.mask.npz,
                             KEY.json and, where pixels are kept, KEY.pixels.npy
    shard-00000.index.json   where each member lies, and what the shard adds to the manifest
    skipped.jsonl            the videos that gave no clip, and why

Nothing in it is ever unpickled.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import io
import itertools
import json
import math
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .. import jobs

FORMAT = 1
MANIFEST = "manifest.json"

_MALFORMED = (ValueError, KeyError, TypeError, AttributeError)  # of reading JSON that is not ours

Members = Mapping[str, tuple[int, int]]  # a member's offset and size in its tar, bytes


@dataclass(frozen=True)
class Example:
    """One clip as the shards hold it.

    Latents are float16, scaled and never clamped; `mask` is 1 in the hole.
    """

    key: str
    latents: np.ndarray  # [frames, channels, h, w]
    masked_latents: np.ndarray  # [frames, channels, h, w]
    mask: np.ndarray  # uint8 [frames, height, width]
    record: dict[str, Any]
    pixels: np.ndarray | None = None  # uint8 [frames, height, width, 3]


@dataclass(frozen=True)
class Skipped:
    """A video that gave no clip, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class ShardIndex:
    """What is known of one shard: its sources, where its members lie, and its latents' moments."""

    sources: tuple[str, ...]
    examples: dict[str, Members]
    skipped: tuple[Skipped, ...]
    bytes: int
    sha256: str
    values: int  # latent values per channel
    sums: tuple[float, ...]  # per channel, float64
    squares: tuple[float, ...]  # per channel, float64

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ShardIndex:
        fields: dict[str, Any] = json.loads(text)
        for name in ("sources", "sums", "squares"):
            fields[name] = tuple(fields[name])
        fields["skipped"] = tuple(Skipped(**skip) for skip in fields["skipped"])
        fields["examples"] = {
            key: {name: (offset, size) for name, (offset, size) in members.items()}
            for key, members in fields["examples"].items()
        }
        return cls(**fields)


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest lists it."""

    name: str
    examples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a split's shards hold."""

    split: str
    autoencoder: dict[str, Any]  # name, kind, sha256, scaling_factor, downsampling, channels
    clip: dict[str, int]  # frames, height, width
    latent_shape: tuple[int, int, int, int]  # frames, channels, h, w
    masks: dict[str, Any]  # protocols, grid, coverage, seed
    fill: str | list[int]  # "median", or one colour for all clips
    latents_mean: tuple[float, ...]  # per channel, over `latents`
    latents_std: tuple[float, ...]
    examples: int
    shards: tuple[ShardEntry, ...]
    skipped: int  # videos
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, path: Path) -> Manifest:
        """Read a manifest and check it.

        Raises:
            jobs.BadInput: naming the field of `path` that is missing or wrong.
        """
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise jobs.BadInput(f"{path} is no JSON ({error}): encode again") from None
        _check_manifest(fields, path)
        for name in ("latent_shape", "latents_mean", "latents_std"):
            fields[name] = tuple(fields[name])
        fields["shards"] = tuple(ShardEntry(**entry) for entry in fields["shards"])
        return cls(**fields)


_MANIFEST_TYPES: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "split": str,
    "autoencoder": dict,
    "clip": dict,
    "latent_shape": list,
    "masks": dict,
    "fill": (str, list),
    "latents_mean": list,
    "latents_std": list,
    "examples": int,
    "shards": list,
    "skipped": int,
}
_MANIFEST_KEYS = {
    "autoencoder": {"name", "kind", "sha256", "scaling_factor", "downsampling", "channels"},
    "clip": {"frames", "height", "width"},
    "masks": {"protocols", "grid", "coverage", "seed"},
}
_ENTRY_TYPES = {"name": str, "examples": int, "bytes": int, "sha256": str}


def _check_manifest(fields: Any, path: Path) -> None:
    def refuse(what: str) -> jobs.BadInput:
        return jobs.BadInput(f"{path}: {what}; encode again")

    if not isinstance(fields, dict) or "format" not in fields:
        raise refuse("no field format: this is no manifest")
    if fields["format"] != FORMAT:
        raise refuse(f"format is {fields['format']!r}, this version reads {FORMAT}")
    if unknown := sorted(fields.keys() ^ _MANIFEST_TYPES.keys()):
        raise refuse(f"field {unknown[0]} is {'unknown' if unknown[0] in fields else 'missing'}")
    for name, types in _MANIFEST_TYPES.items():
        if not isinstance(fields[name], types):
            raise refuse(f"{name} is {fields[name]!r}, which is of the wrong type")
    for name, keys in _MANIFEST_KEYS.items():
        if missing := sorted(keys - fields[name].keys()):
            raise refuse(f"{name}.{missing[0]} is missing")
    if len(fields["latent_shape"]) != 4:
        raise refuse(f"latent_shape is {fields['latent_shape']!r}, not four numbers")
    channels = fields["latent_shape"][1]
    for name in ("latents_mean", "latents_std"):
        if len(fields[name]) != channels:
            raise refuse(f"{name} has {len(fields[name])} values for {channels} channels")
    for entry in fields["shards"]:
        if not isinstance(entry, dict) or entry.keys() != _ENTRY_TYPES.keys():
            raise refuse(f"shards has the entry {entry!r}, which needs {sorted(_ENTRY_TYPES)}")
        for name, wanted in _ENTRY_TYPES.items():
            if not isinstance(entry[name], wanted):
                raise refuse(f"shards has {name} {entry[name]!r}, which is of the wrong type")
    if fields["examples"] < 1:
        raise refuse(f"examples is {fields['examples']}: it holds none")
    if fields["examples"] != sum(entry["examples"] for entry in fields["shards"]):
        raise refuse(f"examples is {fields['examples']}, not the sum of its shards'")


def shard_name(number: int) -> str:
    return f"shard-{number:05}.tar"


def index_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}.index.json")


def write_shard(
    shard: Path, sources: Sequence[str], outcomes: Iterable[Example | Skipped]
) -> ShardIndex:
    """Write the outcomes of encoding `sources` as one tar, then its index.

    Both appear whole or not at all, the index last. The same outcomes give the same bytes.
    """
    examples: dict[str, Members] = {}
    skipped: list[Skipped] = []
    moments = _Moments()
    with jobs.aside(shard) as partial:
        with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as tar:
            for outcome in outcomes:
                if isinstance(outcome, Skipped):
                    skipped.append(outcome)
                else:
                    examples[outcome.key] = _add_example(tar, outcome)
                    moments.add(outcome.latents)
        size, sha256 = partial.stat().st_size, jobs.hash_file(partial)
    index = ShardIndex(
        sources=tuple(sources),
        examples=examples,
        skipped=tuple(skipped),
        bytes=size,
        sha256=sha256,
        values=moments.values,
        sums=tuple(moments.sums),
        squares=tuple(moments.squares),
    )
    jobs.write_atomically(index_path(shard), index.to_json().encode())
    return index


def read_index(shard: Path) -> ShardIndex | None:
    """The index of a shard, where both were written whole and neither is damaged, else None."""
    path = index_path(shard)
    if not path.is_file() or not shard.is_file():
        return None
    try:
        index = ShardIndex.from_json(path.read_text())
    except _MALFORMED:
        return None
    return index if shard.stat().st_size == index.bytes else None


def latent_moments(indexes: Sequence[ShardIndex]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel over the latents of all `indexes`."""
    values = sum(index.values for index in indexes)
    filled = [index for index in indexes if index.values]
    means, deviations = [], []
    for channel in range(len(filled[0].sums)):
        mean = math.fsum(index.sums[channel] for index in filled) / values
        square = math.fsum(index.squares[channel] for index in filled) / values
        means.append(mean)
        deviations.append(math.sqrt(max(square - mean**2, 0.0)))
    return means, deviations


class _Moments:
    """Sums over latents, per channel, in float64."""

    def __init__(self) -> None:
        self.values = 0
        self.sums: list[float] = []
        self.squares: list[float] = []

    def add(self, latents: np.ndarray) -> None:
        precise = latents.astype(np.float64)
        sums = precise.sum(axis=(0, 2, 3)).tolist()
        squares = np.square(precise).sum(axis=(0, 2, 3)).tolist()
        self.sums = [a + b for a, b in zip(self.sums or [0.0] * len(sums), sums, strict=True)]
        self.squares = [
            a + b for a, b in zip(self.squares or [0.0] * len(sums), squares, strict=True)
        ]
        self.values += latents.size // len(sums)


def _add_example(tar: tarfile.TarFile, example: Example) -> Members:
    if "." in example.key:
        raise ValueError(f"key {example.key!r} has a dot: readers would split it there")
    members = {
        "latents.npy": _npy(example.latents),
        "masked_latents.npy": _npy(example.masked_latents),
        "mask.npz": _npz(example.mask),
        "json": json.dumps(example.record, sort_keys=True).encode(),
    }
    if example.pixels is not None:
        members["pixels.npy"] = _npy(example.pixels)
    return {name: _add_member(tar, f"{example.key}.{name}", members[name]) for name in members}


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> tuple[int, int]:
    # TarInfo's defaults are constants (time 0, owner 0, mode 0644): the bytes depend on no clock.
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
    blocks = -(-len(content) // tarfile.BLOCKSIZE)
    return tar.offset - blocks * tarfile.BLOCKSIZE, len(content)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _npz(mask: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, mask=mask)
    return buffer.getvalue()


class ShardedDataset:
    """Random access to the examples of one split of an encoded folder."""

    def __init__(self, root: Path, split: str) -> None:
        """Open `root`/`split`: its manifest is read, its shards' sizes are checked.

        Raises:
            jobs.BadInput: there is no such split, or one of its files is missing or damaged.
        """
        self.folder = Path(root) / split
        self.manifest = _read_manifest(Path(root), split)
        entries = self.manifest.shards
        for entry in entries:
            _check_size(self.folder / entry.name, entry.bytes)
        self._ends = list(itertools.accumulate(entry.examples for entry in entries))

    def __len__(self) -> int:
        return self.manifest.examples

    def __getitem__(self, index: int) -> Example:
        """Example `index`, its arrays' shapes and types checked against the manifest.

        Raises:
            IndexError: `index` is not in 0 to len - 1.
            jobs.BadInput: the example is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        key = self.keys[index]
        shard = self.folder / self.manifest.shards[number].name
        try:
            with shard.open("rb") as file:
                example = _read_example(file, key, self._indexes[number].examples[key])
            _check_example(example, self.manifest)
        except Exception as error:  # of damaged bytes numpy and zipfile raise a dozen kinds
            raise jobs.BadInput(
                f"{shard} is damaged at example {key} ({error}): copy it or encode it again"
            ) from error
        return example

    @functools.cached_property
    def keys(self) -> list[str]:
        """The examples' keys in the shards' order."""
        return [key for index in self._indexes for key in index.examples]

    @functools.cached_property
    def _indexes(self) -> list[ShardIndex]:
        return [_read_listed_index(self.folder, entry) for entry in self.manifest.shards]


def _read_manifest(root: Path, split: str) -> Manifest:
    path = root / split / MANIFEST
    if not path.is_file():
        there = sorted(found.parent.name for found in root.glob(f"*/{MANIFEST}"))
        remedy = f"it has {', '.join(there)}" if there else "make it with `vidfill encode`"
        raise jobs.BadInput(f"{root} holds no encoded split {split!r}: {remedy}")
    return Manifest.from_json(path.read_bytes(), path)


def _check_size(shard: Path, expected: int) -> None:
    if not shard.is_file():
        raise jobs.BadInput(f"{shard} is missing: copy it or encode it again")
    if shard.stat().st_size != expected:
        raise jobs.BadInput(
            f"{shard} has {shard.stat().st_size} bytes where its manifest says {expected}: "
            "copy it or encode it again"
        )


def _read_listed_index(folder: Path, entry: ShardEntry) -> ShardIndex:
    path = index_path(folder / entry.name)
    try:
        index = ShardIndex.from_json(path.read_text())
    except (OSError, *_MALFORMED) as error:
        raise jobs.BadInput(f"{path} is missing or damaged ({error}): encode it again") from error
    if index.sha256 != entry.sha256 or len(index.examples) != entry.examples:
        raise jobs.BadInput(f"{path} is of another shard than the manifest: encode it again")
    return index


def _read_example(file: BinaryIO, key: str, members: Members) -> Example:
    def read(name: str) -> io.BytesIO:
        offset, size = members[name]
        file.seek(offset)
        return io.BytesIO(file.read(size))

    def array(name: str) -> np.ndarray:
        return np.load(read(name), allow_pickle=False)

    with np.load(read("mask.npz"), allow_pickle=False) as arrays:
        mask = arrays["mask"]
    return Example(
        key=key,
        latents=array("latents.npy"),
        masked_latents=array("masked_latents.npy"),
        mask=mask,
        record=json.load(read("json")),
        pixels=array("pixels.npy") if "pixels.npy" in members else None,
    )


def _check_example(example: Example, manifest: Manifest) -> None:
    clip = (manifest.clip["frames"], manifest.clip["height"], manifest.clip["width"])
    expected = [
        ("latents", example.latents, manifest.latent_shape, np.float16),
        ("masked_latents", example.masked_latents, manifest.latent_shape, np.float16),
        ("mask", example.mask, clip, np.uint8),
    ]
    if example.pixels is not None:
        expected.append(("pixels", example.pixels, (*clip, 3), np.uint8))
    for name, array, shape, dtype in expected:
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{name} is {array.dtype} {list(array.shape)}, "
                f"the manifest says {np.dtype(dtype)} {list(shape)}"
            )
