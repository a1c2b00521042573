"""`vidfill doctor`: looks for what goes wrong with a training run, before it burns an hour."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ...errors import BadInput, BadInputEverywhere, describe
from ...files import PARTIAL
from ...modeling.attention import attention_backend
from ...modeling.denoiser import Denoiser
from ..config import TrainConfig, check, find_recipe
from ..state import make_accelerator, make_denoiser, make_state
from ..step import train_step

EXAMPLES = """\
examples:
  vidfill doctor shards run --config base
  accelerate launch --config_file launch/node.yaml --num_processes 8 \\
      -m vidfill.train.preflight shards run --config base --zero_stage 2
"""

WAIT = 10.0  # seconds that a shared folder has to show a file to another node
WIDTH = 110  # columns where there is no terminal
OPEN_FILES = 4096  # that a process should be allowed
GPUS = "GPUs"  # the check without which the others cannot be

Level = Literal["good", "warning", "bad"]
MARKS = {"good": "[green]good[/]", "warning": "[yellow]look[/]", "bad": "[red]bad[/]"}


class Finding(NamedTuple):
    """What a check of one process found."""

    check: str
    level: Level
    said: str
    remedy: str = ""


def doctor(config: TrainConfig) -> None:
    """Check what `vidfill train` with the same options would meet, and print it.

    Every process of the launcher checks for itself; the first one prints what all found.

    Raises:
        BadInputEverywhere: Something is bad.
    """
    check(config)
    findings = [*_look_around()]
    _refuse_shared_gpus(findings)
    accelerator = make_accelerator(config)
    findings += _look_at_processes(accelerator)
    findings += _look_at_folder(config.out, accelerator)
    findings += _try(config, accelerator)
    everyone: list[tuple[int, Finding]] = gather_object(
        [(accelerator.process_index, finding) for finding in findings]
    )
    merged = merge(everyone)
    if accelerator.is_main_process:
        _show(merged, accelerator.num_processes)
    accelerator.end_training()
    bad = sum(finding.level == "bad" for finding in merged)
    if bad:
        raise BadInputEverywhere(f"{bad} of {len(merged)} checks are bad: see above")


def _look_around() -> Iterator[Finding]:
    yield from check_versions(importlib.metadata.requires("vidfill") or [])
    yield from check_launcher(os.environ)
    yield from check_gpus(os.environ, torch.cuda.device_count())
    yield _check_open_files()


def check_versions(requirements: Sequence[str]) -> Iterator[Finding]:
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
    remedy = "pip install again, in the environment that the job runs in"
    if wrong:
        yield Finding("versions", "bad", ", ".join(wrong), remedy)
    else:
        yield Finding("versions", "good", f"torch {torch.__version__}, and all others in range")


def check_launcher(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Does the environment say what a launcher of several processes has to say?"""
    world = int(environment.get("WORLD_SIZE", "1"))
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and world == 1:
        yield Finding(
            "launcher",
            "bad",
            f"srun started {tasks} tasks and WORLD_SIZE is not set: each trains alone",
            "start one task a node, and in it `accelerate launch`: `vidfill launch` writes it",
        )
        return
    yield Finding("launcher", "good", f"WORLD_SIZE is {world}")
    nodes = int(environment.get("SLURM_NNODES", "1"))
    if world > 1 and nodes > 1 and environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        chosen = environment.get("ACCELERATE_DEEPSPEED_MULTINODE_LAUNCHER", "pdsh")
        if chosen != "standard":
            yield Finding(
                "launcher",
                "bad",
                f"Accelerate starts the nodes by {chosen}, which needs ssh between them",
                "use an Accelerate configuration without DeepSpeed (--zero_stage turns it on)",
            )
    if "SLURM_JOB_ID" in environment and world > 1:
        yield _check_signals(environment)


def check_gpus(environment: Mapping[str, str], gpus: int) -> Iterator[Finding]:
    """Has each process of this node a GPU of its own, where there are any?"""
    local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if local > gpus > 0:
        yield Finding(
            GPUS,
            "bad",
            f"{local} processes on this node share {gpus} GPU(s)",
            "give --num_processes as nodes times GPUs of a node",
        )


def _refuse_shared_gpus(findings: Sequence[Finding]) -> None:
    """End here, for NCCL cannot share a GPU: the processes cannot tell one another anything."""
    if any(finding.check == GPUS for finding in findings):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _show(findings, int(os.environ.get("WORLD_SIZE", "1")))
        raise BadInputEverywhere("processes share GPUs: see above; all else waits for that")


def _check_signals(environment: Mapping[str, str]) -> Finding:
    handled = "SIGUSR1" in environment.get("PET_SIGNALS_TO_HANDLE", "")
    ignored = signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN  # as this process inherited it
    if handled or ignored:
        return Finding("signals", "good", "the launcher outlives Slurm's warning")
    return Finding(
        "signals",
        "warning",
        "the launcher dies of Slurm's warning signal, and its processes are orphans then",
        "start it by `vidfill launch`, or after trap '' USR1",
    )


def _check_open_files() -> Finding:
    import resource

    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed >= OPEN_FILES or allowed == resource.RLIM_INFINITY:
        return Finding("open files", "good", f"{allowed} allowed")
    return Finding(
        "open files", "warning", f"{allowed} allowed: shards stay open", f"ulimit -n {OPEN_FILES}"
    )


def _look_at_processes(accelerator: Accelerator) -> Iterator[Finding]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world:
        yield Finding(
            "processes",
            "bad",
            f"the launcher started {world}, and each believes in {accelerator.num_processes}",
            "start by `accelerate launch --multi_gpu`, without --cpu",
        )
        return
    one = torch.ones(1, device=accelerator.device)
    summed = int(accelerator.reduce(one, "sum").item())
    place = f"{accelerator.device}, by {accelerator.state.backend or 'no backend'}"
    yield Finding("processes", "good", f"{summed} add up; each on its {place}")


def _look_at_folder(out: Path, accelerator: Accelerator) -> Iterator[Finding]:
    """Do all processes see in the run's folder what the first one writes there?"""
    folder = next(parent for parent in (out, *out.resolve().parents) if parent.is_dir())
    token = [uuid.uuid4().hex]
    broadcast_object_list(token)
    mark = folder / f"{PARTIAL}doctor-{token[0]}"
    written = _attempt(mark.touch) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    seen = _appears(mark)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        mark.unlink(missing_ok=True)
    if written:
        yield Finding("run's folder", "bad", f"{folder}: {written}", "name a folder of your own")
    elif seen:
        yield Finding("run's folder", "good", f"{folder}: what process 0 writes is seen")
    else:
        yield Finding(
            "run's folder",
            "bad",
            f"{folder}: what process 0 writes is not seen here after {WAIT:g} s",
            "name a folder on a file system that all nodes share",
        )


def _attempt(action: Callable[[], object]) -> str | None:
    try:
        action()
    except OSError as error:
        return describe(error)
    return None


def _appears(path: Path) -> bool:
    ends = time.monotonic() + WAIT
    while not path.exists() and time.monotonic() < ends:
        os.listdir(path.parent)  # which makes a network file system look again
        time.sleep(0.1)
    return path.exists()


def _try(config: TrainConfig, accelerator: Accelerator) -> Iterator[Finding]:
    """Open the shards, make the model, and take one real step that is kept nowhere.

    A step is for all processes or for none: who cannot take it would let the others wait.
    """
    findings: list[Finding] = []
    ready = _prepare(config, accelerator, findings)
    yield from findings
    if all(gather_object([ready is not None])):
        assert ready
        yield _take_step(config, *ready, accelerator)
    elif ready:
        yield Finding("one step", "warning", "not tried: another process cannot take it")


def _prepare(
    config: TrainConfig, accelerator: Accelerator, findings: list[Finding]
) -> tuple[Denoiser, Batch] | None:
    """What a step needs, if this process has it; nothing here waits for another process."""
    try:
        dataset = ShardedDataset(config.shards, "train", config.data.cache)
        manifest = dataset.manifest
        shape = "×".join(map(str, manifest.latent_shape))
        said = f"{manifest.examples} examples of {shape} in {len(manifest.shards.bytes)} shards"
        findings.append(Finding("shards", "good", said))
        findings += [_check_held_out(config), _check_attention(config, accelerator)]
        denoiser = make_denoiser(config, manifest)
        findings.append(_check_disk(config, denoiser))
        process, processes = accelerator.process_index, accelerator.num_processes
        stream = Stream(dataset, config.batch_size, config.seed, process, processes)
        return denoiser, stream.batch(0)
    except (BadInput, OSError) as error:
        findings.append(Finding("shards and network", "bad", describe(error)))
        return None


def _check_held_out(config: TrainConfig) -> Finding:
    if has_split(config.shards, "validation"):
        return Finding("held-out clips", "good", "there is a validation split")
    return Finding(
        "held-out clips",
        "warning",
        "there is no validation split: no held-out loss and no samples",
        "encode videos of a folder named validation too",
    )


def _check_attention(config: TrainConfig, accelerator: Accelerator) -> Finding:
    device, dtype = accelerator.device.type, getattr(torch, config.precision)
    try:
        backend = attention_backend(device, dtype, config.model.attention_backend)
    except BadInput as error:
        return Finding("attention", "bad", str(error), "--model.attention_backend auto")
    if device == "cuda" and backend == "reference":
        return Finding(
            "attention",
            "warning",
            "the reference holds all scores in memory",
            "--model.attention_backend auto",
        )
    return Finding("attention", "good", f"{backend} works, forward and backward")


def _check_disk(config: TrainConfig, denoiser: Denoiser) -> Finding:
    parameters = sum(parameter.numel() for parameter in denoiser.network.parameters())
    checkpoint = 4 * parameters * (3 + len(config.optimizer.ema_decays))
    wanted = checkpoint * (config.keep_checkpoints + 1)
    folder = next(path for path in (config.out, *config.out.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    said = f"{free / 1e9:.1f} GB free for {wanted / 1e9:.2g} GB of checkpoints"
    if free > wanted:
        return Finding("disk", "good", said)
    return Finding("disk", "bad", said, "make room, or keep fewer (--keep_checkpoints)")


def _take_step(
    config: TrainConfig, denoiser: Denoiser, batch: Batch, accelerator: Accelerator
) -> Finding:
    try:
        with tempfile.TemporaryDirectory() as scratch:  # for what a bad step would list
            elsewhere = dataclasses.replace(config, out=Path(scratch))
            state = make_state(elsewhere, accelerator, denoiser.network)
            began = time.perf_counter()
            result = train_step(state, batch, denoiser, accelerator, elsewhere)
            loss = float(accelerator.reduce(result.loss, "mean"))
    except BadInput as error:
        return Finding("one step", "bad", str(error))
    except torch.OutOfMemoryError:
        return Finding(
            "one step",
            "bad",
            "the GPU's memory does not hold a step",
            "a larger --gradient_accumulation, --model.gradient_checkpointing, or --zero_stage 2",
        )
    seconds = time.perf_counter() - began
    return Finding("one step", "good", f"loss {loss:.3f} on real clips, in {seconds:.1f} s")


def merge(everyone: Sequence[tuple[int, Finding]]) -> list[Finding]:
    """Each finding once, with the processes that made it where not all did."""
    ranks: dict[Finding, list[int]] = {}
    processes = {rank for rank, _ in everyone}
    for rank, finding in everyone:
        same = next((other for other in ranks if _is_alike(other, finding)), finding)
        ranks.setdefault(same, []).append(rank)
    return [
        finding
        if len(found) == len(processes)
        else finding._replace(said=f"process {', '.join(map(str, found))}: {finding.said}")
        for finding, found in ranks.items()
    ]


def _is_alike(one: Finding, other: Finding) -> bool:
    """Good ones differ in seconds and devices, which nobody needs of each process."""
    return one == other or (one.check == other.check and one.level == other.level == "good")


def _show(findings: Sequence[Finding], processes: int) -> None:
    console = Console()
    table = Table("check", "", "found", "remedy", box=box.SIMPLE, title=f"{processes} process(es)")
    for column in table.columns:
        column.overflow = "fold"  # a long path is shown whole
    for finding in findings:
        table.add_row(
            finding.check, MARKS[finding.level], escape(finding.said), escape(finding.remedy)
        )
    (console if console.is_terminal else Console(width=WIDTH)).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `vidfill doctor`, which is that of `vidfill train`."""
    words = find_recipe(sys.argv[1:] if argv is None else argv)
    return jobs.main(TrainConfig, doctor, words, verb="doctor", examples=EXAMPLES)
