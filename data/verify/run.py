"""`vidfill verify`: whether a data set is what encode wrote, and holds what it says.

Every byte is read from its disk or server once: a few threads inspect shards side by side. This
module finds the splits, checks what concerns a whole split, and repairs; `shards` checks a shard,
`samples` encodes a few clips again, `defects` prints the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ... import jobs, options
from ...errors import BadInput, say
from ...files import PARTIAL, in_threads
from ...modeling.autoencoder import Autoencoder, load_autoencoder, refuse_another
from ...processes import choose_device
from ...progress import show_progress
from ...records import load_json, parse_json, read_small
from ..encode.plan import PLAN, ShardId, read_splits
from ..encode.run import encode
from ..encode.settings import EncodeConfig
from ..encode.sources import SPLITS
from ..shards.format import Manifest, ShardIndex, Skipped
from ..shards.reading import Shard, has_split
from ..shards.writing import latent_moments, read_index
from ..storage.names import INDEX_SUFFIX, MANIFEST, SKIPPED, index_name, shard_name
from ..storage.store import CacheConfig, LocalStore, Store, open_store
from .defects import ANEW, ORIGINAL, REPAIR, Inspection, is_sound, show
from .samples import choose_samples, encode_again, find_frames
from .settings import EXAMPLES, VerifyConfig
from .shards import ShardSummary, inspect_shard

JOB = "job.json"
READERS = 8  # threads that read shards, at most; hashing and inflating release Python's lock
READ_AHEAD = 64  # shards that the threads are given at a time


def verify(config: VerifyConfig) -> list[Inspection]:
    """Check a data set and print what is wrong; return an inspection of each split.

    Raises:
        BadInput: there is no such data set, or it cannot be repaired from here.
    """
    jobs.refuse_launcher("verify")
    options.check(config)
    store = open_store(config.dataset, "", CacheConfig())
    root = store.folder if isinstance(store, LocalStore) else None
    if config.repair and root is None:
        raise BadInput(
            f"repair is true, and {config.dataset} is a URL: repair the folder that it was "
            "uploaded from"
        )
    if config.videos and not config.videos.is_dir():
        raise BadInput(f"videos is {config.videos}, which is no folder: name the folder of videos")
    inspections = _inspect(config, root)
    if config.repair and root and not is_sound(inspections):
        _repair(root, config, inspections)
        inspections = _inspect(config, root)
    return inspections


def _inspect(config: VerifyConfig, root: Path | None) -> list[Inspection]:
    """Inspect every split, one after the other, and print the result."""
    inspections = []
    # A cache of its own, so that what is behind a URL is read there and not in another job's cache.
    with tempfile.TemporaryDirectory(prefix="vidfill-verify-") as folder:
        for split in _find_splits(config, root):
            store = open_store(config.dataset, split, CacheConfig(folder))
            with contextlib.closing(store):
                inspections.append(_inspect_split(split, store, config, root))
    _compare_splits(inspections)
    show(inspections)
    return inspections


def _compare_splits(inspections: Sequence[Inspection]) -> None:
    """Check that all splits hold latents of one space."""
    known = [(one, one.manifest) for one in inspections if one.manifest]
    for (first, ours), (one, theirs) in itertools.pairwise(known):
        try:
            refuse_another(
                *(theirs.autoencoder, ours.autoencoder, "it was encoded with"),
                *(f"the split {first.split} with", "they are of no use together"),
            )
        except BadInput as error:
            one.add("manifest", MANIFEST, str(error), ANEW)


def _find_splits(config: VerifyConfig, root: Path | None) -> list[str]:
    """The splits to inspect: all that the plan names, or of which there is a shard or a manifest.

    BadInput says that there is none, or not the one that was asked for.
    """
    if root:
        try:
            names = {*read_splits(root / PLAN)}
        except ValueError as error:
            raise BadInput(f"{root / PLAN} is damaged: {error}") from None
        for pattern in ("shard-*.tar", MANIFEST):
            names |= {path.parent.name for path in root.glob(f"*/{pattern}")}
    elif config.split:
        names = {config.split}
    else:
        names = set(open_store(config.dataset, "", CacheConfig()).splits())
        # Some servers do not list folders.
        names = names or {name for name in SPLITS if has_split(config.dataset, name)}
    if not names:
        raise BadInput(f"{config.dataset} holds no encoded split: make one with `vidfill encode`")
    order = [*SPLITS, *sorted(names)]
    found = sorted(names, key=order.index)
    if config.split and config.split not in found:
        raise BadInput(f"split is {config.split!r}; {config.dataset} has {', '.join(found)}")
    return [config.split] if config.split else found


def _read_json(path: Path, field: str) -> dict[str, Any]:
    """An object in the object in a file; empty where there is none."""
    try:
        found = parse_json(dict[str, Any], read_small(path)).get(field)
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class _Split(NamedTuple):
    """A split whose shards were read."""

    store: Store
    manifest: Manifest
    summaries: list[ShardSummary | None]  # by shard; None where it could not be read
    inspection: Inspection  # takes the defects

    @property
    def indexes(self) -> list[ShardIndex]:
        return [summary.index for summary in self.summaries if summary]


def _inspect_split(name: str, store: Store, config: VerifyConfig, root: Path | None) -> Inspection:
    inspection = Inspection(name, REPAIR if root else ORIGINAL)
    manifest = inspection.manifest = _read_manifest(store, inspection)
    if manifest is None:
        return inspection
    store.expect(manifest.shards)
    summaries = _inspect_shards(store, manifest, config.samples, inspection)
    split = _Split(store, manifest, summaries, inspection)
    _check_manifest(manifest, inspection)
    _check_skipped(split)
    if root:
        _check_strays(root / name, manifest, inspection)
    _check_keys(split)
    _check_statistics(split)
    encoding = _read_json(root / JOB, "config") if root else {}
    inspection.notes["encoded again"] = _compare_samples(split, config, encoding)
    return inspection


def _read_manifest(store: Store, inspection: Inspection) -> Manifest | None:
    inspection.checked["manifest"] += 1
    try:
        return Manifest.from_json(store.read(MANIFEST))
    except FileNotFoundError:
        inspection.add("manifest", MANIFEST, "it is missing, so nothing here can be checked")
    except ValueError as error:
        inspection.add("manifest", MANIFEST, str(error))
    return None


def _inspect_shards(
    store: Store, manifest: Manifest, samples: int, inspection: Inspection
) -> list[ShardSummary | None]:
    """Inspect all shards; by number, what the checks below need to know of those that were read."""
    rows = choose_samples(manifest, samples)
    count, threads = len(manifest.shards.examples), min(READERS, os.cpu_count() or 1)

    def inspect(number: int) -> tuple[Inspection, ShardSummary | None]:
        found = Inspection(inspection.split, inspection.remedy)
        return found, inspect_shard(store, manifest, number, rows.get(number, []), found)

    summaries = []
    with show_progress(f"verify {inspection.split}", count, "shards") as progress:
        for found, summary in in_threads(inspect, range(count), threads, READ_AHEAD):
            inspection.merge(found)
            summaries.append(summary)
            progress.advance(note=shard_name(len(summaries) - 1))
    return summaries


def _check_manifest(manifest: Manifest, inspection: Inspection) -> None:
    if manifest.split != inspection.split:
        inspection.add("manifest", MANIFEST, f"it is that of the split {manifest.split!r}")
    if max(manifest.lanes, manifest.block) > manifest.examples:
        reason = f"{manifest.lanes} lanes of blocks of {manifest.block} are more than its examples"
        inspection.add("manifest", MANIFEST, reason)


def _check_skipped(split: _Split) -> None:
    """Check that the list of skipped videos and the manifest say what the shards' indexes say."""
    inspection = split.inspection
    inspection.checked["manifest"] += 1
    skipped = {skip.source: skip.reason for index in split.indexes for skip in index.skipped}
    expected = [dataclasses.asdict(Skipped(*item)) for item in skipped.items()]
    try:
        listed = [load_json(line) for line in split.store.read(SKIPPED).splitlines()]
    except FileNotFoundError:
        inspection.add("manifest", SKIPPED, "it is missing")
        return
    except ValueError:
        listed = None
    if listed is None or (None not in split.summaries and listed != expected):
        inspection.add("manifest", SKIPPED, "it is not what was written")
    elif split.manifest.skipped != len(listed):
        reason = f"it says that {split.manifest.skipped} videos were skipped, not {len(listed)}"
        inspection.add("manifest", MANIFEST, reason)


def _check_strays(folder: Path, manifest: Manifest, inspection: Inspection) -> None:
    """Check that there are no shards or indexes beside the manifest's."""
    numbers = range(len(manifest.shards.examples))
    known = {name(number) for number in numbers for name in (shard_name, index_name)}
    for name in sorted(set(os.listdir(folder)) - known):
        if name.endswith((".tar", INDEX_SUFFIX)) and not name.startswith(PARTIAL):
            inspection.add("manifest", name, "no shard of the manifest's", remedy="remove it")


def _check_keys(split: _Split) -> None:
    """Check that no two examples share a key; in memory a key is 8 bytes."""
    hashes = [summary.key_hashes for summary in split.summaries if summary]
    unique, counts = np.unique(
        np.concatenate([np.empty(0, np.uint64), *hashes]), return_counts=True
    )
    split.inspection.checked["keys"] = int(counts.sum())
    repeated = unique[counts > 1]
    for number, summary in enumerate(split.summaries):
        if summary and (rows := np.flatnonzero(np.isin(summary.key_hashes, repeated)).tolist()):
            keys = Shard(split.store.path(number), number, split.manifest).keys
            for row in rows:
                where = f"{shard_name(number)} {keys[row]}"
                split.inspection.add("keys", where, "another example has this key too", ANEW)


def _check_statistics(split: _Split) -> None:
    """Check that the manifest's mean and standard deviation follow from the shards' sums."""
    indexes, inspection = split.indexes, split.inspection
    if len(indexes) < len(split.summaries) or not any(index.values for index in indexes):
        inspection.notes["statistics"] = "some shards could not be read"
        return
    mean, std = latent_moments(indexes)
    for name, computed in (("latents_mean", mean), ("latents_std", std)):
        said = getattr(split.manifest, name)
        if not np.allclose(said, computed, rtol=1e-5, atol=1e-6, equal_nan=True):
            channel = int(np.argmax(np.abs(np.subtract(said, computed))))
            reason = (
                f"{name} of channel {channel} is {said[channel]:.6g}, that of the shards "
                f"{computed[channel]:.6g}"
            )
            inspection.add("statistics", MANIFEST, reason)


def _compare_samples(split: _Split, config: VerifyConfig, encoding: dict[str, Any]) -> str:
    """Encode the samples again whose frames are at hand; say why others are not."""
    samples = [sample for summary in split.summaries if summary for sample in summary.samples]
    videos = config.videos or (Path(encoding["videos"]) if "videos" in encoding else None)
    if not samples:
        return "no clip could be read" if config.samples else "samples is 0"
    found = find_frames(samples, split.manifest.clip, videos, encoding.get("fit"))
    if (first := next(found, None)) is None:
        return "no clip's video is at hand: give --videos"
    try:
        autoencoder = _load(split.manifest, config)
    except BadInput as error:
        if config.autoencoder:
            raise
        return str(error)
    at_hand = itertools.chain([first], found)
    encode_again(at_hand, len(samples), autoencoder, split.manifest, split.inspection)
    missing = len(samples) - split.inspection.checked["encoded again"]
    return f"the videos of {missing} more are not at hand: give --videos" if missing else ""


def _load(manifest: Manifest, config: VerifyConfig) -> Autoencoder:
    """The autoencoder of a split; BadInput where it cannot be loaded, or is another one."""
    recorded = manifest.autoencoder
    name = config.autoencoder or str(recorded["name"])
    device = choose_device(config.device)
    autoencoder = load_autoencoder(name, device, recorded.get("precision", "float32"))
    refuse_another(
        *(autoencoder.identity(), recorded, "autoencoder is"),
        *(f"the split {manifest.split} was encoded with", "name that one"),
    )
    return autoencoder


def _repair(root: Path, config: VerifyConfig, inspections: Sequence[Inspection]) -> None:
    """Encode what is damaged or missing, with the configuration of the first time."""
    defects = [defect for inspection in inspections for defect in inspection.defects]
    if all(defect.remedy != REPAIR for defect in defects):
        say("vidfill verify: encoding again repairs none of this")
        return
    encoding = _read_json(root / JOB, "config")
    try:
        videos = config.videos or Path(encoding["videos"])
        mask_files = encoding["mask_files"] and Path(encoding["mask_files"])
        places = {"videos": videos, "out": root, "mask_files": mask_files, "device": config.device}
        again = EncodeConfig(**{**encoding, **places})
    except (KeyError, TypeError):
        raise BadInput(
            f"{root / JOB} does not say how this was encoded: encode into another folder"
        ) from None
    if not videos.is_dir():
        raise BadInput(f"cannot repair: the videos are not in {videos}; give --videos")
    encode(again, {ShardId(one.split, number) for one in inspections for number in one.damaged})
    for inspection in inspections:
        if inspection.manifest:
            _say_changed(root / inspection.split, inspection.manifest, inspection.damaged)


def _say_changed(folder: Path, manifest: Manifest, damaged: Collection[int]) -> None:
    """Name the repaired shards that are not, byte for byte, what the manifest said."""
    for number in sorted(damaged):
        index = read_index(folder, number)
        if index and index.sha256 != manifest.shards.sha256[number]:
            say(
                f"vidfill verify: {folder / shard_name(number)} has another SHA-256 than its "
                "manifest said: either the manifest was made from damaged data, or this device or "
                "version rounds differently"
            )


def main(argv: Sequence[str] | None = None) -> int:
    inspections: list[Inspection] = []
    status = jobs.main(
        VerifyConfig,
        lambda config: inspections.extend(verify(config)),
        argv,
        verb="verify",
        examples=EXAMPLES,
    )
    return status or int(not is_sound(inspections))
