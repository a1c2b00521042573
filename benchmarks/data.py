"""Data: our stream compared with other readers, its shuffle, a slow server, and encoding."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from vidfill.data.encode.run import encode
from vidfill.data.encode.settings import EncodeConfig
from vidfill.data.shards.order import Order, choose_lanes
from vidfill.data.storage.names import index_name, shard_name
from vidfill.data.storage.store import CacheConfig
from vidfill.data.synth.run import SynthConfig, synth
from vidfill.modeling.settings import Precision
from webdataset import shuffle

from . import readers, throttled
from .machine import processor, spread, summarise
from .readers import FRAMES, LIMIT, LOADED, OURS, PLAIN, READERS, Rates, SyntheticShards

EXAMPLES = """examples:
  python -m benchmarks.data
      everything, in about five minutes on two cores
  python -m benchmarks.data --parts readers --processor-time
      only the readers, on a shared machine
  python -m benchmarks.data --parts readers --latent 32
      latents of 256x256 pixels
  python -m benchmarks.data --json > figures.json
      only the figures
"""

PARTS = ("readers", "shuffle", "server", "encode")
PRELOADED = ["benchmarks.readers", "benchmarks.throttled"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
COPIES, LANES = 3, 4  # of the synthetic shards, behind the server
EXAMINED = 10**6  # the most positions from which a shuffle is judged


# The readers


def compare_readers(options: argparse.Namespace, data: SyntheticShards) -> dict[str, Any]:
    """Rates of all readers that can run here; what was just written is in the page cache."""
    if readers.has_litdata():
        readers.write_chunks(data)
    cores = sorted(os.sched_getaffinity(0))
    names = [name for name in READERS if can_run(name, len(cores))]
    with ExitStack() as stack:
        pools = {
            name: stack.enter_context(new_pool(cores[-READERS[name].cores :])) for name in names
        }
        check_readers(pools, data)
        rounds = time_rounds(pools, data, options)
    return summarise_readers(names, rounds, data)


def can_run(name: str, cores: int) -> bool:
    return READERS[name].cores <= cores and (readers.has_litdata() or "litdata" not in name)


def new_pool(cores: Sequence[int]) -> ProcessPoolExecutor:
    """A new process on `cores`, without inherited threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # otherwise each imports everything again
    return ProcessPoolExecutor(1, context, initializer=readers.settle, initargs=(cores,))


def check_readers(pools: dict[str, ProcessPoolExecutor], data: SyntheticShards) -> None:
    """Check that every reader delivers the same examples, each once per epoch.

    Raises:
        AssertionError: one does not.
    """
    found = {name: pool.submit(readers.fingerprint, name, data) for name, pool in pools.items()}
    expected = found[LIMIT].result()
    assert expected[0] == data.examples
    for name, result in found.items():
        assert result.result() == expected, (
            f"{name} does not deliver the examples that were written"
        )


def time_rounds(
    pools: dict[str, ProcessPoolExecutor], data: SyntheticShards, options: argparse.Namespace
) -> list[dict[str, Rates]]:
    """Each reader in turn, alone; each round starts with a different one."""
    names, measured = list(pools), []
    for index in range(options.rounds):
        first = index % len(names)
        rates = {}
        for name in [*names[first:], *names[:first]]:
            by_processor = options.processor_time and READERS[name].cores == 1
            timed = pools[name].submit(
                readers.time_epochs, name, data, options.seconds, by_processor
            )
            rates[name] = timed.result()
        measured.append(rates)
    return measured


def summarise_readers(
    names: Sequence[str], rounds: Sequence[dict[str, Rates]], data: SyntheticShards
) -> dict[str, Any]:
    """Ratios are taken within a round; on two cores they are to webdataset on two cores."""

    def ratios(of: str, to: str) -> list[float]:
        return [each[of].later / each[to].later for each in rounds]

    found: dict[str, Any] = {}
    for name in names:
        alone = READERS[name].cores == 1
        found[name] = {
            "cores": READERS[name].cores,
            "examples_per_second": summarise([each[name].later for each in rounds]),
            "first_epoch": summarise([each[name].first for each in rounds]),
            "of_webdataset": summarise(ratios(name, PLAIN if alone else LOADED)),
            "of_limit": summarise(ratios(name, LIMIT)) if alone else None,
        }
    return {
        "example_bytes": data.example_bytes,
        "readers": found,
        "examples_per_second": {name: found[name]["examples_per_second"][0] for name in names},
        "ratio_to_webdataset": found[OURS]["of_webdataset"][0],
    }


def readers_table(found: dict[str, Any]) -> str:
    lines = [
        "| reader | cores | examples/s | MB/s | relative to webdataset | share of the copy limit "
        "| first epoch |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in found["readers"].items():
        cells = [
            name,
            str(row["cores"]),
            spread(row["examples_per_second"], "{:,.0f}"),
            f"{row['examples_per_second'][0] * found['example_bytes'] / 1e6:,.0f}",
            spread(row["of_webdataset"], "{:.2f}"),
            spread(row["of_limit"], "{:.0%}") if row["of_limit"] else "",
            f"{row['first_epoch'][0]:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# The shuffle


class Shuffle(NamedTuple):
    """How far apart neighbours in a shard end up, and how many shards a batch mixes."""

    distance: float  # Kolmogorov-Smirnov, from a uniform permutation's: 0 to 1
    median: float  # positions between neighbours
    least: int
    shards_in_batch: float


def judge_shuffles() -> list[dict[str, Any]]:
    rows = []
    for examples, shards in ((10**4, 20), (10**6, 2_500), (10**8, 250_000)):
        size = {"examples": examples, "shards": shards}
        rows.append(
            {"order": OURS, **size} | judge(our_order(examples, shards), examples)._asdict()
        )
        if examples <= EXAMINED:
            places = peers_order(examples, shards)
            rows.append({"order": PLAIN, **size} | judge(places, examples)._asdict())
            uniform = divide(np.random.default_rng(0).permutation(examples), examples // shards)
            rows.append({"order": "uniform", **size} | judge(uniform, examples)._asdict())
    return rows


def our_order(examples: int, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """The shard and row that each of the first positions reads."""
    sizes = [examples // shards] * shards
    order = Order(sizes, *choose_lanes(sizes), seed=0)
    return order.locate(np.arange(min(examples, EXAMINED)))


def peers_order(examples: int, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for webdataset: it shuffles the shards, then the examples in a buffer."""
    size = examples // shards
    numbers = random.Random(0).sample(range(shards), shards)
    streamed = (number * size + row for number in numbers for row in range(size))
    return divide(np.fromiter(shuffle(readers.BUFFER, seed=0)(streamed), np.int64), size)


def divide(numbers: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    shards, rows = np.divmod(numbers, size)
    return shards, rows


def judge(places: tuple[np.ndarray, np.ndarray], examples: int) -> Shuffle:
    """Judge the distances between neighbours in a shard that are both among the given positions."""
    shards, rows = places
    positions = np.lexsort((rows, shards))
    neighbours = (np.diff(shards[positions]) == 0) & (np.diff(rows[positions]) == 1)
    distances = np.sort(np.abs(np.diff(positions))[neighbours])
    # Two places of a uniform permutation have density 2 (1 - x) at a distance of x * examples.
    expected = 1 - (1 - distances / examples) ** 2
    steps = np.arange(len(distances) + 1) / len(distances)
    batches = shards[: len(shards) // readers.BATCH * readers.BATCH].reshape(-1, readers.BATCH)
    return Shuffle(
        distance=float(max((expected - steps[:-1]).max(), (steps[1:] - expected).max())),
        median=float(np.median(distances)),
        least=int(distances[0]),
        shards_in_batch=float(np.mean([len(set(batch)) for batch in batches.tolist()])),
    )


def shuffle_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| examples | shards | order | distance from uniform | median distance | least "
        f"| shards in {readers.BATCH} examples |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['examples']:,} | {row['shards']:,} | {row['order']} | {row['distance']:.3f} "
        f"| {row['median']:,.0f} | {row['least']} | {row['shards_in_batch']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


# The slow server


def train_from_server(options: argparse.Namespace, data: SyntheticShards) -> dict[str, Any]:
    """Consume at the rate of eight GPUs from a server of twice that rate.

    The served data set is several copies of the synthetic one, with few lanes: the order needs
    about a quarter of it at a time.
    """
    served = dataclasses.replace(
        data,
        folder=data.folder / "served",
        examples=COPIES * data.examples,
        shards=COPIES * data.shards,
    )
    link_copies(data, served)
    size = sum(Path(tar).stat().st_size for tar in served.tars)
    limit = 2 * options.rate * size / served.examples
    with (
        throttled.serve(served.folder, limit) as url,
        new_pool(sorted(os.sched_getaffinity(0))) as pool,
    ):
        cache = CacheConfig(str(data.folder / "cache"))
        seconds = options.minutes * 60
        waits = pool.submit(throttled.consume, url, cache, options.rate, seconds).result()
    return {
        "rate": options.rate,
        "server_megabytes_per_second": limit / 1e6,
        "dataset_megabytes": size / 1e6,
        **waits._asdict(),
    }


def link_copies(data: SyntheticShards, served: SyntheticShards) -> None:
    """Link the shards of `data` under further numbers, which makes them new shards to a cache."""
    folder = served.folder / readers.SPLIT
    folder.mkdir(parents=True)
    for number in range(served.shards):
        for name in (shard_name, index_name):
            original = data.folder / readers.SPLIT / name(number % data.shards)
            (folder / name(number)).symlink_to(original)
    readers.write_manifest(folder, served, LANES, block=2 * data.examples // data.shards)


def server_table(found: dict[str, Any]) -> str:
    lines = [
        "| examples/s | server | first batch | waited afterwards | download and stream |",
        "| ---: | ---: | ---: | ---: | ---: |",
        f"| {found['examples'] / found['elapsed']:,.0f} "
        f"| {found['server_megabytes_per_second']:.0f} MB/s "
        f"| after {found['first_batch']:.1f} s "
        f"| {found['waited'] / found['elapsed']:.2%} of {found['elapsed']:.0f} s "
        f"| {found['processor'] / found['elapsed']:.0%} of a core |",
    ]
    return "\n".join(lines)


# Encode


def time_encode(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Encode synthetic videos with the shipped autoencoder, one process per precision."""
    videos = folder / "videos"
    synth(SynthConfig(videos, clips=options.clips, validation=0, size=128, frames=FRAMES))
    rows = []
    for precision in PRECISIONS:
        with new_pool(sorted(os.sched_getaffinity(0))) as pool:
            given = (videos, folder / precision, precision)
            rows.append({"precision": precision} | pool.submit(encode_videos, *given).result())
    return rows


def encode_videos(videos: Path, out: Path, precision: Precision) -> dict[str, Any]:
    timings = encode(EncodeConfig(videos, out, autoencoder="shipped", precision=precision))
    assert timings is not None
    return {
        "clips_per_second": timings.clips / timings.elapsed,
        "busy": {name: seconds / timings.elapsed for name, seconds in timings.stages.items()},
    }


def encode_table(rows: Sequence[dict[str, Any]]) -> str:
    stages = list(rows[0]["busy"])
    lines = [
        f"| precision | clips/s | {' | '.join(f'{stage} busy' for stage in stages)} |",
        f"| --- | ---: |{' ---: |' * len(stages)}",
    ]
    for row in rows:
        busy = " | ".join(f"{row['busy'][stage]:.0%}" for stage in stages)
        lines.append(f"| {row['precision']} | {row['clips_per_second']:.2f} | {busy} |")
    return "\n".join(lines)


# What is printed


def describe() -> str:
    """Versions and hardware."""
    named = ("vidfill", "webdataset", "litdata", "numpy", "torch")
    installed = [name for name in named if name != "litdata" or readers.has_litdata()]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in installed)
    cores = len(os.sched_getaffinity(0))
    return f"{versions}, Python {platform.python_version()}\n{processor()}, {cores} core(s)"


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="all, or some")
    numbers = {
        "examples": (4096, "synthetic examples, a multiple of 32"),
        "shards": (32, "that hold them"),
        "latent": (22, "height and width of the latents"),
        "rounds": (5, "times that every reader is measured"),
        "seconds": (1.0, "the least time for which a reader is measured, after an epoch"),
        "rate": (1000.0, "examples per second that are consumed from the server"),
        "minutes": (0.5, "for which they are consumed"),
        "clips": (12, "videos to encode"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure readers on one core in processor seconds instead of wall seconds: they "
        "exclude most of the effect of other work on the machine",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="also write the figures to FILE; without FILE, print them instead of the tables",
    )
    options = parser.parse_args(argv)
    for name in numbers:
        if getattr(options, name) <= 0:
            parser.error(f"{name} is {getattr(options, name)}: give more than 0")
    if options.examples % readers.BATCH:
        parser.error(f"examples is {options.examples}: give a multiple of {readers.BATCH}")
    return options


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of each part in `options.parts`."""
    data = SyntheticShards(folder, options.examples, options.shards, options.latent)
    if {"readers", "server"} & set(options.parts):
        readers.write_dataset(data)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "readers": lambda: compare_readers(options, data),
        "shuffle": lambda: {"shuffle": judge_shuffles()},
        "server": lambda: {"server": train_from_server(options, data)},
        "encode": lambda: {"encode": time_encode(options, folder)},
    }
    found: dict[str, Any] = {}
    for name in PARTS:
        if name in options.parts:
            found |= parts[name]()
    return found


def main(argv: Sequence[str]) -> int:
    options = parse_options(argv)
    with tempfile.TemporaryDirectory(prefix="vidfill-benchmark-") as folder:
        found = measure(options, Path(folder))
    found["environment"] = describe()
    found["command"] = shlex.join(["python", "-m", "benchmarks.data", *argv])
    if options.json == "-":
        print(json.dumps(found, indent=1))
        return 0
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    print_tables(found, options)
    return 0


def print_tables(found: dict[str, Any], options: argparse.Namespace) -> None:
    if "readers" in found:
        print(readers_table(found), end="\n\n")
        if not readers.has_litdata():
            print("litdata is not installed: its rows are left out (docs/benchmarks.md)\n")
    if "shuffle" in found:
        print(shuffle_table(found["shuffle"]), end="\n\n")
    if "server" in found:
        print(server_table(found["server"]), end="\n\n")
    if "encode" in found:
        print(encode_table(found["encode"]), end="\n\n")
    print(found["environment"], found["command"], sep="\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
