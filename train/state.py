"""All that changes during a run, and how it is made."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs

from ..data.shards import Manifest
from ..modeling.diffusion import Denoiser, LatentSpace
from ..modeling.presets import build
from ..modeling.unet import VideoUNet
from .config import ModelConfig, OptimizerConfig, TrainConfig


@dataclass
class TrainState:
    """The run's state; the position in the stream is `step` global batches."""

    step: int  # optimizer steps done
    network: Any  # the trained network as Accelerate wraps it
    optimizer: Any  # AdamW as Accelerate wraps it
    average: VideoUNet  # the exponential moving average of the weights, float32


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate, alone or with DeepSpeed; on a machine without a GPU over gloo.

    Precision is the step's business, so that ZeRO keeps float32 weights whatever the forward pass
    computes in.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if config.zero_stage == 0:
        # Explicitly "no", or a default of the user's own Accelerate configuration would win.
        return Accelerator(cpu=on_cpu, mixed_precision="no")
    # Without this, and with `cpu=True`, a process under DeepSpeed believes that it is alone.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    backend = "gloo" if on_cpu else "nccl"
    return Accelerator(
        mixed_precision="no",
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=_deepspeed_config(config)),
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
        step_scheduler_with_optimizer=False,
    )


def _deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "gradient_clipping": config.optimizer.clip,
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": -(-config.batch_size // processes),
        "steps_per_print": 2**31,
    }


def make_denoiser(config: TrainConfig, manifest: Manifest) -> Denoiser:
    """A fresh network for the latents of `manifest`; its weights depend on the seed alone."""
    channels = manifest.latent_shape[1]
    condition = channels + 1 if config.diffusion.mask_channel else channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = _make_network(config.model, channels, condition)
    return Denoiser(network, config.diffusion, space_of(manifest), config.precision)


def _make_network(model: ModelConfig, channels: int, condition: int) -> VideoUNet:
    entry: dict[str, Any] = {"conditioning": model.conditioning}
    if model.preset:
        network = build(model.preset, channels, condition, **entry)
    else:
        network = VideoUNet(channels, condition, **model.network_options(), **entry)
    network.set_attention_backend(model.attention_backend)
    return network


def space_of(manifest: Manifest) -> LatentSpace:
    """The latents that a dataset holds."""
    return LatentSpace(
        list(manifest.latent_shape),
        list(manifest.latents_mean),
        list(manifest.latents_std),
        dict(manifest.autoencoder),
    )


def make_state(config: TrainConfig, accelerator: Accelerator, network: VideoUNet) -> TrainState:
    """The state before the first step."""
    average = copy.deepcopy(network).to(accelerator.device).eval().requires_grad_(False)
    if config.model.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=config.optimizer.learning_rate,
        weight_decay=config.optimizer.weight_decay,
    )
    network.train()
    prepared, optimizer = accelerator.prepare(network, optimizer)
    return TrainState(step=0, network=prepared, optimizer=optimizer, average=average)


@torch.no_grad()
def update_average(state: TrainState, weights: VideoUNet, config: OptimizerConfig) -> None:
    """Move the average towards the weights; its decay rises as (1 + step) / (10 + step)."""
    decay = min(config.ema_decay, (1 + state.step) / (10 + state.step))
    averages: list[torch.Tensor] = list(state.average.parameters())
    torch._foreach_lerp_(averages, list(weights.parameters()), 1 - decay)
