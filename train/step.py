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
from ..modeling.diffusion import Denoiser, add_noise, expand, target_of
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


def draw_timesteps(positions: list[int], seed: int, timesteps: int) -> Int[Tensor, " batch"]:
    """A uniform timestep for each example, a function of (seed, position) alone."""
    draws = [
        torch.randint(timesteps, (1,), generator=generator(seed, position, "timestep"))
        for position in positions
    ]
    return torch.cat(draws)


def draw_noise(
    positions: list[int], seed: int, shape: torch.Size
) -> Float[Tensor, "batch frames channels height width"]:
    """The noise of each example, a function of (seed, position) alone."""
    draws = [
        torch.randn(shape, generator=generator(seed, position, "noise")) for position in positions
    ]
    return torch.stack(draws)


def diffusion_loss(
    network: torch.nn.Module,
    denoiser: Denoiser,
    batch: Batch,
    timestep: Int[Tensor, " batch"],
    noise: Float[Tensor, "batch frames channels height width"],
) -> Float[Tensor, ""]:
    """Mean squared error of the prediction over all frames and places (the paper's Eq. 7)."""
    clean = denoiser.normalise(batch.latents)
    ab = expand(denoiser.alpha_bar(timestep)).to(clean.dtype)
    condition = denoiser.condition(batch.masked_latents, batch.latent_mask)
    prediction = network(add_noise(clean, noise, ab), timestep, condition)
    target = target_of(denoiser.config.target, clean, noise, ab)
    return (prediction.float() - target).square().mean()


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
    timestep = draw_timesteps(batch.positions, config.seed, denoiser.timesteps)
    noise = draw_noise(batch.positions, config.seed, batch.latents.shape[1:])
    with torch.autocast(
        accelerator.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"
    ):
        loss = diffusion_loss(
            state.network,
            denoiser,
            batch,
            timestep.to(accelerator.device),
            noise.to(accelerator.device),
        )
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
        raise NotFinite(
            f"the {name} of step {step} is {value}; this process held the clips "
            f"{', '.join(batch.keys)}: lower optimizer.learning_rate, or look at those clips"
        )
