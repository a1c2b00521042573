"""One step: draws, loss, backward, clip, update; and what becomes of one that is not finite."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..data.shards.stream import Batch
from ..errors import BadInputEverywhere
from ..modeling.denoiser import Denoiser
from ..modeling.noise import LossConfig, draw_timesteps
from ..seeding import generator
from .config import OptimizerConfig, TrainConfig
from .state import TrainState, is_under_zero, update_averages

LISTED = "not-finite.jsonl"  # in the run's folder: the clips of the steps that were left out
PATIENCE = 2000  # updates after which float16's loss is scaled twice as high


class NotFinite(BadInputEverywhere):
    """More losses or gradients were NaN or infinite than are allowed; none reached the weights."""


@dataclass(frozen=True)
class StepResult:
    """What a step measured."""

    loss: Tensor  # this process's part: its mean over the processes is the global batch's loss
    gradient_norm: float  # over all processes, before clipping; not finite: no update was made
    learning_rate: float


def draw_noise(
    positions: list[int], seed: int, shape: torch.Size, purpose: str = "noise"
) -> Float[Tensor, "batch frames channels height width"]:
    """The noise of each example, a function of (seed, position, purpose) alone."""
    draws = [
        torch.randn(shape, generator=generator(seed, position, purpose)) for position in positions
    ]
    return torch.stack(draws)


def draw_latents(batch: Batch, seed: int) -> Float[Tensor, "batch frames channels height width"]:
    """Latents drawn from the posterior where the shards hold its log-variance, else its mean."""
    if batch.log_variance is None:
        return batch.latents
    noise = draw_noise(batch.positions, seed, batch.latents.shape[1:], "posterior")
    return batch.latents + (0.5 * batch.log_variance).exp() * noise.to(batch.latents.device)


def diffusion_loss(
    network: torch.nn.Module,
    denoiser: Denoiser,
    batch: Batch,
    latents: Float[Tensor, "batch frames channels height width"],
    timestep: Int[Tensor, " batch"],
    noise: Float[Tensor, "batch frames channels height width"],
    config: LossConfig,
) -> Float[Tensor, " batch"]:
    """Each example's weighted squared error of the prediction over its frames and places.

    With plain weights it is Teshome's Eq. 7. A TrainState's network autocasts by itself.
    """
    condition = denoiser.condition(batch.masked_latents, batch.latent_mask)
    noisy, target = denoiser.training_pair(denoiser.normalise(latents), noise, timestep)
    prediction = network(noisy, timestep, condition)
    return denoiser.loss(prediction, target, timestep, batch.latent_mask, config)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate of the step that follows `step` others, whether or not they were left out."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.decay == "constant":
        return config.learning_rate
    done = (step - config.warmup) / max(1, steps - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def train_step(
    state: TrainState,
    batch: Batch,
    denoiser: Denoiser,
    accelerator: Accelerator,
    config: TrainConfig,
) -> StepResult:
    """Advance `state` by one global batch, and update the weights where all is finite.

    Raises:
        NotFinite: On every process alike, when more than `config.max_skipped` updates were left
            out.
    """
    rate = learning_rate(state.step, config.steps, config.optimizer)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    batch = batch.to(accelerator.device)
    scale, age = state.scale, state.scale_age
    losses, norm = _try(state, batch, denoiser, accelerator, config)
    loss = losses.sum() * accelerator.num_processes / config.batch_size
    finite = math.isfinite(norm) or _is_finite_everywhere(loss, accelerator)
    while finite and not math.isfinite(norm) and state.scale > 1:
        # The loss was perhaps only scaled too high for float16: the batch gets another try.
        state.scale, state.scale_age = state.scale / 2, 0
        losses, norm = _try(state, batch, denoiser, accelerator, config)
    state.step += 1
    if math.isfinite(norm):
        update_averages(state, config.optimizer)
        _age_scale(state, config)
    else:
        state.scale, state.scale_age = scale, age  # which were not at fault
        state.skipped += 1
        what = "gradient" if finite else "loss"
        _list_clips(state, batch, losses, what, accelerator, config)
        _stop_or_say(state, what, accelerator, config)
    return StepResult(loss, norm, rate)


def _try(
    state: TrainState,
    batch: Batch,
    denoiser: Denoiser,
    accelerator: Accelerator,
    config: TrainConfig,
) -> tuple[Float[Tensor, " batch"], float]:
    """Each example's weighted loss, and the gradient's norm; the update is made if that is finite.

    No collective but those of the gradient and, under ZeRO, of its norm: a loss that is not finite
    makes the gradient not finite, on every process and in every part.
    """
    slots = len(batch.keys)
    parts = _split(batch, min(config.gradient_accumulation, slots))
    share = accelerator.num_processes / config.batch_size
    measured = []
    for number, part in enumerate(parts):
        with _accumulating(state.engine, is_last=number == len(parts) - 1):
            losses = part.weights * _losses(state.engine, part, denoiser, config)
            # The mean over processes of the sum over parts is that over the global batch.
            loss = losses.sum() * share
            _backward(state, loss * torch.where(loss.isfinite(), 1.0, math.nan))
        measured.append(losses.detach())
    return torch.cat(measured), _update(state, config.optimizer.clip)


def _split(batch: Batch, count: int) -> list[Batch]:
    """The batch in parts of nearly equal size."""
    bounds = [len(batch.keys) * number // count for number in range(count + 1)]
    cuts = [slice(first, end) for first, end in itertools.pairwise(bounds)]
    return [
        dataclasses.replace(
            batch,
            **{
                field.name: value[cut]
                for field in dataclasses.fields(batch)
                if (value := getattr(batch, field.name)) is not None
            },
        )
        for cut in cuts
    ]


def _losses(
    network: torch.nn.Module, batch: Batch, denoiser: Denoiser, config: TrainConfig
) -> Float[Tensor, " batch"]:
    """The loss of each example at its own timestep and noise."""
    device = batch.latents.device
    sources = [generator(config.seed, position, "timestep") for position in batch.positions]
    timestep = draw_timesteps(sources, denoiser.timesteps, config.loss)
    noise = draw_noise(batch.positions, config.seed, batch.latents.shape[1:])
    latents = draw_latents(batch, config.seed)
    return diffusion_loss(
        network, denoiser, batch, latents, timestep.to(device), noise.to(device), config.loss
    )


def _accumulating(engine: Any, is_last: bool) -> contextlib.AbstractContextManager[None]:
    """The processes share the gradient of the last part, which holds that of all."""
    if isinstance(engine, DistributedDataParallel):
        return contextlib.nullcontext() if is_last else engine.no_sync()
    if is_under_zero(engine):
        engine.set_gradient_accumulation_boundary(is_last)
    return contextlib.nullcontext()


def _backward(state: TrainState, loss: Float[Tensor, ""]) -> None:
    if is_under_zero(state.engine):
        state.engine.optimizer.override_loss_scale(state.scale)
        state.engine.backward(loss, scale_wrt_gas=False)
    else:
        (loss * state.scale).backward()


def _update(state: TrainState, limit: float) -> float:
    """Clip the gradient to `limit`, update unless it is not finite, and return its norm before."""
    if is_under_zero(state.engine):
        state.engine.step()
        return float(state.engine.get_global_grad_norm())
    parameters = list(state.network.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if state.scale != 1:
        torch._foreach_mul_(gradients, 1 / state.scale)
    total = torch.nn.utils.get_total_norm(gradients)
    norm = float(total)
    if math.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, total)
        state.optimizer.step()
    state.optimizer.zero_grad()
    return norm


def _is_finite_everywhere(loss: Float[Tensor, ""], accelerator: Accelerator) -> bool:
    return math.isfinite(accelerator.reduce(loss, "sum"))


def _age_scale(state: TrainState, config: TrainConfig) -> None:
    """Try a higher scale in float16 when the present one has done well for long."""
    if config.precision == "float16":
        state.scale_age += 1
        if state.scale_age == PATIENCE:
            state.scale, state.scale_age = 2 * state.scale, 0


def _list_clips(
    state: TrainState,
    batch: Batch,
    losses: Float[Tensor, " batch"],
    what: str,
    accelerator: Accelerator,
    config: TrainConfig,
) -> None:
    """Write down this process's clips whose loss is not finite.

    Where only the gradient is not finite nobody knows whose it is: all are written down.
    """
    held = [
        key
        for key, loss in zip(batch.keys, losses.tolist(), strict=True)
        if key and (what == "gradient" or not math.isfinite(loss))
    ]
    if held:
        line = {"step": state.step, "rank": accelerator.process_index, "not_finite": what}
        _append(config.out / LISTED, json.dumps(line | {"clips": held}) + "\n")


def _stop_or_say(
    state: TrainState, what: str, accelerator: Accelerator, config: TrainConfig
) -> None:
    said = f"the {what} of step {state.step} is not finite"
    path = config.out / LISTED
    if state.skipped > config.max_skipped:
        raise NotFinite(
            f"{said}, and max_skipped is {config.max_skipped}: look at the clips that {path} "
            "lists, or lower optimizer.learning_rate"
        )
    if accelerator.is_main_process:
        print(
            f"vidfill train: {said}, so its update is left out, as {state.skipped} of at most "
            f"{config.max_skipped}; {path} lists its clips",
            file=sys.stderr,
        )


def _append(path: Path, line: str) -> None:
    """Add a line at once, as several processes may to one file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
