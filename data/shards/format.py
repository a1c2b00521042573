"""The format of shards: what a manifest, an index and an example hold."""

from __future__ import annotations

import dataclasses
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16, UInt8

from ...errors import BadInput

FORMAT = 2
TRAINING = ("latents", "masked_latents", "latent_mask", "log_variance")  # arrays, in their order

_KEY = re.compile(r"[\w-]+", re.ASCII)  # a dot would end the key, a slash would leave the folder
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError)  # of reading JSON that is not ours

Text = str | bytes
Latents = Float16[np.ndarray, "frames channels h w"]


class DamagedShard(BadInput):
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
            BadInput: naming the field of `where` that is missing or wrong.
        """
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise BadInput(f"{where} is no JSON ({error}): encode again") from None
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
    def refuse(what: str) -> BadInput:
        return BadInput(f"{where}: {what}; encode again")

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


def _in_blocks(size: int) -> int:
    """Bytes that a member's content takes in a tar, which is written in blocks."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
