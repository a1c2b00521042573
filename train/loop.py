"""`vidfill train`: the loop, and its command line."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .. import jobs
from ..data.shards import ShardedDataset
from ..data.stream import Stream
from .checkpoints import load_checkpoint, save_checkpoint
from .config import MAY_CHANGE, TrainConfig
from .monitoring import Monitor, tensorboard_command
from .state import TrainState, make_accelerator, make_denoiser, make_state
from .step import NotFinite, train_step

EXAMPLES = """\
examples:
  vidfill train shards runs/first --steps 5000
  vidfill train shards runs/paper --diffusion.normalise false --optimizer.learning_rate 2e-5
  accelerate launch --num_processes 2 --cpu -m vidfill.train shards runs/two
  accelerate launch --num_processes 8 -m vidfill.train shards runs/zero --zero_stage 2
  tensorboard --logdir runs/first/tensorboard
"""


def train(config: TrainConfig) -> None:
    """Train until `config.steps`, from the newest checkpoint where there is one."""
    dataset = ShardedDataset(config.shards, "train")
    accelerator = make_accelerator(config)
    _claim_together(config, accelerator)
    stream = Stream(
        dataset,
        config.batch_size,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    denoiser = make_denoiser(config, dataset.manifest)
    state = make_state(config, accelerator, denoiser.network)
    load_checkpoint(config.out / "checkpoints", state, accelerator)
    with (
        _monitor(config, state, accelerator) as monitor,
        _progress(config, state, accelerator) as progress,
    ):
        while state.step < config.steps:
            began = time.perf_counter()
            result = train_step(state, stream.batch(state.step), denoiser, accelerator, config)
            speed = config.batch_size / (time.perf_counter() - began)
            progress.advance(1, note=f"loss {result.loss:.4f}, {speed:.1f} clips/s")
            if monitor and _is_due(state.step, config.log_every, config.steps):
                monitor.scalars(state.step, result, speed)
            if _is_due(state.step, config.checkpoint_every, config.steps):
                save_checkpoint(
                    config.out / "checkpoints",
                    state,
                    denoiser,
                    accelerator,
                    config.keep_checkpoints,
                )
            if monitor and _is_due(state.step, config.preview.every, config.steps):
                monitor.preview(state.step, denoiser.with_network(state.average))
    accelerator.end_training()


def _is_due(step: int, every: int, steps: int) -> bool:
    return every > 0 and (step % every == 0 or step == steps)


def _claim_together(config: TrainConfig, accelerator: Accelerator) -> None:
    """The first process takes the folder; all of them learn whether it could."""
    refusal: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            jobs.claim(config.out, "train", config, MAY_CHANGE)
        except jobs.BadInput as error:
            refusal = [str(error)]
    broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise jobs.BadInput(refusal[0])


def _monitor(
    config: TrainConfig, state: TrainState, accelerator: Accelerator
) -> contextlib.AbstractContextManager[Monitor | None]:
    if not accelerator.is_main_process:
        return contextlib.nullcontext()
    parameters = sum(parameter.numel() for parameter in state.average.parameters())
    print(
        f"vidfill train: {parameters / 1e6:.2f} M parameters on {accelerator.num_processes} "
        f"process(es), step {state.step} of {config.steps}; watch it with\n"
        f"  {tensorboard_command(config.out)}",
        file=sys.stderr,
    )
    validation = None
    if config.preview.every and config.preview.clips:
        validation = ShardedDataset(config.shards, "validation")
    return Monitor(config, state.step, validation)


def _progress(
    config: TrainConfig, state: TrainState, accelerator: Accelerator
) -> contextlib.AbstractContextManager[jobs.Progress]:
    """Progress on the first process; the others work in silence."""
    if not accelerator.is_main_process:
        return contextlib.nullcontext(jobs.Progress())
    return jobs.progress("train", config.steps, "steps", done=state.step)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `vidfill train`."""
    return jobs.main(TrainConfig, _train_or_stop, argv, verb="train", examples=EXAMPLES)


def _train_or_stop(config: TrainConfig) -> None:
    try:
        train(config)
    except NotFinite as error:
        raise jobs.BadInput(f"{error}; the last checkpoint in {config.out} is good") from error
