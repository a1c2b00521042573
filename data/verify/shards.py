"""Whether a shard is what encode wrote: its bytes, members, examples and sums."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tarfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch
import xxhash
from jaxtyping import Float16, UInt8, UInt64

from ...files import hash_file
from ...modeling.autoencoder import latent_mask
from ..masks import OWN
from ..shards.format import DamagedShard, Example, Manifest, ShardIndex, family_of
from ..shards.reading import ExampleLayout, Shard, npy_header
from ..shards.writing import Moments
from ..storage.store import Store
from ..storage.transfer import WrongFile
from .defects import Inspection
from .samples import Sample

RECORD_TYPES = {"source": str, "split": str, "first_frame": int, "family": str, "fill": list}


@dataclass(frozen=True)
class ShardSummary:
    """What the checks of a whole split need to know of a shard."""

    index: ShardIndex  # without what it has of each row
    key_hashes: UInt64[np.ndarray, " keys"]  # XXH3, by row
    samples: list[Sample]


def inspect_shard(
    store: Store, manifest: Manifest, number: int, sampled: Collection[int], inspection: Inspection
) -> ShardSummary | None:
    """Check a shard, and keep its examples of the rows `sampled`; None where it cannot be read."""
    inspection.checked["shards"] += 1
    find = functools.partial(inspection.add_damage, number)
    try:
        path = store.path(number)
        shard = Shard(path, number, manifest)
        inspection.checked["SHA-256"] += 1
        # Before the examples, which then come out of the page cache.
        if hash_file(path) != manifest.shards.sha256[number]:
            find("SHA-256", "its bytes are not those that were written")
        inspection.checked["tar members"] += 1
        if reason := _find_wrong_member(shard):
            find("tar members", reason)
        samples = _inspect_examples(shard, manifest, sampled, inspection)
        hashes = [xxhash.xxh3_64_intdigest(key.encode()) for key in shard.keys]
        index = dataclasses.replace(shard.index, keys=(), members={}, spans=())
        return ShardSummary(index, np.array(hashes, np.uint64), samples)
    except DamagedShard as error:
        find("shards", error.reason)
    except WrongFile as error:
        find("shards", f"it, or its index, {error.reason}")
    except OSError as error:
        find("shards", f"it cannot be read: {error.strerror}")
    return None


def _find_wrong_member(shard: Shard) -> str:
    """How the members that a plain reader of tars finds differ from those in the index."""
    index = shard.index
    places = (
        (f"{key}.{name}", column.offsets[row], column.sizes[row])
        for row, key in enumerate(index.keys)
        for name, column in index.members.items()
    )
    try:
        with tarfile.open(shard.path, "r:") as tar:
            for member, place in itertools.zip_longest(tar, places):
                if member is None:
                    return f"it ends before {place[0]}"
                if (member.name, member.offset_data, member.size) != place or not member.isreg():
                    expected = f"where its index has {place[0]}" if place else "behind its end"
                    return f"it has {member.name!r} {expected}"
    except tarfile.TarError as error:
        return f"a plain reader of tars says: {error}"
    return ""


def _inspect_examples(
    shard: Shard, manifest: Manifest, sampled: Collection[int], inspection: Inspection
) -> list[Sample]:
    """Check every example, and that they add up to the index's sums; return those sampled."""
    span = ExampleLayout.of(manifest)
    raw = np.empty(span.bytes, np.uint8)
    stored = span.views(torch.from_numpy(raw)[None])["latent_mask"][0].numpy()
    find = functools.partial(inspection.add_damage, shard.number)
    samples, moments, complete = [], Moments(), True
    for row, key in enumerate(shard.keys):
        inspection.checked["XXH3, shapes"] += 1
        try:
            shard.read_span(row, raw.data)
            example = shard.read(row)
            reason = _find_wrong_header(raw, span) or _find_wrong_record(example, manifest)
        except DamagedShard as error:
            reason = error.reason
        if reason:
            find("XXH3, shapes", reason, key)
            complete = False
            continue
        inspection.checked["finite values"] += 1
        if reason := _find_not_finite(example):
            find("finite values", reason, key)
            complete = False
            continue
        inspection.checked["masks"] += 1
        if reason := _find_wrong_mask(example, stored):
            find("masks", reason, key)
        moments.add(example)
        if row in sampled:
            samples.append(Sample(shard.number, example))
    inspection.checked["statistics"] += complete
    if complete and not _are_sums(moments, shard.index):
        find("statistics", "its index has other sums of latents than the shard")
    return samples


def _find_wrong_header(raw: UInt8[np.ndarray, " span"], span: ExampleLayout) -> str:
    """Whether other readers find the arrays that training takes, which looks at no header."""
    for name, place in span.arrays.items():
        if raw[place.offset : place.data].tobytes() != npy_header(place.shape):
            return f"{name} is no array of the manifest's shape {list(place.shape)}"
    return ""


def _find_wrong_record(example: Example, manifest: Manifest) -> str:
    record = example.record if isinstance(example.record, dict) else {}
    for name, kind in RECORD_TYPES.items():
        if not isinstance(record.get(name), kind):
            return f"its record has no {name}"
    if record["split"] != manifest.split or record["family"] != family_of(example.key):
        return f"its record is of the split {record['split']} and the family {record['family']}"
    levels = record["fill"]
    if len(levels) != 3 or not all(type(level) is int and 0 <= level <= 255 for level in levels):
        return f"its fill is {levels}, which is no colour"
    path = PurePosixPath(record["source"])
    if path.is_absolute() or ".." in path.parts:
        return f"its source {record['source']} would lie outside the folder of videos"
    return ""


def _find_not_finite(example: Example) -> str:
    for name in ("latents", "masked_latents", "log_variance"):
        array = getattr(example, name)
        if array is not None and not np.isfinite(array).all():
            return f"{name} holds NaN or infinity"
    return ""


def _find_wrong_mask(example: Example, stored: Float16[np.ndarray, "frames 1 h w"]) -> str:
    mask = example.mask
    least, most = mask.min(), mask.max()
    if most > 1:
        return f"its mask has the value {most}: 1 is the hole, 0 is not"
    # A video's own masks may be so, where there was nothing to hide.
    if least == most and family_of(example.key) != OWN:
        return "its mask hides the whole clip" if most else "its mask hides nothing"
    shrunk = latent_mask(mask, *stored.shape[-2:]).numpy().astype(np.float16)
    if not np.array_equal(shrunk, stored):
        return "its latent_mask is not its mask's"
    return ""


def _are_sums(moments: Moments, index: ShardIndex) -> bool:
    """Whether an index has these moments, but for the order of summation."""
    computed = np.array([moments.values, *moments.sums, *moments.squares])
    said = np.array([index.values, *index.sums, *index.squares])
    tolerance = 1e-6 * max(moments.values, 1)
    return computed.shape == said.shape and np.allclose(computed, said, 1e-6, tolerance)
