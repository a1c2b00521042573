"""The readers that `benchmarks.data` compares, all on the same synthetic examples.

Every reader delivers shuffled batches of latents, masked latents and latent masks in float16, each
example once per epoch. Whole epochs are timed: the first, which includes opening the data set, and
later ones, in which files may stay open.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
import xxhash
from vidfill.data.masks import draw_mask
from vidfill.data.shards.format import Example, Manifest, ShardTable
from vidfill.data.shards.order import choose_lanes
from vidfill.data.shards.reading import ExampleLayout, ShardedDataset
from vidfill.data.shards.stream import Stream
from vidfill.data.shards.writing import latent_moments, read_index, write_shard
from vidfill.data.storage.names import MANIFEST, shard_name
from vidfill.progress import show_progress

SPLIT = "train"
FRAMES, CHANNELS, DOWNSAMPLING = 20, 4, 8
MEMBERS = ("latents.npy", "masked_latents.npy", "latent_mask.npy")
THREE, FLAT = "litdata-three", "litdata-flat"  # folders: dicts of three tensors; one flat tensor
BATCH = 32  # examples
BUFFER = 1_000  # examples in webdataset's shuffle buffer

Arrays = Sequence[Any]  # of a batch, in the order of MEMBERS: numpy's or torch's
Epoch = Callable[[], Iterator[Arrays]]


@dataclasses.dataclass(frozen=True)
class SyntheticShards:
    """The data set that every reader reads."""

    folder: Path  # `train` with our shards, `litdata` with litdata's chunks
    examples: int  # a multiple of BATCH
    shards: int
    latent: int  # height and width of the latents

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        return [
            (FRAMES, channels, self.latent, self.latent) for channels in (CHANNELS, CHANNELS, 1)
        ]

    @property
    def sizes(self) -> list[int]:
        """The number of values in each array."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def example_bytes(self) -> int:
        """Bytes of the three arrays."""
        return 2 * sum(self.sizes)

    @property
    def tars(self) -> list[str]:
        return [str(self.folder / SPLIT / shard_name(n)) for n in range(self.shards)]


# The synthetic data set


def write_dataset(data: SyntheticShards) -> None:
    """Write shards of random latents under drawn masks."""
    bounds = [data.examples * n // data.shards for n in range(data.shards + 1)]
    with show_progress("writing", data.shards, "shards") as progress:
        for number, (first, last) in enumerate(itertools.pairwise(bounds)):
            examples = (make_example(index, data) for index in range(first, last))
            write_shard(data.folder / SPLIT, number, [], examples)
            progress.advance()
    sizes = [last - first for first, last in itertools.pairwise(bounds)]
    write_manifest(data.folder / SPLIT, data, *choose_lanes(sizes))


def make_example(index: int, data: SyntheticShards) -> Example:
    draw = np.random.default_rng(index)
    latents, masked = draw.standard_normal((2, *data.shapes[0]), np.float32).astype(np.float16)
    side = data.latent * DOWNSAMPLING
    return Example(
        key=f"video_{index:05}_00000_stationary",
        latents=latents,
        masked_latents=masked,
        mask=draw_mask("stationary", FRAMES, side, side, (0, index)),
        record={"source": f"train/video_{index:05}.mp4", "split": SPLIT, "first_frame": 0},
    )


def write_manifest(folder: Path, data: SyntheticShards, lanes: int, block: int) -> None:
    """Write the manifest of the shards in `folder`."""
    indexes = [index for n in range(data.shards) if (index := read_index(folder, n))]
    side = data.latent * DOWNSAMPLING
    mean, std = latent_moments(indexes)
    manifest = Manifest(
        split=SPLIT,
        autoencoder={
            "name": "random",
            "kind": "none",
            "sha256": "0" * 64,
            "scaling_factor": 1.0,
            "downsampling": DOWNSAMPLING,
            "channels": CHANNELS,
        },
        posterior="mean",
        pixels=False,
        clip={"frames": FRAMES, "height": side, "width": side},
        latent_shape=data.shapes[0],
        masks={"families": {"stationary": 1.0}, "per_clip": 1, "seed": 0},
        fill="median",
        latents_mean=tuple(mean),
        latents_std=tuple(std),
        examples=data.examples,
        shards=ShardTable.of(indexes),
        lanes=lanes,
        block=block,
        skipped=0,
    )
    (folder / MANIFEST).write_text(manifest.to_json())


def has_litdata() -> bool:
    return importlib.util.find_spec("litdata") is not None


def write_chunks(data: SyntheticShards) -> None:
    """Write the same examples in both of litdata's forms."""
    from litdata.streaming.cache import Cache

    three = Cache(str(data.folder / THREE), chunk_bytes="64MB")
    flat = Cache(str(data.folder / FLAT), chunk_bytes="64MB")
    with copy_limit(data) as epoch:
        examples = (example for batch in epoch() for example in zip(*batch, strict=True))
        for index, arrays in enumerate(examples):
            three[index] = dict(zip(MEMBERS, arrays, strict=True))
            flat[index] = torch.cat([array.flatten() for array in arrays])
    for cache in (three, flat):
        cache.done()
        cache.merge()


# The readers


@contextlib.contextmanager
def vidfill_stream(data: SyntheticShards, threads: int = 1) -> Iterator[Epoch]:
    """Ours, including every check."""
    stream = Stream(ShardedDataset(data.folder, SPLIT), BATCH, seed=0)
    with contextlib.closing(stream.run(0, workers=threads)) as batches:
        arrays = ([each.latents, each.masked_latents, each.latent_mask] for each in batches)
        yield lambda: itertools.islice(arrays, data.examples // BATCH)


def webdataset_pipeline(data: SyntheticShards) -> webdataset.WebDataset:
    """Shuffles shards, leaves in the tar what training does not need, shuffles before decoding."""
    return webdataset.WebDataset(
        data.tars,
        shardshuffle=data.shards,
        select_files=lambda name: name.endswith(MEMBERS),
    ).shuffle(BUFFER)


def plain_pipeline(data: SyntheticShards) -> webdataset.WebDataset:
    return webdataset_pipeline(data).decode().to_tuple(*MEMBERS).batched(BATCH)


@contextlib.contextmanager
def plain_webdataset(data: SyntheticShards) -> Iterator[Epoch]:
    """With webdataset's own parts: decode, to_tuple, batched."""
    yield plain_pipeline(data).__iter__


@contextlib.contextmanager
def tuned_webdataset(data: SyntheticShards) -> Iterator[Epoch]:
    """Only its reading and shuffling; a few lines that know the shapes decode and stack."""

    def decode(sample: dict[str, Any]) -> list[np.ndarray]:
        return [
            np.frombuffer(sample[name], np.float16)[-math.prod(shape) :].reshape(shape)
            for name, shape in zip(MEMBERS, data.shapes, strict=True)
        ]

    def stack(samples: list[list[np.ndarray]]) -> Arrays:
        return [np.stack(column) for column in zip(*samples, strict=True)]

    pipeline = webdataset_pipeline(data).map(decode).batched(BATCH, collation_fn=stack)
    yield pipeline.__iter__


@contextlib.contextmanager
def loaded_webdataset(data: SyntheticShards, workers: int) -> Iterator[Epoch]:
    """The plain pipeline in persistent processes that return batches in shared memory."""
    pipeline = plain_pipeline(data).map_tuple(*[torch.from_numpy] * len(MEMBERS))
    loader = webdataset.WebLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    yield loader.__iter__


@contextlib.contextmanager
def litdata_loader(data: SyntheticShards, chunks: str, workers: int = 0) -> Iterator[Epoch]:
    """litdata's loader over either form of its chunks."""
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(data.folder / chunks), shuffle=True, drop_last=False)
    loader = StreamingDataLoader(
        dataset,
        batch_size=BATCH,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
    )

    def split(batch: Any) -> Arrays:
        if chunks == THREE:
            return [batch[name] for name in MEMBERS]
        parts = batch.split(data.sizes, dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, data.shapes, strict=True)]

    yield lambda: map(split, loader)


@contextlib.contextmanager
def copy_limit(data: SyntheticShards, remap: bool = False) -> Iterator[Epoch]:
    """The same bytes, in random order, copied out of mapped files into one buffer.

    Args:
        data: What to read.
        remap: Map the files again in each epoch, as when an epoch is longer than files stay open:
            the kernel then has to map every page once per epoch.
    """
    dataset = ShardedDataset(data.folder, SPLIT)
    span = ExampleLayout.of(dataset.manifest)
    shards = [dataset.shard(number) for number in range(data.shards)]
    places = [
        (number, first)
        for number, shard in enumerate(shards)
        for first in shard.index.members[MEMBERS[0]].offsets
    ]
    buffer = np.zeros((BATCH, span.bytes), np.uint8)
    arrays = list(span.views(torch.from_numpy(buffer)).values())
    contents = [map_file(shard.path) for shard in shards]

    def epoch() -> Iterator[Arrays]:
        mapped = [map_file(shard.path) for shard in shards] if remap else contents
        order = np.random.default_rng().permutation(len(places)).reshape(-1, BATCH)
        for rows in order.tolist():
            for slot, row in enumerate(rows):
                number, first = places[row]
                buffer[slot] = mapped[number][first : first + span.bytes]
            yield arrays

    yield epoch


def map_file(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


class Reader(NamedTuple):
    cores: int
    open: Callable[[SyntheticShards], AbstractContextManager[Epoch]]


OURS, PLAIN, TUNED, LIMIT = "vidfill", "webdataset", "webdataset, our decoder", "copy limit"
LIMIT_REMAPPED = "copy limit, remapped"
LITDATA_THREE, LITDATA_FLAT = "litdata", "litdata, one flat tensor"
LOADED = "webdataset, 2 workers"
READERS: Mapping[str, Reader] = {
    OURS: Reader(1, vidfill_stream),
    PLAIN: Reader(1, plain_webdataset),
    TUNED: Reader(1, tuned_webdataset),
    LITDATA_THREE: Reader(1, functools.partial(litdata_loader, chunks=THREE)),
    LITDATA_FLAT: Reader(1, functools.partial(litdata_loader, chunks=FLAT)),
    LIMIT: Reader(1, copy_limit),
    LIMIT_REMAPPED: Reader(1, functools.partial(copy_limit, remap=True)),
    "vidfill, 2 threads": Reader(2, functools.partial(vidfill_stream, threads=2)),
    LOADED: Reader(2, functools.partial(loaded_webdataset, workers=2)),
    "litdata, one flat tensor, 2 workers": Reader(
        2, functools.partial(litdata_loader, chunks=FLAT, workers=2)
    ),
}


# What is measured, each in a process of its own


class Rates(NamedTuple):
    """Examples per second."""

    first: float  # in the first epoch, including opening the data set
    later: float  # in later epochs


def settle(cores: Sequence[int]) -> None:
    """Restrict this process and its workers to `cores`."""
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)


def fingerprint(name: str, data: SyntheticShards) -> tuple[int, int]:
    """What an epoch delivers, whatever the order: the number of examples and a sum of hashes.

    Raises:
        AssertionError: a batch is not float16.
    """
    count = total = 0
    with READERS[name].open(data) as epoch:
        for batch in epoch():
            arrays = [np.asarray(array) for array in batch]
            assert [array.dtype for array in arrays] == [np.dtype(np.float16)] * len(MEMBERS)
            for example in zip(*arrays, strict=True):
                count += 1
                content = b"".join(array.tobytes() for array in example)
                total += xxhash.xxh3_64_intdigest(content)
    return count, total % 2**64


def time_epochs(name: str, data: SyntheticShards, seconds: float, processor_time: bool) -> Rates:
    """Time one epoch, then whole epochs for at least `seconds`."""
    clock = time.process_time if processor_time else time.perf_counter
    began = clock()
    with READERS[name].open(data) as epoch:
        exhaust(epoch())
        first, epochs = clock(), 0
        while clock() - first < seconds or not epochs:
            exhaust(epoch())
            epochs += 1
        later = clock() - first
    return Rates(data.examples / (first - began), epochs * data.examples / later)


def exhaust(batches: Iterator[Arrays]) -> None:
    for _ in batches:
        pass
