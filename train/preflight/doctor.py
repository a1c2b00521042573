"""`vidfill doctor`: finds what would go wrong with a training run before it starts."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from packaging.requirements import Requirement
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ... import jobs
from ...data.shards.reading import ShardedDataset, has_split
from ...data.shards.stream import Batch, Stream
from ...errors import BadInput, BadInputEverywhere, describe, printable, say
from ...files import PARTIAL
from ...modeling.attention import attention_backend
from ...modeling.denoiser import Denoiser
from ...modeling.settings import Precision
from ..config import DOCTOR_EXAMPLES as EXAMPLES
from ..config import ModelConfig, TrainConfig, check, find_recipe
from ..state import load_start, make_accelerator, make_denoiser, make_state
from ..step import train_step
from .plan import in_words

WAIT = 10.0  # seconds until a shared folder must show a file to another node
DOCTOR_WIDTH = 110  # columns where there is no terminal
STEP_LIMIT = 120.0  # seconds that the step may take where there is no GPU
OPEN_FILES = 4096  # that a process should be allowed
GPUS = "GPUs"  # the check that has to be good before the others

Severity = Literal["good", "warning", "bad"]
MARKS = {"good": "[green]good[/]", "warning": "[yellow]look[/]", "bad": "[red]bad[/]"}


class Diagnosis(NamedTuple):
    """What a check found on one process."""

    check: str
    level: Severity
    said: str
    remedy: str = ""


def doctor(config: TrainConfig) -> None:
    """Check whether `vidfill train` with the same options would work, and print the outcome.

    Every process of the launcher makes the checks; the first one prints what all of them found.

    Raises:
        BadInputEverywhere: Something is bad.
    """
    check(config)
    found = [
        *check_versions(importlib.metadata.requires("vidfill") or []),
        *check_launcher(os.environ),
        *check_gpus(os.environ, torch.cuda.device_count()),
        _check_open_files(),
    ]
    # NCCL cannot share one: no process could go on.
    if any((one.check, one.level) == (GPUS, "bad") for one in found):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _show(found, int(os.environ.get("WORLD_SIZE", "1")))
        raise BadInputEverywhere("processes share GPUs (see above): correct that first")
    accelerator = make_accelerator(config)
    out = config.out
    folder = next(parent for parent in (out, *out.resolve().parents) if parent.is_dir())
    found += [*_check_processes(accelerator), _check_folder(folder, accelerator)]
    found += _try_step(config, folder, accelerator)
    everyone: list[tuple[int, Diagnosis]] = gather_object(
        [(accelerator.process_index, one) for one in found]
    )
    merged = merge(everyone)
    if accelerator.is_main_process:
        _show(merged, accelerator.num_processes)
    accelerator.end_training()
    bad = sum(one.level == "bad" for one in merged)
    if bad:
        raise BadInputEverywhere(f"{bad} of {len(merged)} checks are bad: see above")


def check_versions(requirements: Sequence[str]) -> list[Diagnosis]:
    """Are the installed packages within the ranges that vidfill was made for?"""
    wrong = []
    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version} is not {wanted.specifier}")
    if wrong:
        remedy = "run pip install again, in the environment that the job uses"
        return [Diagnosis("versions", "bad", ", ".join(wrong), remedy)]
    return [Diagnosis("versions", "good", f"torch {torch.__version__}, and all others in range")]


def check_launcher(environment: Mapping[str, str]) -> Iterator[Diagnosis]:
    """Does the environment contain what a launcher of several processes has to set?"""
    world = int(environment.get("WORLD_SIZE", "1"))
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and world == 1:
        said = f"srun started {tasks} tasks and WORLD_SIZE is not set: each trains alone"
        remedy = "start one task a node, and in it `accelerate launch`: `vidfill launch` does that"
        yield Diagnosis("launcher", "bad", said, remedy)
        return
    yield Diagnosis("launcher", "good", f"WORLD_SIZE is {world}")
    nodes = int(environment.get("SLURM_NNODES", "1"))
    if world > 1 and nodes > 1 and environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        chosen = environment.get("ACCELERATE_DEEPSPEED_MULTINODE_LAUNCHER", "pdsh")
        if chosen != "standard":
            said = f"Accelerate starts the nodes by {chosen}, which needs ssh between them"
            remedy = "use an Accelerate configuration without DeepSpeed (--zero_stage turns it on)"
            yield Diagnosis("launcher", "bad", said, remedy)
    if "SLURM_JOB_ID" in environment and world > 1:
        handled = "SIGUSR1" in environment.get("PET_SIGNALS_TO_HANDLE", "")
        ignored = signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN  # inherited from the launcher
        if handled or ignored:
            yield Diagnosis("signals", "good", "the launcher survives Slurm's warning")
        else:
            said = "Slurm's warning signal kills the launcher and leaves its processes orphaned"
            remedy = "start it by `vidfill launch`, or after trap '' USR1"
            yield Diagnosis("signals", "warning", said, remedy)


def check_gpus(environment: Mapping[str, str], gpus: int) -> list[Diagnosis]:
    """Does each process of this node have a GPU of its own, if there are any?"""
    local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if not gpus:
        said, remedy = "there is none here", "run it where the training will run, to check that too"
        return [Diagnosis(GPUS, "warning", said, remedy)]
    if local <= gpus:
        return [Diagnosis(GPUS, "good", f"one for each of {local} process(es)")]
    said = f"{local} processes on this node share {gpus} GPU(s)"
    return [Diagnosis(GPUS, "bad", said, "set --num_processes to nodes times GPUs of a node")]


def _check_open_files() -> Diagnosis:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = f"{allowed} allowed"
    if allowed >= OPEN_FILES or allowed == resource.RLIM_INFINITY:
        return Diagnosis("open files", "good", said)
    return Diagnosis(
        "open files", "warning", f"{said}: shards stay open", f"ulimit -n {OPEN_FILES}"
    )


def _check_processes(accelerator: Accelerator) -> Iterator[Diagnosis]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world:
        said = f"the launcher started {world}, but each counts {accelerator.num_processes}"
        remedy = "start by `accelerate launch --multi_gpu`, without --cpu"
        yield Diagnosis("processes", "bad", said, remedy)
        return
    one = torch.ones(1, device=accelerator.device)
    summed = int(accelerator.reduce(one, "sum").item())
    place = f"{accelerator.device}, by {accelerator.state.backend or 'no backend'}"
    yield Diagnosis("processes", "good", f"{summed} add up; each on its {place}")


def _check_folder(folder: Path, accelerator: Accelerator) -> Diagnosis:
    """Do all processes see what the first one writes into the run's folder?"""
    token = [uuid.uuid4().hex]
    broadcast_object_list(token)
    mark = folder / f"{PARTIAL}doctor-{token[0]}"
    refusal = ""
    if accelerator.is_main_process:
        try:
            mark.touch()
        except OSError as error:
            refusal = describe(error)
    accelerator.wait_for_everyone()
    ends = time.monotonic() + WAIT
    while not mark.exists() and time.monotonic() < ends:
        os.listdir(folder)  # makes a network file system look again
        time.sleep(0.1)
    seen = mark.exists()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        mark.unlink(missing_ok=True)
    if refusal:
        return Diagnosis("run's folder", "bad", f"{folder}: {refusal}", "name a folder of your own")
    if seen:
        return Diagnosis("run's folder", "good", f"{folder}: what process 0 writes is seen")
    said = f"{folder}: what process 0 writes is not seen here after {WAIT:g} s"
    return Diagnosis("run's folder", "bad", said, "name a folder that all nodes share")


def _try_step(config: TrainConfig, folder: Path, accelerator: Accelerator) -> Iterator[Diagnosis]:
    """Open the shards, make the model, and take one real step whose result is discarded.

    All processes take the step or none does: one that cannot would keep the others waiting.
    """
    ready: tuple[Denoiser, Batch] | None = None
    try:
        dataset = ShardedDataset(config.shards, "train", config.data.cache)
        manifest = dataset.manifest
        shape = "×".join(map(str, manifest.latent_shape))
        said = f"{manifest.examples} examples of {shape} in {len(manifest.shards.bytes)} shards"
        yield Diagnosis("shards", "good", said)
        yield _check_held_out(config.shards)
        yield _check_attention(config.model, config.precision, accelerator.device)
        denoiser = make_denoiser(config, manifest)
        if load_start(config, denoiser):
            yield Diagnosis("start", "good", f"the weights of {config.from_} fit")
        parameters = sum(parameter.numel() for parameter in denoiser.network.parameters())
        checkpoint = 4 * parameters * (3 + len(config.optimizer.ema_decays))
        yield _check_disk(folder, checkpoint * (config.keep_checkpoints + 1))
        process, processes = accelerator.process_index, accelerator.num_processes
        stream = Stream(dataset, config.batch_size, config.seed, process, processes)
        ready = denoiser, stream.batch(0)
    except (BadInput, OSError) as error:
        yield Diagnosis("shards and network", "bad", describe(error))
    if all(gather_object([ready is not None])):
        assert ready
        seconds = _estimate_step(*ready, accelerator)
        if seconds > STEP_LIMIT:
            said = f"not tried: it takes about {in_words(seconds)} here"
            yield Diagnosis("one step", "warning", said, "run it on a GPU, or with --batch_size 1")
            return
        yield _take_step(config, *ready, accelerator)
    elif ready:
        yield Diagnosis("one step", "warning", "not tried: another process cannot take it")


def _estimate_step(denoiser: Denoiser, batch: Batch, accelerator: Accelerator) -> float:
    """Seconds that the slowest process's step takes, from a clip's forward pass; 0 on GPUs.

    A backward pass takes about two forward passes.
    """
    seconds = 0.0
    if accelerator.device.type == "cpu":
        if accelerator.is_main_process:
            say("vidfill doctor: timing the network on one clip …")
        shape = denoiser.space.shape
        channels = denoiser.network.config["condition_channels"]
        latents = torch.zeros(1, *shape)
        condition = torch.zeros(1, shape[0], channels, *shape[2:])
        with torch.no_grad():
            began = time.perf_counter()
            denoiser.network(latents, torch.zeros(1), condition)
            seconds = 3 * len(batch.latents) * (time.perf_counter() - began)
        if accelerator.is_main_process:
            say(f"vidfill doctor: a step of this process takes about {in_words(seconds)}")
    return max(gather_object([seconds]))


def _check_held_out(shards: str) -> Diagnosis:
    if has_split(shards, "validation"):
        return Diagnosis("held-out clips", "good", "there is a validation split")
    said = "there is no validation split: no held-out loss and no samples"
    remedy = "encode videos of a folder named validation too"
    return Diagnosis("held-out clips", "warning", said, remedy)


def _check_attention(model: ModelConfig, precision: Precision, device: torch.device) -> Diagnosis:
    remedy = "--model.attention_backend auto"
    try:
        backend = attention_backend(device.type, getattr(torch, precision), model.attention_backend)
    except BadInput as error:
        return Diagnosis("attention", "bad", str(error), remedy)
    if device.type == "cuda" and backend == "reference":
        said = "the reference holds all scores in memory"
        return Diagnosis("attention", "warning", said, remedy)
    return Diagnosis("attention", "good", f"{backend} works, forward and backward")


def _check_disk(folder: Path, wanted: int) -> Diagnosis:
    free = shutil.disk_usage(folder).free
    said = f"{free / 1e9:.1f} GB free for {wanted / 1e9:.2g} GB of checkpoints"
    if free > wanted:
        return Diagnosis("disk", "good", said)
    return Diagnosis("disk", "bad", said, "make room, or keep fewer (--keep_checkpoints)")


def _take_step(
    config: TrainConfig, denoiser: Denoiser, batch: Batch, accelerator: Accelerator
) -> Diagnosis:
    try:
        with tempfile.TemporaryDirectory() as scratch:  # for the list of a step that is not finite
            elsewhere = dataclasses.replace(config, out=Path(scratch))
            state = make_state(elsewhere, accelerator, denoiser.network)
            began = time.perf_counter()
            result = train_step(state, batch, denoiser, accelerator, elsewhere)
            loss = float(accelerator.reduce(result.loss, "mean"))
    except BadInput as error:
        return Diagnosis("one step", "bad", str(error))
    except torch.OutOfMemoryError:
        said = "the GPU's memory does not hold a step"
        remedy = "--gradient_accumulation, --model.gradient_checkpointing, or --zero_stage 2"
        return Diagnosis("one step", "bad", said, remedy)
    seconds = time.perf_counter() - began
    return Diagnosis("one step", "good", f"loss {loss:.3f} on real clips, in {seconds:.1f} s")


def merge(everyone: Sequence[tuple[int, Diagnosis]]) -> list[Diagnosis]:
    """Each diagnosis once, with the processes that made it unless all did.

    Good ones of a check count as one: they differ only in seconds and devices.
    """
    found: dict[Hashable, list[tuple[int, Diagnosis]]] = {}
    for rank, one in everyone:
        found.setdefault(one.check if one.level == "good" else one, []).append((rank, one))
    merged = []
    for alike in found.values():
        ranks, (one, *_) = zip(*alike, strict=True)
        if len(ranks) < len({rank for rank, _ in everyone}):
            one = one._replace(said=f"process {', '.join(map(str, ranks))}: {one.said}")
        merged.append(one)
    return merged


def _show(found: Sequence[Diagnosis], processes: int) -> None:
    table = Table("check", "", "found", "remedy", box=box.SIMPLE, title=f"{processes} process(es)")
    for column in table.columns:
        column.overflow = "fold"  # a long path is shown whole
    for one in found:
        table.add_row(
            one.check,
            MARKS[one.level],
            *(escape(printable(text)) for text in (one.said, one.remedy)),
        )
    Console(width=None if sys.stdout.isatty() else DOCTOR_WIDTH).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `vidfill doctor`, which is that of `vidfill train`."""
    words = find_recipe(sys.argv[1:] if argv is None else argv)
    return jobs.main(TrainConfig, doctor, words, verb="doctor", examples=EXAMPLES)
