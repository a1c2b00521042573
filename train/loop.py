"""`vidfill train`: the loop, and its command line."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .. import jobs
from ..data.shards import ShardedDataset
from ..data.stream import Stream
from ..modeling.diffusion import Denoiser
from .checkpoints import load_checkpoint, save_checkpoint
from .config import MAY_CHANGE, TrainConfig, check
from .monitoring import Monitor, Preview, SkipLog, open_preview, tensorboard_command
from .state import TrainState, make_accelerator, make_denoiser, make_state
from .step import train_step

EXAMPLES = """\
examples:
  vidfill train shards runs/first --steps 5000
  vidfill train shards runs/paper --diffusion.normalise false --optimizer.learning_rate 2e-5
  accelerate launch --config_file launch/node.yaml --num_processes 2 \\
      -m vidfill.train shards runs/two
  accelerate launch --config_file launch/node.yaml -m vidfill.train shards runs/zero --zero_stage 2
  tensorboard --logdir runs/first/tensorboard
"""


def train(config: TrainConfig) -> None:
    """Train until `config.steps`, from the newest checkpoint where there is one.

    Raises:
        BadInput: A setting is wrong, the shards cannot be used, or the loss is not finite.
    """
    check(config)
    dataset = ShardedDataset(config.shards, "train", config.data.cache)
    accelerator = make_accelerator(config)
    process, processes = accelerator.process_index, accelerator.num_processes
    stream = Stream(
        dataset, config.batch_size, config.seed, process, processes, damaged=config.data.damaged
    )
    denoiser = make_denoiser(config, dataset.manifest)
    preview = _open_and_claim(config, denoiser, accelerator)
    state = make_state(config, accelerator, denoiser.network)
    checkpoints = config.out / "checkpoints"
    load_checkpoint(checkpoints, state, denoiser, accelerator)
    skips = SkipLog(config.out, process)
    with (
        _monitor(config, state, preview, accelerator) as monitor,
        _progress(config, state, accelerator) as progress,
        contextlib.closing(stream.run(state.step, config.data.workers)) as batches,
    ):
        while state.step < config.steps:
            began = time.perf_counter()
            result = train_step(state, next(batches), denoiser, accelerator, config)
            skips.write(stream.skipped)
            speed = config.batch_size / (time.perf_counter() - began)
            progress.advance(1, note=f"loss {result.loss:.4f}, {speed:.1f} clips/s")
            if monitor and _is_due(state.step, config.log_every, config.steps):
                monitor.scalars(state.step, result, speed)
            if _is_due(state.step, config.checkpoint_every, config.steps):
                save_checkpoint(checkpoints, state, denoiser, accelerator, config.keep_checkpoints)
            if monitor and _is_due(state.step, config.preview.every, config.steps):
                monitor.preview(state.step, denoiser.with_network(state.average))
    accelerator.end_training()


def _is_due(step: int, every: int, steps: int) -> bool:
    return every > 0 and (step % every == 0 or step == steps)


def _open_and_claim(
    config: TrainConfig, denoiser: Denoiser, accelerator: Accelerator
) -> Preview | None:
    """The first process opens the preview and takes the folder; all learn whether it could."""
    preview: Preview | None = None
    refusal: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            preview = open_preview(config, denoiser)
            located = dataclasses.replace(config, shards=jobs.locate(config.shards))
            jobs.claim(config.out, "train", located, MAY_CHANGE)
        except (jobs.BadInput, OSError) as error:  # the others wait to hear of either
            refusal = [str(error)]
    broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise jobs.BadInputEverywhere(refusal[0])
    return preview


def _monitor(
    config: TrainConfig, state: TrainState, preview: Preview | None, accelerator: Accelerator
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
    return Monitor(config.out, state.step, preview)


def _progress(
    config: TrainConfig, state: TrainState, accelerator: Accelerator
) -> contextlib.AbstractContextManager[jobs.Progress]:
    """Progress on the first process; the others work in silence."""
    if not accelerator.is_main_process:
        return contextlib.nullcontext(jobs.Progress())
    return jobs.progress("train", config.steps, "steps", done=state.step)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `vidfill train`."""
    return jobs.main(TrainConfig, train, argv, verb="train", examples=EXAMPLES)
