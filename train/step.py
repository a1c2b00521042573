"""One step: draws, loss, backward, clip, update; steps that are not finite are left out."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..data.shards.stream import Batch
from ..errors import BadInputEverywhere, say
from ..modeling.denoiser import Denoiser
from ..modeling.noise import draw_timesteps
from ..modeling.settings import LossConfig
from ..seeding import generator
from .config import OptimizerConfig, TrainConfig
from .state import TrainState, is_under_zero, update_averages

NOT_FINITE = "not-finite.jsonl"  # in the run's folder: the clips of steps that were left out
SCALE_GROWS_AFTER = 2000  # updates without an overflow, after which float16's scale doubles


class NotFinite(BadInputEverywhere):
    """More losses or gradients than allowed were NaN or infinite; none reached the weights."""


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
    """Advance `state` by one global batch, and update the weights if everything is finite.

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
    finite = math.isfinite(norm) or math.isfinite(accelerator.reduce(loss, "sum"))
    while finite and not math.isfinite(norm) and state.scale > 1:
        # The loss may only have been scaled too high for float16: try the batch again.
        state.scale, state.scale_age = state.scale / 2, 0
        losses, norm = _try(state, batch, denoiser, accelerator, config)
    state.step += 1
    if math.isfinite(norm):
        update_averages(state, config.optimizer.ema_decays)
        if config.precision == "float16":
            state.scale_age += 1
            if state.scale_age == SCALE_GROWS_AFTER:
                state.scale, state.scale_age = 2 * state.scale, 0
    else:
        state.scale, state.scale_age = scale, age  # they were not the cause
        state.skipped += 1
        what = "gradient" if finite else "loss"
        path = config.out / NOT_FINITE
        _list_examples(path, state.step, accelerator.process_index, batch.keys, losses, what)
        said = f"the {what} of step {state.step} is not finite"
        if state.skipped > config.max_skipped:
            raise NotFinite(
                f"{said}, and max_skipped is {config.max_skipped}: look at the clips listed in "
                f"{path}, or lower optimizer.learning_rate"
            )
        if accelerator.is_main_process:
            say(
                f"vidfill train: {said}, so its update is left out (number {state.skipped} of at "
                f"most {config.max_skipped}); {path} lists its clips"
            )
    return StepResult(loss, norm, rate)


def _try(
    state: TrainState,
    batch: Batch,
    denoiser: Denoiser,
    accelerator: Accelerator,
    config: TrainConfig,
) -> tuple[Float[Tensor, " batch"], float]:
    """Each example's weighted loss, and the gradient's norm; updates the weights if it is finite.

    There are no collectives but those of the gradient and, under ZeRO, of its norm: a loss that is
    not finite makes the gradient not finite, on every process and in every part.
    """
    parts = _split(batch, min(config.gradient_accumulation, len(batch.keys)))
    measured = []
    for number, part in enumerate(parts, start=1):
        with _accumulating(state.engine, is_last=number == len(parts)):
            losses = part.weights * _losses(state.engine, part, denoiser, config.seed, config.loss)
            # The mean over processes of the sum over parts is that over the global batch.
            loss = losses.sum() * (accelerator.num_processes / config.batch_size)
            _backward(state, loss * torch.where(loss.isfinite(), 1.0, math.nan))
        measured.append(losses.detach())
    return torch.cat(measured), _update(state, config.optimizer.clip)


def _split(batch: Batch, count: int) -> list[Batch]:
    """The batch in parts of nearly equal size."""
    bounds = [len(batch.keys) * number // count for number in range(count + 1)]
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    given = {name: value for name, value in values.items() if value is not None}
    return [
        dataclasses.replace(batch, **{name: value[first:end] for name, value in given.items()})
        for first, end in itertools.pairwise(bounds)
    ]


def _losses(
    network: torch.nn.Module, batch: Batch, denoiser: Denoiser, seed: int, config: LossConfig
) -> Float[Tensor, " batch"]:
    """The loss of each example at its own timestep and noise."""
    device = batch.latents.device
    sources = [generator(seed, position, "timestep") for position in batch.positions]
    timestep = draw_timesteps(sources, denoiser.timesteps, config)
    noise = draw_noise(batch.positions, seed, batch.latents.shape[1:])
    latents = draw_latents(batch, seed)
    return diffusion_loss(
        network, denoiser, batch, latents, timestep.to(device), noise.to(device), config
    )


def _accumulating(engine: Any, is_last: bool) -> contextlib.AbstractContextManager[None]:
    """Within the last part the processes share the gradient, which is that of all parts."""
    if isinstance(engine, DistributedDataParallel) and not is_last:
        return engine.no_sync()
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
    """Clip the gradient to `limit`, update if it is finite, and return its norm before clipping."""
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


def _list_examples(
    path: Path,
    step: int,
    rank: int,
    keys: list[str],
    losses: Float[Tensor, " batch"],
    what: str,
) -> None:
    """Append this process's examples whose loss is not finite to the file of all processes.

    If only the gradient is not finite, any example may be the cause: all are listed.
    """
    values = zip(keys, losses.tolist(), strict=True)
    held = [k for k, loss in values if k and (what == "gradient" or not math.isfinite(loss))]
    if held:
        line = json.dumps({"step": step, "rank": rank, "not_finite": what, "clips": held})
        with path.open("ab", buffering=0) as file:  # in one write: others append too
            file.write(f"{line}\n".encode())
