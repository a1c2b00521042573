"""One process of the runs that test_processes.py compares; a launcher starts several of them.

    python worker.py FOLDER

FOLDER/runs.json lists the runs, which are made one after the other. Each leaves NAME.json (what
was measured) and NAME.safetensors (all of the state, whole) in FOLDER/out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from jaxtyping import install_import_hook

install_import_hook(["vidfill.modeling", "vidfill.train"], "beartype.beartype")

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from accelerate.utils import gather_object  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, distributed  # noqa: E402
from torch.profiler import profile  # noqa: E402
from vidfill import jobs  # noqa: E402
from vidfill.data.shards.reading import ShardedDataset  # noqa: E402
from vidfill.data.shards.stream import Batch, Stream  # noqa: E402
from vidfill.modeling.denoiser import Denoiser  # noqa: E402
from vidfill.train.config import TrainConfig  # noqa: E402
from vidfill.train.state import (  # noqa: E402
    TrainState,
    averaged_network,
    kinds,
    make_accelerator,
    make_denoiser,
    make_state,
    read_full,
    write_full,
)
from vidfill.train.step import NotFinite, StepResult, train_step  # noqa: E402


class InfiniteLoss(Denoiser):
    """Its loss is infinite, though the loss's gradient is finite."""

    def loss(self, prediction: Tensor, *others: Any) -> Tensor:
        """The loss and infinity."""
        return super().loss(prediction, *others) + math.inf


class InfiniteGradient(Denoiser):
    """Its loss is finite, though the loss's gradient is not."""

    def loss(self, prediction: Tensor, *others: Any) -> Tensor:
        """The loss and √0."""
        return super().loss(prediction, *others) + (0 * prediction).sum(dim=(1, 2, 3, 4)).sqrt()


POISONS = {"loss": InfiniteLoss, "gradient": InfiniteGradient}


class Run:
    """One of the runs.

    Args:
        wanted: Its "name" and "argv", the command line of `vidfill train`; where it has them also
            the run that it goes on "from", counters to "set", the "poison" of each step's batch on
            the last process, and the step whose collectives to "count".
        out: Where the results go.
    """

    def __init__(self, wanted: dict[str, Any], out: Path) -> None:
        self.wanted, self.out = wanted, out
        config = jobs.parse(TrainConfig, wanted["argv"], verb="train")
        config.out.mkdir(exist_ok=True)
        accelerator = make_accelerator(config)
        dataset = ShardedDataset(config.shards, "train", config.data.cache)
        self.denoiser = make_denoiser(config, dataset.manifest)
        self.state = make_state(config, accelerator, self.denoiser.network)
        process = accelerator.process_index, accelerator.num_processes
        self.is_last = process[0] == process[1] - 1
        self.stream = Stream(dataset, config.batch_size, config.seed, *process)
        if "from" in wanted:
            restore(self.state, out / wanted["from"])
        self.state.set_counters(self.state.counters() | wanted.get("set", {}))
        self.config, self.accelerator = config, accelerator
        self.said: dict[str, Any] = {"losses": [], "norms": [], "scales": [], "refusal": ""}
        # The averages again, in float64.
        weights = self.read("weights").double()
        self.exact = [weights.clone() for _ in config.optimizer.ema_decays]

    def read(self, kind: str) -> Tensor:
        """All of a kind, end to end."""
        parameters = self.state.network.parameters()
        return torch.cat([read_full(self.state, one, kind).flatten() for one in parameters])

    def run(self) -> None:
        """Take the steps, and save what they led to."""
        try:
            while self.state.step < self.config.steps:
                self.step()
        except NotFinite as error:
            self.said["refusal"] = str(error)
        updated = self.state.updates > 0 and "from" not in self.wanted
        for number, exact in enumerate(self.exact if updated else []):
            error = (self.read(f"average_{number}") - exact).abs().max()
            self.said[f"error_of_average_{number}"] = float(error)
        self.said["counters"] = self.state.counters()
        self.save()

    def step(self) -> None:
        """Take one step."""
        number = self.state.step
        batch, denoiser = self.poisoned(self.stream.batch(number))
        counts = number == self.wanted.get("count")
        with profile(record_shapes=True) if counts else contextlib.nullcontext() as profiled:
            result = train_step(self.state, batch, denoiser, self.accelerator, self.config)
        if profiled:
            self.said["exchanged"] = [
                [event.name, sum(map(math.prod, event.input_shapes))]
                for event in profiled.events() or []
                if event.name.startswith("gloo:")
            ]
        self.said["losses"].append(float(self.accelerator.reduce(result.loss, "mean")))
        self.said["norms"].append(result.gradient_norm)
        self.said["scales"].append(self.state.scale)
        self.average(result)

    def poisoned(self, batch: Batch) -> tuple[Batch, Denoiser]:
        """The batch and the denoiser of a step, and what is wrong with them on the last process."""
        poison = self.wanted.get("poison", {}).get(str(self.state.step))
        if not poison or not self.is_last:
            return batch, self.denoiser
        if poison == "latents":
            latents = batch.latents.clone()
            latents[0, 0, 0, 0, 0] = math.nan
            return dataclasses.replace(batch, latents=latents, _buffer=None), self.denoiser
        plain = self.denoiser
        return batch, POISONS[poison](plain.network, plain.config, plain.space, plain.precision)

    def average(self, result: StepResult) -> None:
        """Move the exact averages after an update; of n updates the decay is (1 + n)/(10 + n)."""
        if math.isfinite(result.gradient_norm):
            count = sum(map(math.isfinite, self.said["norms"]))
            weights = self.read("weights").double()
            for exact, decay in zip(self.exact, self.config.optimizer.ema_decays, strict=True):
                kept = min(decay, (1 + count) / (10 + count))
                exact.copy_(kept * exact + (1 - kept) * weights)

    def save(self) -> None:
        """Write what was measured, and all of the state; the second average as a network too."""
        tensors = {
            f"{kind}/{name}": read_full(self.state, parameter, kind).clone()
            for kind in kinds(self.state)
            for name, parameter in self.state.network.named_parameters()
        }
        network = averaged_network(self.state, 1).state_dict()
        tensors |= {f"network/{name}": value for name, value in network.items()}
        content = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
        self.said["digests"] = gather_object([hashlib.sha256(content).hexdigest()])
        if self.accelerator.is_main_process:
            path = self.out / self.wanted["name"]
            save_file(tensors, path.with_suffix(".safetensors"))
            path.with_suffix(".json").write_text(json.dumps(self.said))
        self.accelerator.wait_for_everyone()


def restore(state: TrainState, path: Path) -> None:
    """Continue from what `Run.save` wrote."""
    tensors = load_file(path.with_suffix(".safetensors"))
    for kind in kinds(state):
        for name, parameter in state.network.named_parameters():
            write_full(state, parameter, kind, tensors[f"{kind}/{name}"])
    state.set_counters(json.loads(path.with_suffix(".json").read_text())["counters"])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for one in json.loads((folder / "runs.json").read_text()):
        Run(one, folder / "out").run()
        # Accelerate keeps one state a process; the next run may want another.
        AcceleratorState._reset_state(True)
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    if distributed.is_initialized():
        distributed.destroy_process_group()
