"""Checkpoints: one format, by parameter name, for any number of processes and either ZeRO stage.

checkpoints/latest                     the newest checkpoint's name, written last
checkpoints/step-00001000/model/       the averaged weights, as `Denoiser.load` reads them
checkpoints/step-00001000/weights.safetensors
checkpoints/step-00001000/moments.safetensors
checkpoints/step-00001000/state.json   the step, and each file's hash
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import jobs
from ..modeling.diffusion import Denoiser
from .state import TrainState

MOMENTS = ("exp_avg", "exp_avg_sq")


class Damaged(Exception):
    """A checkpoint whose files are not what was written."""


def save_checkpoint(
    folder: Path, state: TrainState, denoiser: Denoiser, accelerator: Accelerator, keep: int
) -> None:
    """Write the state; every process calls this, the first one writes."""
    weights, moments = _gather(state, accelerator)
    if accelerator.is_main_process:
        path = folder / f"step-{state.step:08}"
        with jobs.aside(path) as partial:
            _write(partial, weights, moments, state, denoiser)
            if path.exists():  # a damaged one, which the run did not continue from
                shutil.rmtree(path)
        jobs.write_atomically(folder / "latest", path.name.encode())
        for old in _newest_first(folder)[keep:]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _write(
    path: Path,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    state: TrainState,
    denoiser: Denoiser,
) -> None:
    path.mkdir()
    save_file(weights, path / "weights.safetensors")
    save_file(moments, path / "moments.safetensors")
    denoiser.with_network(state.average).save(path / "model")
    written = sorted(file for file in path.rglob("*") if file.is_file())
    described = {
        "step": state.step,
        "files": {str(file.relative_to(path)): jobs.hash_file(file) for file in written},
        "latents": dataclasses.asdict(denoiser.space),
    }
    (path / "state.json").write_text(json.dumps(described, indent=2))


def load_checkpoint(
    folder: Path, state: TrainState, denoiser: Denoiser, accelerator: Accelerator
) -> None:
    """Continue from the newest checkpoint that is whole, where there is one.

    A damaged one is named on stderr and the one before it is used.

    Raises:
        BadInput: There are checkpoints, but all of them are damaged, or they are of other shards.
    """
    candidates = _newest_first(folder) if folder.is_dir() else []
    for path in candidates:
        try:
            step, latents = _verify(path)
        except Damaged as damage:
            if accelerator.is_main_process:
                print(f"vidfill train: {damage}; trying the one before", file=sys.stderr)
            continue
        if latents != dataclasses.asdict(denoiser.space):
            raise jobs.BadInputEverywhere(
                f"{path} was trained on other latents (shape, scale or autoencoder) than these "
                "shards hold: name the shards that it was begun with, or another out"
            )
        _restore(path, step, state, accelerator)
        return
    if candidates:
        raise jobs.BadInputEverywhere(
            f"every checkpoint in {folder} is damaged: remove it to start again"
        )


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _verify(path: Path) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint that is whole, and the latents that it was trained on."""
    try:
        described = json.loads((path / "state.json").read_text())
        for name, digest in described["files"].items():
            if jobs.hash_file(path / name) != digest:
                raise Damaged(f"{path / name} is damaged: its hash differs from state.json's")
        return described["step"], described["latents"]
    except (OSError, ValueError, KeyError) as error:
        raise Damaged(f"{path} is damaged: {error}") from error


def _parameters(
    state: TrainState, accelerator: Accelerator
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return accelerator.unwrap_model(state.network).named_parameters()


def _gather(
    state: TrainState, accelerator: Accelerator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in _parameters(state, accelerator):
        weights[name] = parameter.detach().float().cpu().contiguous()
        for moment in MOMENTS:
            moments[f"{moment}.{name}"] = _moment(parameter, moment, state, accelerator)
    return weights, moments


def _moment(
    parameter: torch.nn.Parameter, moment: str, state: TrainState, accelerator: Accelerator
) -> Tensor:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_optimizer_state

        full = safe_get_full_optimizer_state(parameter, moment)
    else:
        full = state.optimizer.state[parameter][moment]
    return full.detach().float().cpu().contiguous()


def _restore(path: Path, step: int, state: TrainState, accelerator: Accelerator) -> None:
    weights = load_file(path / "weights.safetensors")
    moments = load_file(path / "moments.safetensors")
    under_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if under_deepspeed:
        _make_deepspeed_moments(state, step)
    for name, parameter in _parameters(state, accelerator):
        values = {moment: moments[f"{moment}.{name}"] for moment in MOMENTS}
        restore = _restore_deepspeed if under_deepspeed else _restore_plain
        restore(parameter, weights[name], values, step, state)
    averages = load_file(path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    state.average.load_state_dict(averages)
    state.step = step


@torch.no_grad()
def _restore_plain(
    parameter: torch.nn.Parameter,
    weights: Tensor,
    moments: dict[str, Tensor],
    step: int,
    state: TrainState,
) -> None:
    parameter.copy_(weights)
    device = {name: value.to(parameter.device) for name, value in moments.items()}
    state.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **device}


def _restore_deepspeed(
    parameter: torch.nn.Parameter,
    weights: Tensor,
    moments: dict[str, Tensor],
    step: int,
    state: TrainState,
) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    with torch.no_grad():
        parameter.copy_(weights)
    safe_set_full_fp32_param(parameter, weights)
    for name, value in moments.items():
        safe_set_full_optimizer_state(parameter, value, name)


def _make_deepspeed_moments(state: TrainState, step: int) -> None:
    """Give the partitioned optimizer its moments, which DeepSpeed makes only at the first step."""
    zero = state.network.optimizer
    for group in zero.optimizer.param_groups:
        for partition in group["params"]:
            moments = {name: torch.zeros_like(partition) for name in MOMENTS}
            zero.optimizer.state[partition] = {"step": torch.tensor(float(step)), **moments}
    zero._lazy_init_hp_params_optimizer_state()
