"""`vidfill train --plan`: what a run needs and how long it takes, before it starts."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from ... import jobs
from ...data.shards.format import Manifest
from ...data.shards.reading import ShardedDataset
from ...data.shards.stream import Stream
from ...errors import BadInput, say
from ...modeling.attention import attention_backend
from ...modeling.cost import cost_of
from ...modeling.precision import autocast
from ...modeling.settings import Precision
from ...modeling.unet import VideoUNet
from ..config import TrainConfig
from ..monitor.rates import PEAKS, measure_rate
from ..state import load_start, make_accelerator, make_denoiser, make_state
from ..step import train_step

WARM_UP, MEASURED = 2, 3  # steps
CPU_SECONDS = 10.0  # that these steps may take a CPU at its peak rate
GPUS_A_NODE = 8
DEEPSPEED_BUCKETS = 2 * 4 * 50_000_000  # bytes that it reduces and gathers in
# DeepSpeed's defaults at stage 3: smaller parameters stay whole, and gathered ones are kept if they
# are used again before so many other weights.
SMALL = 4 * 100_000  # bytes of a parameter
SOON = 4 * 1_000_000_000  # bytes of weights in between
ASSUMED = 100e12  # operations a second of a GPU, where there is none to measure
# What training reaches of a data sheet's peak: 21 to 46 % for the large language models that
# Chowdhery et al. 2022, "PaLM", section 4.1, compare.
UTILISATION = 0.3
MOST_EPOCHS = 1000  # beyond which a plan says that clips are few
PLAN_WIDTH = 100  # columns where there is no terminal


@dataclasses.dataclass(frozen=True)
class TrainingCost:
    """What a run needs, counted and not measured. Memory and traffic are bytes of one GPU."""

    gpus: int
    parameters: int
    operations: int  # of a step, on one GPU
    clips: int  # of a step, on one GPU
    clips_at_once: int  # of these, in one forward pass
    memory: dict[str, int]  # by part
    checkpoint: int  # bytes of one checkpoint
    snapshot: int  # bytes of the first node's own memory, from the first checkpoint on
    traffic: int  # bytes that a GPU sends, and receives, for the gradients and weights of a step
    epochs: float
    examples: int
    shards: int
    shard_bytes: int
    fetched: int  # bytes of shards that all nodes together fetch for a step
    cache: int  # bytes that a node keeps of shards behind a URL


def training_cost(config: TrainConfig, manifest: Manifest, gpus: int) -> TrainingCost:
    """Count what `config` needs on `gpus` GPUs; nothing is computed or allocated."""
    frames, _, height, width = manifest.latent_shape

    def make_network() -> VideoUNet:
        network = make_denoiser(config, manifest).network
        network.set_attention_backend("auto")  # which works on the CPU too
        return network

    cost = cost_of(make_network, frames, height, width, config.precision)
    with torch.device("meta"):
        sizes = [parameter.nbytes for parameter in make_network().parameters()]
    clips = math.ceil(config.batch_size / gpus)
    at_once = math.ceil(clips / config.gradient_accumulation)
    weights, averages = 4 * cost.parameters, len(config.optimizer.ema_decays)
    nodes = math.ceil(gpus / GPUS_A_NODE)
    lanes = math.ceil(manifest.lanes / nodes)
    readers = max(1.0, nodes / manifest.lanes)  # nodes that need the same shard
    shard_bytes = sum(manifest.shards.bytes)
    return TrainingCost(
        gpus=gpus,
        parameters=cost.parameters,
        operations=clips * cost.training_operations,
        clips=clips,
        clips_at_once=at_once,
        memory=state_memory(weights, averages, config.zero_stage, gpus)
        | {
            "activations": activation_memory(
                make_network,
                (at_once, *manifest.latent_shape),
                config.precision,
                config.model.gradient_checkpointing,
            )
        },
        checkpoint=(3 + averages) * weights,
        # It is pinned memory, which is allocated in powers of two.
        snapshot=(3 + averages) * sum(1 << (size - 1).bit_length() for size in sizes),
        traffic=traffic(sizes, config.zero_stage, min(config.gradient_accumulation, clips), gpus),
        epochs=config.steps * config.batch_size / manifest.examples,
        examples=manifest.examples,
        shards=len(manifest.shards.bytes),
        shard_bytes=shard_bytes,
        fetched=round(config.batch_size * shard_bytes / manifest.examples * readers),
        cache=min(shard_bytes, 2 * lanes * manifest.block * shard_bytes // manifest.examples),
    )


def state_memory(weights: int, averages: int, stage: int, gpus: int) -> dict[str, int]:
    """Bytes of the training state on one of `gpus` GPUs, by part.

    DeepSpeed keeps float32 weights beside the network's own. It partitions these, the moments and
    the averages from stage 1 on, the gradients from stage 2 on, and the network's weights at
    stage 3 (Rajbhandari et al. 2020, "ZeRO", section 5). It keeps the weights that it gathers for
    the forward pass for the backward pass too, unless that is far away.

    `weights` is the bytes of all weights in float32, `averages` how many averages are kept.
    """
    share = math.ceil(weights / gpus)
    optimizer = (share if stage else weights) * (2 + averages)
    parts = {
        "weights": share if stage == 3 else weights,
        "gradients": share if stage >= 2 else weights,
        "moments and averages": optimizer + (share if stage else 0),
    }
    if stage == 3:
        parts["gathered weights"] = min(SOON, weights)
    # In plain training the gradients themselves are the buckets.
    return parts | ({"buckets": min(DEEPSPEED_BUCKETS, 2 * weights)} if stage else {})


def traffic(sizes: Sequence[int], stage: int, parts: int, gpus: int) -> int:
    """Bytes that each of `gpus` GPUs sends, and receives, for the gradients and weights of a step.

    An all-gather or a reduce-scatter among N GPUs moves (N − 1)/N of the data through each: one
    exchange. An all-reduce takes two (Rajbhandari et al. 2020, "ZeRO", section 7). A step of p
    parts makes these exchanges, where the paper needs 2, 2, p + 1 and 3p:

    - 2 without ZeRO: an all-reduce of the gradients after the last part;
    - 3 at stage 1, which also gathers the new weights;
    - 2p + 1 at stage 2, which all-reduces each part's gradients although each GPU keeps only its
      part of them (DeepSpeed's `use_multi_rank_bucket_allreduce`);
    - 2p at stage 3, where each part gathers the weights and reduce-scatters its gradients. Small
      weights are gathered once a step. If the network is so large that DeepSpeed drops gathered
      weights before the backward pass, the others are gathered twice a part.

    `sizes` are the bytes of each parameter in float32; a GPU takes its clips in so many `parts`.
    """
    weights, small = sum(sizes), sum(size for size in sizes if size < SMALL)
    gathers = 1 if 2 * weights <= SOON else 2  # the first weights are used again last
    exchanged = {
        0: 2 * weights,
        1: 3 * weights,
        2: (2 * parts + 1) * weights,
        3: parts * weights + gathers * parts * (weights - small) + small,
    }
    return round((gpus - 1) / gpus * exchanged[stage])


def activation_memory(
    make_network: Callable[[], VideoUNet],
    shape: tuple[int, ...],
    precision: Precision,
    checkpointing: bool,
) -> int:
    """Bytes at the peak of a forward and backward pass, without weights and gradients.

    No memory is allocated: the pass is simulated on shapes, with the CPU's kernels. A GPU's
    attention keeps less in 16 bits. `shape` is clips, frames, channels, height, width.
    """
    attention_backend("cpu", getattr(torch, precision))  # probes with real tensors
    with FakeTensorMode():
        network = make_network().train()
        if checkpointing:
            network.enable_gradient_checkpointing()
        latents = torch.empty(shape)
        clips, frames, _, height, width = shape
        channels = network.config["condition_channels"]
        condition = torch.empty(clips, frames, channels, height, width)
        tracker = MemTracker()
        tracker.track_external(network, latents, condition)
        with tracker:
            with autocast(torch.device("cpu"), precision):
                predicted = network(latents, torch.zeros(clips), condition)
            (predicted.float() - latents).square().mean().backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    return sum(size for kind, size in peak.items() if str(kind).endswith(("ACT", "TEMP")))


def measure_step(config: TrainConfig, dataset: ShardedDataset, clips: int) -> tuple[float, int]:
    """Seconds of a training step with `clips` clips on this machine, and the GPU's peak in bytes.

    The seconds are the median of a few real steps in one process, after some to warm up. The peak
    is 0 without a GPU.
    """
    with tempfile.TemporaryDirectory() as scratch:  # for the list of a step that is not finite
        alone = dataclasses.replace(config, out=Path(scratch), batch_size=clips, zero_stage=0)
        accelerator = make_accelerator(alone)
        denoiser = make_denoiser(alone, dataset.manifest)
        state = make_state(alone, accelerator, denoiser.network)
        stream = Stream(dataset, clips, config.seed)
        seconds = []
        on_gpu = accelerator.device.type == "cuda"
        for number in range(WARM_UP + MEASURED):
            batch = stream.batch(number)
            began = time.perf_counter()
            train_step(state, batch, denoiser, accelerator, alone)
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        return statistics.median(seconds[WARM_UP:]), peak


def why_not_measured(config: TrainConfig, cost: TrainingCost, memory: int, rate: float) -> str:
    """Why a CPU should not measure steps; empty if it may.

    The machine has `memory` bytes, and does `rate` operations a second at most.
    """
    if config.plan_gpus or config.plan_tflops:
        return "a CPU is not a GPU"
    if config.compile:
        return "compiling the network takes a CPU minutes (--compile false)"
    wanted = sum(cost.memory.values())
    if wanted > memory:
        return f"a step takes {in_bytes(wanted)} of memory, and the machine has {in_bytes(memory)}"
    seconds = (WARM_UP + MEASURED) * cost.operations / rate
    if seconds > CPU_SECONDS:
        return f"{WARM_UP + MEASURED} steps take this CPU {in_words(seconds)} at best"
    return ""


def plan(config: TrainConfig, dataset: ShardedDataset) -> None:
    """Print what the run needs and how long it takes; start nothing.

    Raises:
        BadInput: A launcher started several processes.
    """
    jobs.refuse_launcher("--plan")
    gpus = config.plan_gpus or 1
    if config.batch_size < gpus:
        raise BadInput(
            f"batch_size is {config.batch_size} and plan_gpus {gpus}: give each GPU a clip or more"
        )
    if config.from_:
        load_start(config, make_denoiser(config, dataset.manifest))
    assumed_rate(config)  # which may refuse it
    cost = training_cost(config, dataset.manifest, gpus)
    if cost.epochs > MOST_EPOCHS:
        say(
            f"vidfill train: {config.steps} steps take each of the {cost.examples} examples "
            f"{cost.epochs:,.0f} times: the network learns them by heart; give more clips, or "
            "fewer --steps"
        )
    seconds, peak = _measure(config, dataset, cost)
    table = Table("", "", title=f"{config.steps} steps on {gpus} GPU(s)", show_header=False)
    for section in (_size(config, cost), _memory(cost, peak), _time(config, cost, seconds)):
        for name, value in section.items():
            table.add_row(name, value)
        table.add_section()
    Console(width=None if sys.stdout.isatty() else PLAN_WIDTH).print(table)


def assumed_rate(config: TrainConfig) -> tuple[float, str]:
    """Operations a second that a GPU is taken to do, and why so many.

    Raises:
        BadInput: `plan_tflops` is no number, and no GPU whose data sheet is known.
    """
    given = config.plan_tflops
    if not given:
        return ASSUMED, "assumed, for a GPU"
    with contextlib.suppress(ValueError):
        if 0 < (rate := float(given)) < math.inf:
            return rate * 1e12, "as given"
    names = {name.removeprefix("NVIDIA "): name for name in PEAKS}
    if given.removeprefix("NVIDIA ") not in names:
        raise BadInput(
            f"plan_tflops is {given!r}: give a number, or one of {', '.join(sorted(names))}"
        )
    in_16_bits, in_32_bits = PEAKS[names[given.removeprefix("NVIDIA ")]]
    peak = in_32_bits if config.precision == "float32" else in_16_bits
    return UTILISATION * peak, f"{UTILISATION:.0%} of the {given}'s {peak / 1e12:g}"


def _measure(
    config: TrainConfig, dataset: ShardedDataset, cost: TrainingCost
) -> tuple[float | None, int]:
    """`measure_step` if that makes sense; otherwise None and 0, with the reason on stderr."""
    if config.plan_tflops or not torch.cuda.is_available():
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        rate = measure_rate(torch.device("cpu"), config.precision)
        reason = why_not_measured(config, cost, memory, rate)
        if reason:
            say(f"nothing is measured here: {reason}")
            return None, 0
    say(f"measuring {MEASURED} steps of {cost.clips} clip(s) here…")
    try:
        return measure_step(config, dataset, cost.clips)
    except torch.OutOfMemoryError:
        say(
            "a step does not fit into this GPU's memory: give more --plan_gpus or "
            "--gradient_accumulation, or --model.gradient_checkpointing"
        )
        return None, 0


def _size(config: TrainConfig, cost: TrainingCost) -> dict[str, str]:
    accumulated = config.gradient_accumulation
    per_pass = f", {cost.clips_at_once} in a pass" if accumulated > 1 else ""
    return {
        "parameters": f"{cost.parameters / 1e6:.2f} M",
        "clips a step": f"{config.batch_size}, {cost.clips} on a GPU{per_pass}",
        "epochs": f"{cost.epochs:.1f} of {cost.examples} examples",
        "shards": f"{cost.shards}, {in_bytes(cost.shard_bytes)} in all",
        "cache of a node, for a URL": f"{in_bytes(cost.cache)} ({GPUS_A_NODE} GPUs a node)",
        "checkpoint": f"{in_bytes(cost.checkpoint)}, {config.keep_checkpoints + 1} at most",
        "memory of the first node, for it": f"{in_bytes(cost.snapshot)}, pinned",
    }


def _memory(cost: TrainingCost, peak: int) -> dict[str, str]:
    rows = {f"memory of a GPU: {part}": in_bytes(size) for part, size in cost.memory.items()}
    rows["memory of a GPU: in all"] = in_bytes(sum(cost.memory.values()))
    return rows | ({"measured here, one GPU without ZeRO": in_bytes(peak)} if peak else {})


def _time(config: TrainConfig, cost: TrainingCost, measured: float | None) -> dict[str, str]:
    assumed, source = assumed_rate(config)
    seconds = measured or cost.operations / assumed
    rate = cost.operations / seconds / 1e12
    total = config.steps * seconds
    source = "measured here" if measured else source
    fetched = in_bytes(round(cost.fetched / seconds))
    hours = total / 3600 * cost.gpus
    return {
        "operations of a step": f"{cost.operations / 1e12:.3g} TFLOP on a GPU",
        "a step": f"{seconds:.3g} s, {rate:.3g} TFLOP/s on a GPU ({source})",
        "clips a second": f"{config.batch_size / seconds:.3g} in all",
        "reading": f"{fetched}/s in all, if the shards are behind a URL",
        "traffic": f"{in_bytes(cost.traffic)} a step out of each GPU, and as much in",
        "time, without communication": f"{in_words(total)}, {hours:.3g} GPU hours",
    }


def in_bytes(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def in_words(seconds: float) -> str:
    """A duration with its unit, from seconds to days."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
