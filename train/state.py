"""All that changes during a run, how it is made, and how whole tensors are read and written.

The averages of the weights are kept beside Adam's moments, in the optimizer's state: whole under
plain training, partitioned wherever ZeRO partitions the moments.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import logging
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .. import jobs
from ..data.shards.format import Manifest
from ..errors import BadInput
from ..files import locate
from ..modeling.autoencoder import refuse_another
from ..modeling.denoiser import Denoiser, LatentSpace
from ..modeling.precision import autocast
from ..modeling.run_folder import CHECKPOINTS, newest_first
from ..modeling.settings import SHIPPED
from ..modeling.unet import VideoUNet, build
from .config import RATE_OPTIONS, TrainConfig
from .deepspeed import deepspeed_config
from .monitor.trackers import other_trackers

FIRST_SCALE = 65536.0  # of float16's loss
# Options whose changes leave no trace.
NOT_OF_THE_RUN = ("out", "plan", "plan_gpus", "plan_tflops", "profile")
COUNTERS = ("step", "skipped", "scale", "scale_age", "began", "productive")


@dataclass
class TrainState:
    """The run's state; the position in the stream is `step` global batches."""

    step: int  # global batches taken
    skipped: int  # of them, those whose update was left out because it was not finite
    scale: float  # what the loss is multiplied by in float16; 1 elsewhere
    scale_age: int  # updates since the scale last changed
    began: float  # unix time of the run's first start
    productive: float  # seconds of the steps so far; what a restart repeats is counted once
    engine: Any  # the network as it is trained: itself, DDP or a DeepSpeedEngine
    network: VideoUNet  # the network inside of it; under ZeRO-3 its parameters are empty
    optimizer: torch.optim.AdamW  # its state is of this process's float32 tensors
    blank: VideoUNet  # the network's structure, without memory
    options: Mapping[str, Any]  # of the last step, by their dotted names
    history: list[dict[str, Any]]  # what changed, and the first step that it held for

    @property
    def updates(self) -> int:
        """Updates that the weights have had."""
        return self.step - self.skipped

    def counters(self) -> dict[str, int | float]:
        """The plain numbers of the state."""
        return {name: getattr(self, name) for name in COUNTERS}

    def set_counters(self, counters: Mapping[str, int | float]) -> None:
        """The inverse of `counters`; Adam's own count of updates follows."""
        for name in COUNTERS:
            setattr(self, name, counters[name])
        for values in self.optimizer.state.values():
            values["step"].fill_(self.updates)


def located(config: TrainConfig) -> TrainConfig:
    """As records have it: with places that are the same from anywhere, and without secrets."""
    has_place = config.from_ not in ("", SHIPPED)
    from_ = locate(config.from_) if has_place else config.from_
    return dataclasses.replace(config, shards=locate(config.shards), from_=from_)


def note_changes(state: TrainState, config: TrainConfig, begun: Mapping[str, Any]) -> str:
    """Record which options differ from those of the last step, and say so; "" if none do.

    Version 0.1 recorded those of a checkpoint only in its job's record, `begun`.
    """
    changed = jobs.changed_options(state.options or begun, located(config)) if state.step else {}
    changed = {name: values for name, values in changed.items() if name not in NOT_OF_THE_RUN}
    state.options = jobs.record_of(located(config))
    if not changed:
        return ""
    event = {"step": state.step + 1, "changed": changed}
    state.history = [*state.history, event]
    follows = set(RATE_OPTIONS) | ({"steps"} if config.optimizer.decay == "cosine" else set())
    consequence = "; this changes the learning rate, and so the result"
    return describe_event(event) + (consequence if follows & changed.keys() else "")


def describe_event(event: Mapping[str, Any]) -> str:
    """One entry of a run's history in words."""
    changes = [f"{name} is {now!r} (was {was!r})" for name, (was, now) in event["changed"].items()]
    parts = [f"from step {event['step']} on {', '.join(changes)}"] if changes else []
    if "from" in event:
        parts.insert(0, f"begun with the weights of {event['from']} ({event['weights']:.12})")
    return "; ".join(parts)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate, alone or with DeepSpeed; over gloo on a machine without a GPU.

    Precision is left to the network (`make_state`), so that ZeRO keeps float32 weights whatever the
    forward pass computes in.
    """
    on_cpu = not torch.cuda.is_available()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may choose
    torch.use_deterministic_algorithms(config.deterministic)
    timeout = datetime.timedelta(minutes=config.timeout)
    trackers = other_trackers(config)
    if config.zero_stage == 0:
        # Explicitly "no", or a default of the user's own Accelerate configuration would win.
        return Accelerator(
            cpu=on_cpu,
            mixed_precision="no",
            log_with=trackers or None,
            project_dir=config.out,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timeout),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it logs pages of settings
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    # Without this, and with `cpu=True`, a process under DeepSpeed believes that it is alone.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if "LOCAL_RANK" not in os.environ:  # no launcher has set what DeepSpeed relies on
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    backend = "gloo" if on_cpu else "nccl"
    return Accelerator(
        mixed_precision="no",
        log_with=trackers or None,
        project_dir=config.out,
        deepspeed_plugin=DeepSpeedPlugin(
            hf_ds_config=deepspeed_config(config, processes),
            zero3_init_flag=False,
        ),
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timeout)],
        step_scheduler_with_optimizer=False,
    )


def make_denoiser(config: TrainConfig, manifest: Manifest) -> Denoiser:
    """A fresh network for the latents of `manifest`; its weights depend on the seed alone."""
    channels = manifest.latent_shape[1]
    condition = channels + 1 if config.diffusion.mask_channel else channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model, entry = config.model, {"conditioning": config.model.conditioning}
        if model.preset:
            network = build(model.preset, channels, condition, **entry)
        else:
            network = VideoUNet(channels, condition, **model.network_options(), **entry)
    network.set_attention_backend(model.attention_backend)
    return Denoiser(network, config.diffusion, space_of(manifest), config.precision)


def load_start(config: TrainConfig, denoiser: Denoiser) -> dict[str, Any]:
    """Give the network of a run that begins the weights of the model `config.from_`.

    Returns:
        What determines that model's function; nothing without a model, or where a run goes on.

    Raises:
        BadInput: There is no such model, or its weights do not fit this run's network or latents.
    """
    if not config.from_ or newest_first(config.out / CHECKPOINTS):
        return {}
    given = Denoiser.load(Path(config.from_))
    theirs, ours = _structure(given.network), _structure(denoiser.network)
    if other := [name for name, value in theirs.items() if value != ours[name]]:
        told = ", ".join(f"{name} {theirs[name]!r} (here {ours[name]!r})" for name in other)
        raise BadInput(
            f"--from is {config.from_}, a network of {told}: give model.* and "
            "diffusion.mask_channel as that model has them, or another model"
        )
    refuse_another(
        *(denoiser.autoencoder, given.autoencoder, "the shards hold latents of"),
        *(f"--from is {config.from_}, trained on those of", "encode with the model's"),
    )
    denoiser.network.load_state_dict(given.network.state_dict())
    return given.fingerprint()


def _structure(network: VideoUNet) -> dict[str, Any]:
    """A network's options, as JSON has them."""
    options = {n: value for n, value in network.config.items() if not n.startswith("_")}
    return json.loads(json.dumps(options))


def note_start(
    state: TrainState, config: TrainConfig, start: Mapping[str, Any], denoiser: Denoiser
) -> str:
    """Record the model that the run begins with, as `load_start` gave it, and say so."""
    now = denoiser.describe()
    records = {
        **{f"diffusion.{n}": (was, now["diffusion"][n]) for n, was in start["diffusion"].items()},
        "latents.shape": (start["latents"]["shape"], now["latents"]["shape"]),
    }
    changed = {name: [was, is_] for name, (was, is_) in records.items() if was != is_}
    event = {"from": located(config).from_, "weights": start["weights"]}
    state.history = [{"step": 1, **event, "changed": changed}]
    given = [
        f"--{name} {json.dumps(was)}"
        for name, (was, _) in changed.items()
        if name.startswith("diffusion.")
    ]
    remedy = f"; {' '.join(given)} trains on as that model was trained" if given else ""
    return describe_event(state.history[0]) + remedy


def space_of(manifest: Manifest) -> LatentSpace:
    """The latents that a dataset holds."""
    return LatentSpace(
        list(manifest.latent_shape),
        list(manifest.latents_mean),
        list(manifest.latents_std),
        dict(manifest.autoencoder),
    )


def make_state(config: TrainConfig, accelerator: Accelerator, network: VideoUNet) -> TrainState:
    """The state before the first step, whole: moments of zero, averages that are the weights."""
    blank = copy.deepcopy(network).to_empty(device="meta").eval().requires_grad_(False)
    network.to(accelerator.device).train()
    if config.model.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    # DeepSpeed's engine turns off an autocast that is around it, so the network carries its own.
    network.forward = autocast(network.device, config.precision)(network.forward)  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=config.optimizer.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    if config.compile:
        # einops caches the shapes it meets. Without this call, it would fill its cache while the
        # first step is compiled, and the second step would be compiled again.
        with torch.no_grad():
            network(*_small_input(network))
    if config.zero_stage:
        engine, _ = accelerator.prepare(network, optimizer)
    else:
        engine = accelerator.prepare_model(network)
        if isinstance(engine, DistributedDataParallel):
            # DistributedDataParallel fixes how it divides the gradient in its first backward pass.
            # If that were the first step after each start of a run, a resumed run would add up the
            # processes' parts in another order.
            engine(*_small_input(network)).sum().backward()
            network.zero_grad()
    if config.compile:
        network.compile()
    _fill_optimizer(engine, optimizer, config.zero_stage, len(config.optimizer.ema_decays))
    return TrainState(
        step=0,
        skipped=0,
        scale=FIRST_SCALE if config.precision == "float16" else 1.0,
        scale_age=0,
        began=time.time(),
        productive=0.0,
        engine=engine,
        network=network,
        optimizer=optimizer,
        blank=blank,
        options={},
        history=[],
    )


def _small_input(network: VideoUNet) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of one small frame, a timestep and a condition, all zero."""
    sizes = (network.config["latent_channels"], network.config["condition_channels"])
    latents, condition = (torch.zeros(1, 1, size, 8, 8, device=network.device) for size in sizes)
    return latents, torch.zeros(1, device=network.device), condition


def _fill_optimizer(
    engine: Any, optimizer: torch.optim.AdamW, zero_stage: int, averages: int
) -> None:
    """Give the optimizer all its state, which AdamW and DeepSpeed create only when needed."""
    match zero_stage:
        case 0:
            tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        case 3:
            tensors = engine.optimizer.fp32_partitioned_groups_flat
        case _:
            tensors = engine.optimizer.single_partition_of_fp32_groups
    for tensor in tensors:
        weights = tensor.detach()
        optimizer.state[tensor] = {
            "step": torch.zeros((), device=weights.device),
            "exp_avg": torch.zeros_like(weights),
            "exp_avg_sq": torch.zeros_like(weights),
        } | {f"average_{n}": weights.clone() for n in range(averages)}
    if zero_stage in (1, 2):
        # Connects each parameter with its part of these tensors.
        engine.optimizer._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def update_averages(state: TrainState, decays: Sequence[float]) -> None:
    """Move the averages towards the weights of the update just made.

    After n updates the decay is at most (1 + n) / (10 + n), so that the first weights are soon
    forgotten.
    """
    most = (1 + state.updates) / (10 + state.updates)
    weights = list(state.optimizer.state)
    for number, decay in enumerate(decays):
        averages = [values[f"average_{number}"] for values in state.optimizer.state.values()]
        torch._foreach_lerp_(averages, weights, 1 - min(decay, most))


def kinds(state: TrainState) -> tuple[str, ...]:
    """The tensors of each parameter: "weights", "exp_avg", "exp_avg_sq", "average_0", …"""
    values = next(iter(state.optimizer.state.values()))
    return ("weights", *(kind for kind in values if kind != "step"))


@torch.no_grad()
def read_full(state: TrainState, parameter: torch.nn.Parameter, kind: str) -> Tensor:
    """A parameter's whole float32 tensor of a kind, on its device.

    It may be the state's own memory, which the next step changes. Under ZeRO this is a collective:
    every process must call it, in the same order.
    """
    partitioned = hasattr(parameter, "ds_id")
    if kind == "weights" and not partitioned:
        return parameter.detach()
    if not is_under_zero(state.engine):
        return state.optimizer.state[parameter][kind]
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if kind == "weights":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


@torch.no_grad()
def write_full(state: TrainState, parameter: torch.nn.Parameter, kind: str, value: Tensor) -> None:
    """The inverse of `read_full`; every process is given the whole tensor."""
    if hasattr(parameter, "ds_id"):
        _write_partition(parameter, kind, value)
        return
    if kind == "weights":
        parameter.copy_(value)
    if is_under_zero(state.engine):  # stages 1 and 2: a part of everything in float32
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind == "weights":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)
    elif kind != "weights":
        state.optimizer.state[parameter][kind].copy_(value)


def is_under_zero(engine: Any) -> bool:
    """Whether DeepSpeed trains the network; found out without importing it."""
    return hasattr(engine, "zero_optimization_stage")


def _write_partition(parameter: Any, kind: str, value: Tensor) -> None:
    """ZeRO-3: equal parts of the flattened tensor, the last one padded."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state
    from torch import distributed

    size = parameter.ds_tensor.numel()
    first = distributed.get_rank() * size
    part = torch.zeros(size, device=parameter.device)
    held = value.flatten()[first : first + size]
    part[: len(held)] = held
    if kind == "weights":
        safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.copy_(part)
        if parameter.numel():  # a small one, which every process also has whole
            parameter.copy_(value)
    else:
        safe_set_local_optimizer_state(parameter, part, kind)


@torch.no_grad()
def averaged_network(state: TrainState, which: int = 0) -> VideoUNet:
    """A copy of the network in eval mode that holds an average; under ZeRO a collective."""
    network = copy.deepcopy(state.blank).to_empty(device=state.network.device)
    for parameter, average in zip(state.network.parameters(), network.parameters(), strict=True):
        average.copy_(read_full(state, parameter, f"average_{which}"))
    return network
