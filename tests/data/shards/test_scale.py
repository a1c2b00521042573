"""A million shards and a billion examples: what opening them takes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from vidfill.data.shards.format import Example, Manifest, ShardTable
from vidfill.data.shards.order import Order, choose_lanes
from vidfill.data.shards.writing import write_shard
from vidfill.data.storage.names import MANIFEST, index_name, shard_name

SHARDS, ROWS, BATCH = 1_000_000, 1000, 64

# In a process of its own, whose memory is that of the stream and of torch.
OPEN_AND_READ = """
import json, sys, time
from vidfill.data.shards.reading import ShardedDataset
from vidfill.data.shards.stream import Stream

began = time.process_time()
dataset = ShardedDataset(sys.argv[1], "train")
opened = time.process_time()
stream = Stream(dataset, int(sys.argv[2]), 0)
batch = next(stream.run(0))
read = time.process_time()
[peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps({
    "examples": len(dataset),
    "keys": len(set(batch.keys)),
    "weight": float(batch.weights.sum()),
    "opening": opened - began,
    "first_batch": read - opened,
    "gigabytes": int(peak.split()[1]) * 1024 / 1e9,
}))
"""


@pytest.fixture(scope="module")
def billion(tmp_path_factory: pytest.TempPathFactory, make_example: Callable[..., Example]) -> Path:
    """A manifest of a billion examples, and those of its shards that the first batch reads."""
    root = tmp_path_factory.mktemp("billion")
    folder = root / "train"
    one = make_example(0)
    rows = (dataclasses.replace(one, key=f"video_{n:05}_00000_stationary") for n in range(ROWS))
    index = write_shard(folder, 0, ["source"], rows)
    examples = [ROWS] * SHARDS
    lanes, block = choose_lanes(examples)
    order = Order(examples, lanes, block, seed=0)
    read = set(order.locate(order.share(0, BATCH, 0, 1))[0].tolist())
    for number in read - {0}:
        os.link(folder / shard_name(0), folder / shard_name(number))
        os.link(folder / index_name(0), folder / index_name(number))
    manifest = Manifest(
        split="train",
        autoencoder={
            "name": "tiny",
            "kind": "AutoencoderTiny",
            "sha256": "0",
            "scaling_factor": 1.0,
            "downsampling": 4,
            "channels": one.latents.shape[1],
        },
        posterior="mean",
        pixels=False,
        clip=dict(zip(("frames", "height", "width"), one.mask.shape, strict=True)),
        latent_shape=one.latents.shape,
        masks={"families": {"stationary": 1.0}, "per_clip": 1, "seed": 0},
        fill="median",
        latents_mean=(0.0,) * one.latents.shape[1],
        latents_std=(1.0,) * one.latents.shape[1],
        examples=SHARDS * ROWS,
        shards=ShardTable(
            tuple(examples),
            tuple(index.bytes if n in read else 10**8 + n for n in range(SHARDS)),
            tuple(index.sha256 if n in read else f"{n:064x}" for n in range(SHARDS)),
        ),
        lanes=lanes,
        block=block,
        skipped=0,
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return root


@pytest.mark.slow
def test_a_billion_examples_open_in_seconds_and_the_first_batch_comes_in_one(
    billion: Path,
) -> None:
    command = [sys.executable, "-c", OPEN_AND_READ, str(billion), str(BATCH)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    print(measured)
    assert measured["examples"] == 10**9
    assert measured["weight"] == BATCH and measured["keys"] > BATCH * 0.9
    assert measured["opening"] < 10  # of processor time, of reading and checking the manifest
    assert measured["first_batch"] < 1  # of processor time, with the stream's own making
    assert measured["gigabytes"] < 1  # with Python and torch


def test_the_order_of_a_billion_examples_is_small() -> None:
    import tracemalloc

    order = Order([ROWS] * SHARDS, 64, 2 * ROWS, seed=0)
    tracemalloc.start()
    try:
        order.locate(order.share(10**9 // BATCH, BATCH, 0, 1))  # the last of one epoch and the next
        next(order.uses(3 * 10**9, lambda first, last: range(65)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200e6  # bytes
