"""`vidfill train`: the loop, and its command line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from .. import jobs
from ..data.shards.reading import ShardedDataset, fingerprint_splits
from ..data.shards.stream import Stream
from ..errors import BadInput, BadInputEverywhere, describe, say
from ..modeling.denoiser import Denoiser
from ..progress import Progress, show_progress
from .checkpoints import Checkpoints
from .config import EXAMPLES, RUN_MAY_CHANGE, TrainConfig, check, find_recipe
from .control import Control, StoppedBySignal
from .monitor.held_out import HeldOut, open_held_out
from .monitor.previews import PreviewClips, open_preview
from .monitor.tensorboard import Monitor, tensorboard_command
from .preflight.plan import plan
from .state import (
    TrainState,
    averaged_network,
    load_start,
    located,
    make_accelerator,
    make_denoiser,
    make_state,
    note_changes,
    note_start,
)
from .step import train_step

LOCK_WAIT = 120.0  # seconds to wait for a lock in the folder: a lost node leaves one behind


def train(config: TrainConfig) -> None:
    """Train until `config.steps`, from the newest checkpoint where there is one.

    Raises:
        BadInput: A setting is wrong, the shards cannot be used, or the loss is not finite.
        StoppedBySignal: A signal ended the run early; its state is saved.
    """
    check(config)
    dataset = ShardedDataset(config.shards, "train", config.data.cache)
    if config.plan:
        return plan(config, dataset)
    accelerator = make_accelerator(config)
    process, processes = accelerator.process_index, accelerator.num_processes
    denoiser = make_denoiser(config, dataset.manifest)
    stream = Stream(
        dataset, config.batch_size, config.seed, process, processes, damaged=config.data.damaged
    )
    with contextlib.ExitStack() as stack:
        opened = _open_and_claim(config, denoiser, accelerator, stack)
        held_out = opened.held_out
        state = make_state(config, accelerator, denoiser.network)
        checkpoints = Checkpoints(
            config.out, config.keep_checkpoints, config.optimizer.ema_decays, denoiser, accelerator
        )
        checkpoints.load(state)
        told = [note_changes(state, config, opened.begun)]
        if opened.start and not state.history:
            told.append(note_start(state, config, opened.start, denoiser))
        if accelerator.is_main_process:
            say(*(f"vidfill train: {line}" for line in told if line))
        control = stack.enter_context(Control(config.out, process, processes))
        progress = stack.enter_context(_progress(config.out, config.steps, state, accelerator))
        batches = stream.run(state.step, config.data.workers)
        stack.enter_context(contextlib.closing(batches))
        monitor = Monitor(config, state, denoiser, stream, opened.preview, accelerator)
        stack.enter_context(monitor)
        stack.enter_context(contextlib.closing(checkpoints))
        reason = None
        while state.step < config.steps and not reason:
            result = train_step(state, next(batches), denoiser, accelerator, config)
            progress.advance(1, note=monitor.step(state, result))
            if held_out and _is_due(state.step, config.evaluation.every, config.steps):
                averaged = denoiser.with_network(averaged_network(state))
                monitor.evaluation(state.step, held_out.measure(averaged, accelerator))
            if _is_due(state.step, config.preview.every, config.steps):
                monitor.preview(state.step, denoiser.with_network(averaged_network(state)))
            reason = control.stop(state.step, checkpoints.failure())
            if reason or _is_due(state.step, config.checkpoint_every, config.steps):
                monitor.checkpoint(state.step, checkpoints.save(state, monitor.written))
        checkpoints.wait()
        stopped = reason if state.step < config.steps else None
        if stopped:
            control.leave_marker(state.step, stopped)
        accelerator.wait_for_everyone()  # or a launcher ends the first process while it writes
    accelerator.end_training()
    if stopped:
        if accelerator.is_main_process:
            say(
                f"vidfill train: stopped by {stopped.name} after step {state.step}, which is "
                "saved; the same command continues"
            )
        raise StoppedBySignal(stopped)


def _is_due(step: int, every: int, steps: int) -> bool:
    return every > 0 and (step % every == 0 or step == steps)


@dataclass
class OpenedRun:
    """What a process has open of a run before its first step."""

    preview: PreviewClips | None = None  # the first process's alone
    held_out: HeldOut | None = None  # this process's share
    begun: Mapping[str, Any] = field(default_factory=dict)  # options in the folder's record
    start: Mapping[str, Any] = field(default_factory=dict)  # as `load_start` gives it


def _open_and_claim(
    config: TrainConfig, denoiser: Denoiser, accelerator: Accelerator, stack: contextlib.ExitStack
) -> OpenedRun:
    """Claim the folder, and open what a run reads; fail on all processes or none.

    The first process holds the folder until `stack` is closed.
    """
    run, refusal, shards = OpenedRun(), "", {}
    try:
        if job := jobs.read_job(config.out):
            run.begun = job.config
        shards = fingerprint_splits(config.shards, ("train", "validation"))
        run.start = load_start(config, denoiser)
        run.held_out = open_held_out(
            config, denoiser, accelerator.process_index, accelerator.num_processes
        )
        if accelerator.is_main_process:
            run.preview = open_preview(config, denoiser, accelerator.device)
            claim = jobs.claim(
                *(config.out, "train", located(config)),
                # A run that has begun does not read the model any more.
                stands_on=lambda known: {
                    "shards": shards,
                    "from": run.start or known.get("from", {}),
                },
                may_change=RUN_MAY_CHANGE,
                # The others give up a collective after the timeout: wait half of that at most.
                patience=min(LOCK_WAIT, 30 * config.timeout),
            )
            stack.enter_context(claim)
    except (BadInput, OSError) as error:  # the others are waiting for the outcome
        refusal = describe(error)
    answers = gather_object([{"refusal": refusal, "shards": shards, "from": run.start}])
    if refusals := [answer["refusal"] for answer in answers if answer["refusal"]]:
        raise BadInputEverywhere(refusals[0])
    for name, what in (("shards", "other shards"), ("from", "another model (--from)")):
        if others := [rank for rank, one in enumerate(answers) if one[name] != answers[0][name]]:
            raise BadInputEverywhere(
                f"process {others[0]} found {what} than process 0: let all nodes see the same, and "
                "nothing that is still being written"
            )
    return run


def _progress(
    out: Path, steps: int, state: TrainState, accelerator: Accelerator
) -> contextlib.AbstractContextManager[Progress]:
    """The first process says what begins and shows progress; the others are silent."""
    if not accelerator.is_main_process:
        return contextlib.nullcontext(Progress())
    parameters = sum(parameter.numel() for parameter in state.blank.parameters())
    say(
        f"vidfill train: {parameters / 1e6:.2f} M parameters on {accelerator.num_processes} "
        f"process(es), step {state.step} of {steps}; watch it with",
        f"  {tensorboard_command(out)}   # http://localhost:6006/#custom_scalars",
    )
    return show_progress("train", steps, "steps", done=state.step)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `vidfill train`."""
    words = find_recipe(sys.argv[1:] if argv is None else argv)
    return jobs.main(TrainConfig, train, words, verb="train", examples=EXAMPLES)
