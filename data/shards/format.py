"""The format of shards: what a manifest, an index and an example hold."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Gt, Interval
from jaxtyping import Float16, UInt8
from pydantic import (
    AllowInfNan,
    ConfigDict,
    GetPydanticSchema,
    InstanceOf,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    StringConstraints,
    WrapValidator,
    model_validator,
    with_config,
)
from pydantic.dataclasses import dataclass as record
from typing_extensions import TypedDict

from ...errors import BadInput
from ...files import PLAIN
from ...records import Text, parse_json

FORMAT = 2
TRAINING = ("latents", "masked_latents", "latent_mask", "log_variance")  # arrays, in their order

# A dot would end the key, a slash would leave the folder.
KEY_PATTERN = "^[A-Za-z0-9_-]+$"

Key = Annotated[StrictStr, StringConstraints(pattern=KEY_PATTERN)]
Name = InstanceOf[str]  # of a file: its bytes may be no UTF-8, which StrictStr refuses
Digest = Annotated[StrictStr, StringConstraints(pattern="^[0-9a-f]{64}$")]
Count = Annotated[StrictInt, Interval(ge=0, le=2**53)]
Finite = Annotated[StrictFloat, AllowInfNan(False)]
PositiveCount = Annotated[StrictInt, Interval(ge=1, le=2**53)]
EXACT, OPEN = ConfigDict(extra="forbid"), ConfigDict(extra="allow")

StoredLatents = Float16[np.ndarray, "frames channels h w"]


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

    StoredLatents are those of the posterior's mean; `mask` is 1 in the hole.
    """

    key: str
    latents: StoredLatents
    masked_latents: StoredLatents
    mask: UInt8[np.ndarray, "frames height width"]
    record: dict[str, Any]
    pixels: UInt8[np.ndarray, "frames height width 3"] | None = None
    log_variance: StoredLatents | None = None


@record(frozen=True, config=EXACT)
class Skipped:
    """A video that gave no clip, and why."""

    source: Name
    reason: StrictStr


@record(frozen=True)
class MemberPlaces:
    """Where one member of every example lies in a shard, by row, and XXH3's 64 bits in hex."""

    offsets: tuple[Count, ...]  # bytes from the tar's start
    sizes: tuple[Count, ...]  # bytes
    checksums: tuple[StrictStr, ...]


@record(frozen=True, config=EXACT)
class ShardIndex:
    """What is known of one shard: its sources, where its members lie, and its latents' moments."""

    sources: tuple[Name, ...]
    keys: tuple[Key, ...]
    members: dict[str, MemberPlaces]  # by the name behind the key: "latents.npy"
    spans: tuple[StrictStr, ...]  # XXH3 of what training reads at a time, by row
    skipped: tuple[Skipped, ...]
    bytes: Count
    sha256: StrictStr
    values: Count  # latent values per channel
    sums: tuple[StrictFloat, ...]  # per channel, float64
    squares: tuple[StrictFloat, ...]  # per channel, float64; of draws where there is a log-variance

    @model_validator(mode="after")
    def _check(self) -> ShardIndex:
        rows = len(self.keys)
        columns = {"spans": self.spans}
        for name, places in self.members.items():
            columns |= {f"{name} {field}": column for field, column in vars(places).items()}
            if rows and max(*places.offsets, *places.sizes) > self.bytes:
                raise ValueError(f"members.{name} lies outside the shard's {self.bytes} bytes")
        for name, column in columns.items():
            if len(column) != rows:
                raise ValueError(f"{name} has {len(column)} entries for {rows} keys")
        return self

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: Text) -> ShardIndex:
        """Read an index; ValueError names the field that is missing or wrong, in one line."""
        return parse_json(cls, text)


@record(frozen=True, config=EXACT)
class ShardTable:
    """What a manifest says of its shards, by their numbers."""

    examples: tuple[Count, ...]
    bytes: tuple[Count, ...]
    sha256: tuple[Digest, ...]

    @model_validator(mode="after")
    def _check(self) -> ShardTable:
        lengths = {name: len(column) for name, column in vars(self).items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"lists of different lengths: {lengths}")
        return self

    @classmethod
    def of(cls, indexes: Sequence[ShardIndex]) -> ShardTable:
        return cls(
            tuple(len(index.keys) for index in indexes),
            tuple(index.bytes for index in indexes),
            tuple(index.sha256 for index in indexes),
        )


@with_config(OPEN)
class _Autoencoder(TypedDict):
    name: Name
    kind: StrictStr
    sha256: StrictStr
    scaling_factor: Annotated[Finite, Gt(0)]
    downsampling: Annotated[StrictInt, Interval(ge=1, le=64)]  # so that a mask is no bomb
    channels: PositiveCount


@with_config(OPEN)
class _Clip(TypedDict):
    frames: PositiveCount
    height: PositiveCount
    width: PositiveCount


@with_config(OPEN)
class _Masks(TypedDict):
    families: dict[str, Any]
    per_clip: PositiveCount
    seed: StrictInt


def _checked_as(kind: Any) -> GetPydanticSchema:
    """Check a plain dictionary as a `kind` of dictionary."""
    return GetPydanticSchema(lambda _, handler: handler.generate_schema(kind))


# A checked dictionary would have its fields in another order, and a manifest other bytes.
_UNCHANGED = WrapValidator(lambda fields, check: check(fields) and fields)


@record(frozen=True, config=EXACT)
class Manifest:
    """What a split's shards hold."""

    split: Annotated[StrictStr, PLAIN]
    autoencoder: Annotated[dict[str, Any], _checked_as(_Autoencoder), _UNCHANGED]
    posterior: Literal["mean", "moments"]  # with "moments" shards hold the log-variance too
    pixels: StrictBool  # shards hold the clips' pixels too
    clip: Annotated[dict[str, int], _checked_as(_Clip), _UNCHANGED]  # frames, height, width
    latent_shape: tuple[PositiveCount, PositiveCount, PositiveCount, PositiveCount]  # f c h w
    masks: Annotated[dict[str, Any], _checked_as(_Masks), _UNCHANGED]
    fill: StrictStr | list[StrictInt]  # "median", or one colour for all clips
    latents_mean: tuple[StrictFloat, ...]  # per channel, over `latents`
    latents_std: tuple[StrictFloat, ...]
    examples: PositiveCount
    shards: ShardTable
    lanes: PositiveCount  # of the stream's order
    block: PositiveCount  # examples that a lane permutes at a time
    skipped: Count  # videos
    format: int = FORMAT

    @model_validator(mode="before")
    @classmethod
    def _check_format(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and (found := fields.get("format")) != FORMAT:
            raise ValueError(f"format is {found!r:.80}, this version reads {FORMAT}")
        return fields

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        frames, channels, h, w = self.latent_shape
        factor = self.autoencoder["downsampling"]
        clip = {"frames": frames, "height": h * factor, "width": w * factor}
        if channels != self.autoencoder["channels"] or clip.items() - self.clip.items():
            raise ValueError(f"latent_shape {list(self.latent_shape)} is not that of its clips")
        for name in ("latents_mean", "latents_std"):
            if len(values := getattr(self, name)) != channels:
                raise ValueError(f"{name} has {len(values)} values for {channels} channels")
        if self.examples != (total := sum(self.shards.examples)):
            raise ValueError(f"examples is {self.examples}, and its shards hold {total}")
        return self

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: Text) -> Manifest:
        """Read a manifest; ValueError names the field that is missing or wrong, in one line."""
        return parse_json(cls, text)


def family_of(key: str) -> str:
    """The mask's family, which ends an example's key: FAMILY, or FAMILY-2 for its second mask."""
    return key.rpartition("_")[2].partition("-")[0]


def in_blocks(size: int) -> int:
    """Bytes that a member's content takes in a tar, which is written in blocks."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
