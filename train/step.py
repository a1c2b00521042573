"""One optimizer step: draws, loss, backward, clip, update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from ..data.stream import Batch
from ..jobs import BadInput
from ..modeling.diffusion import Denoiser
from ..modeling.noise import LossConfig, draw_timesteps
from ..seeding import generator
from .config import OptimizerConfig, TrainConfig
from .state import TrainState, update_average


class NotFinite(BadInput):
    """The loss or the gradient is NaN or infinite; no later step was taken."""


@dataclass(frozen=True)
class StepResult:
    """What a step measured, over all processes."""

    loss: float
    gradient_norm: float  # before clipping
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

    With plain weights it is Teshome's Eq. 7.
    """
    condition = denoiser.condition(batch.masked_latents, batch.latent_mask)
    noisy, target = denoiser.training_pair(denoiser.normalise(latents), noise, timestep)
    prediction = network(noisy, timestep, condition)
    return denoiser.loss(prediction, target, timestep, batch.latent_mask, config)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate of the optimizer step that follows `step` finished ones."""
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
    """Advance `state` by one optimizer step.

    Raises:
        NotFinite: On every process alike. A bad loss never reaches the weights; a bad gradient
            does only under DeepSpeed, whose backward pass ends with the update.
    """
    rate = learning_rate(state.step, config.steps, config.optimizer)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    batch = batch.to(accelerator.device)
    sources = [generator(config.seed, position, "timestep") for position in batch.positions]
    timestep = draw_timesteps(sources, denoiser.timesteps, config.loss)
    noise = draw_noise(batch.positions, config.seed, batch.latents.shape[1:])
    with torch.autocast(
        accelerator.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"
    ):
        losses = diffusion_loss(
            state.network,
            denoiser,
            batch,
            draw_latents(batch, config.seed),
            timestep.to(accelerator.device),
            noise.to(accelerator.device),
            config.loss,
        )
    # The mean over processes of this is the mean over the global batch, which pads do not enter.
    loss = (losses * batch.weights).sum() * accelerator.num_processes / config.batch_size
    shared_loss = float(accelerator.reduce(loss.detach(), "mean"))
    _stop_unless_finite(shared_loss, "loss", state.step, batch)
    accelerator.backward(loss)
    norm = _clip(state, accelerator, config.optimizer.clip)
    _stop_unless_finite(norm, "gradient norm", state.step, batch)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    update_average(state, accelerator.unwrap_model(state.network), config.optimizer)
    return StepResult(shared_loss, norm, rate)


def _clip(state: TrainState, accelerator: Accelerator, limit: float) -> float:
    """Clip the gradient; under DeepSpeed the engine has, at its configuration's limit."""
    norm = accelerator.clip_grad_norm_(state.network.parameters(), limit)
    if norm is None:
        norm = state.network.get_global_grad_norm()
    return float(norm)


def _stop_unless_finite(value: float, name: str, step: int, batch: Batch) -> None:
    if not math.isfinite(value):
        clips = ", ".join(filter(None, batch.keys))
        raise NotFinite(
            f"the {name} of step {step} is {value}; this process held the clips {clips}: "
            "lower optimizer.learning_rate, or look at those clips"
        )
