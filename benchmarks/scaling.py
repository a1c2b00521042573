"""Storage, network and memory that a run needs on clusters of several sizes, by `training_cost`.

Calculated for a data set that exists only on paper; nothing is measured, and no GPU is needed. The
time of a step is that of its operations at `--rate`, without communication.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from vidfill.data.shards.format import Manifest, ShardTable
from vidfill.data.shards.order import choose_lanes
from vidfill.data.shards.reading import ExampleLayout
from vidfill.train.config import ModelConfig, OptimizerConfig, TrainConfig
from vidfill.train.preflight.plan import GPUS_A_NODE, in_bytes, state_memory, training_cost

NO_DIGEST = "0" * 64  # of files that do not exist
GRADIENTS = 0.1  # share of a step that averaging gradients may take if nothing of it is overlapped


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--preset", default="base")
    parser.add_argument("--side", type=int, default=32, help="height and width of the latents")
    parser.add_argument("--clips", type=int, default=10_000_000, help="clips in the data set")
    parser.add_argument("--shard_megabytes", type=float, default=256.0)
    parser.add_argument("--clips_per_gpu", type=int, default=8, help="clips per GPU and step")
    parser.add_argument(
        "--examples_seen", type=float, default=1e8, help="examples that the whole run sees"
    )
    parser.add_argument(
        "--rate", type=float, default=100.0, help="TFLOP/s that a GPU is assumed to reach"
    )
    given = parser.parse_args(argv)
    manifest = imagine(given.clips, given.side, given.shard_megabytes)
    columns = [column(given, manifest, nodes) for nodes in given.nodes]
    names = ["1 node" if nodes == 1 else f"{nodes} nodes" for nodes in given.nodes]
    print(f"| | {' | '.join(names)} |")
    print(f"| --- |{' ---: |' * len(columns)}")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


def imagine(clips: int, side: int, shard_megabytes: float) -> Manifest:
    """The manifest of an imaginary data set of `clips` clips of 20 frames."""
    one = Manifest(
        split="train",
        autoencoder={
            "name": "stabilityai/sd-vae-ft-mse",
            "kind": "AutoencoderKL",
            "sha256": NO_DIGEST,
            "scaling_factor": 0.18215,
            "downsampling": 8,
            "channels": 4,
        },
        posterior="mean",
        pixels=False,
        clip={"frames": 20, "height": 8 * side, "width": 8 * side},
        latent_shape=(20, 4, side, side),
        masks={"families": {"stationary": 1.0}, "per_clip": 1, "seed": 0},
        fill="median",
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
        examples=1,
        shards=ShardTable((1,), (0,), (NO_DIGEST,)),
        lanes=1,
        block=1,
        skipped=0,
    )
    example = ExampleLayout.of(one).bytes
    count = math.ceil(clips * example / (shard_megabytes * 1e6))
    examples = [clips // count + (number < clips % count) for number in range(count)]
    lanes, block = choose_lanes(examples)
    table = ShardTable(tuple(examples), tuple(example * n for n in examples), (NO_DIGEST,) * count)
    return dataclasses.replace(one, examples=clips, shards=table, lanes=lanes, block=block)


def column(given: argparse.Namespace, manifest: Manifest, nodes: int) -> dict[str, str]:
    """What `nodes` nodes need, by the name of the row."""
    gpus = nodes * GPUS_A_NODE
    batch = gpus * given.clips_per_gpu
    config = TrainConfig(
        "",
        Path(),
        steps=math.ceil(given.examples_seen / batch),
        batch_size=batch,
        precision="bfloat16",
        model=ModelConfig(preset=given.preset),
        optimizer=OptimizerConfig(ema_decays=(0.9995, 0.9999)),
    )
    plan = training_cost(config, manifest, gpus)
    averages = len(config.optimizer.ema_decays)
    states = {n: state_memory(4 * plan.parameters, averages, n, gpus) for n in (0, 2, 3)}
    activations = plan.memory["activations"]
    seconds = plan.operations / (given.rate * 1e12)
    return {
        "GPUs, clips per step": f"{gpus}, {batch}",
        "steps": f"{config.steps:,}",
        f"time of a step at {given.rate:g} TFLOP/s": f"{seconds:.3g} s",
        "hours in total": f"{config.steps * seconds / 3600:.3g}",
        "activations per GPU": in_bytes(activations),
        **{
            f"memory per GPU, ZeRO {stage}": in_bytes(sum(parts.values()) + activations)
            for stage, parts in states.items()
        },
        "gradients sent per GPU and step": in_bytes(plan.traffic),
        f"network per GPU, to take {GRADIENTS:.0%} of a step": (
            f"{in_bytes(round(plan.traffic / (GRADIENTS * seconds)))}/s"
        ),
        "shards": f"{plan.shards:,}, {in_bytes(plan.shard_bytes)}",
        "cache per node": in_bytes(plan.cache),
        "read from storage, all nodes": f"{in_bytes(round(plan.fetched / seconds))}/s",
        "read from storage per node": f"{in_bytes(round(plan.fetched / seconds / nodes))}/s",
        "checkpoint": in_bytes(plan.checkpoint),
        "checkpoint every 1000 steps, one node": (
            f"{in_bytes(round(plan.checkpoint / (1000 * seconds)))}/s"
        ),
    }


if __name__ == "__main__":
    main()
