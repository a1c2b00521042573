"""The run's checkpoints: one format, by parameter name, for any number of processes and ZeRO stage.

The first process gathers the state into its memory, which is all that the loop waits for. One of
its threads writes that aside, flushed and hashed, while training goes on. `modeling/run_folder.py`
describes the files.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import BadInput, BadInputEverywhere, describe
from ..files import PARTIAL, aside, write_atomically
from ..modeling.denoiser import Denoiser
from ..modeling.run_folder import (
    CHECKPOINTS,
    LATEST,
    MODEL,
    Damaged,
    name_of,
    newest_first,
    newest_whole,
    read_state,
    seal,
)
from ..modeling.unet import VideoUNet
from .state import TrainState, kinds, read_full, write_full

_AVERAGE = "average_"  # begins the kinds that are written as models


def folder_of_average(which: int) -> str:
    """The folder of a checkpoint that holds average number `which` as a model."""
    return f"average-{which}" if which else MODEL


class Checkpoints:
    """The checkpoints of one run, of which `keep` are kept; every process has one.

    `denoiser` describes the latents and the process.
    """

    def __init__(
        self,
        out: Path,
        keep: int,
        ema_decays: Sequence[float],
        denoiser: Denoiser,
        accelerator: Accelerator,
    ) -> None:
        self._folder = out / CHECKPOINTS
        self._keep = keep
        self._decays = list(ema_decays)
        self._denoiser = denoiser
        self._accelerator = accelerator
        # The last snapshot, by kind and parameter; the next one takes its place.
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._models: dict[str, Denoiser] = {}  # around the snapshot's averages
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None

    def load(self, state: TrainState) -> None:
        """Continue from the newest checkpoint that is whole, if there is one.

        Every process calls this; the first one chooses. A damaged checkpoint is named on stderr and
        the one before it is used.

        Raises:
            BadInputEverywhere: All checkpoints are damaged, or the chosen one is of other latents,
                or a process cannot see it.
        """
        choice: list[Any] = [self._choose() if self._accelerator.is_main_process else None]
        broadcast_object_list(choice)
        name, facts, refusal = choice[0]
        if refusal:
            raise BadInputEverywhere(refusal)
        if not name:
            return
        with contextlib.ExitStack() as opened:
            sources = self._open(self._folder / name, facts, kinds(state), opened)
            for name, parameter in state.network.named_parameters():
                for kind, files in sources.items():
                    write_full(state, parameter, kind, files[name].get_tensor(name))
        state.set_counters(facts["counters"])
        # Version 0.1 recorded neither.
        state.options, state.history = facts.get("options", {}), facts.get("history", [])

    def _choose(self) -> tuple[str, dict[str, Any], str]:
        """The checkpoint to continue from, its state.json, and why none can be used."""
        try:
            _remove_leftovers(self._folder)
            if not newest_first(self._folder):
                return "", {}, ""
            path, facts = newest_whole(self._folder)
        except (BadInput, OSError) as error:  # the others are waiting for the outcome
            return "", {}, describe(error)
        if facts["latents"] != dataclasses.asdict(self._denoiser.space):
            refusal = (
                f"{path} was trained on other latents (shape, scale or autoencoder) than these "
                "shards hold: name the shards that it was begun with, or another out"
            )
            return "", {}, refusal
        return path.name, facts, ""

    def _open(
        self,
        path: Path,
        facts: dict[str, Any],
        wanted: tuple[str, ...],
        opened: contextlib.ExitStack,
    ) -> dict[str, dict[str, Any]]:
        """The open file of each kind and parameter, once every process has opened all of them."""
        sources: dict[str, dict[str, Any]] = {}
        try:
            sees = read_state(path) == facts
            for kind in wanted:
                files = [opened.enter_context(safe_open(file, "pt")) for file in _files(path, kind)]
                sources[kind] = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        except (Damaged, OSError, SafetensorError):
            sees = False
        answer = torch.tensor([int(sees)], device=self._accelerator.device)
        answers = self._accelerator.gather(answer).tolist()
        if not all(answers):
            blind = ", ".join(str(rank) for rank, answer in enumerate(answers) if not answer)
            raise BadInputEverywhere(
                f"process {blind} does not see {path} as process 0 does: "
                "give an out that all nodes share"
            )
        return sources

    def save(
        self, state: TrainState, written: Callable[[int, float], object] = lambda *_: None
    ) -> float:
        """Take a snapshot and begin to write it; return the seconds that this took.

        Every process calls this. It waits for the last write to end. `written` is called in the
        writing thread once the checkpoint is whole, with its step and the seconds since the
        snapshot was begun.
        """
        began = time.perf_counter()
        broken = self._end_of_last_write()
        since = time.perf_counter()
        self._snapshot(state)
        if not self._models:
            self._wrap_averages(state.blank)
        if self._accelerator.is_main_process and not broken:
            facts = {
                "counters": state.counters(),
                "latents": dataclasses.asdict(self._denoiser.space),
                "ema_decays": self._decays,
                "options": state.options,
                "history": state.history,
            }
            self._writing = self._thread.submit(self._write, facts, since, written)
        return time.perf_counter() - began

    def failure(self) -> Exception | None:
        """Why the last write failed; None on the other processes, and before its end."""
        if self._writing is None or not self._writing.done():
            return None
        return self._end_of_last_write()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            BadInput: On the first process, if it could not be written.
        """
        if failure := self._end_of_last_write():
            raise failure

    def close(self) -> None:
        """End the thread, after its last write."""
        self._thread.shutdown()

    def _end_of_last_write(self) -> Exception | None:
        """Wait for the last write; its failure, if it failed."""
        failure = self._writing.exception() if self._writing else None
        assert failure is None or isinstance(failure, Exception)
        return failure

    @torch.no_grad()
    def _snapshot(self, state: TrainState) -> None:
        """Copy the state into the first process's memory; the others drop each tensor at once."""
        for name, parameter in state.network.named_parameters():
            for kind in kinds(state):
                full = read_full(state, parameter, kind)
                if not self._accelerator.is_main_process:
                    continue
                of_kind = self._memory.setdefault(kind, {})
                if name not in of_kind:  # once, for pinned memory is slow to allocate
                    of_kind[name] = torch.empty(full.shape, pin_memory=full.is_cuda)
                of_kind[name].copy_(full, non_blocking=True)
        if self._accelerator.device.type == "cuda":
            torch.cuda.synchronize(self._accelerator.device)

    def _wrap_averages(self, blank: VideoUNet) -> None:
        """Make the models that are saved: once, and outside the writing thread.

        diffusers' `from_pretrained`, which another thread may call, replaces torch's own methods
        while it works.
        """
        for kind, tensors in self._memory.items():
            if kind.startswith(_AVERAGE):
                network = copy.deepcopy(blank)
                network.load_state_dict(tensors, assign=True)
                self._models[kind] = self._denoiser.with_network(network)

    def _write(
        self, facts: dict[str, Any], since: float, written: Callable[[int, float], object]
    ) -> None:
        step = facts["counters"]["step"]
        try:
            self._write_aside(self._folder / name_of(step), facts)
        except (OSError, SafetensorError) as error:
            raise BadInput(
                f"the checkpoint of step {step} cannot be written into {self._folder} "
                f"({describe(error)}): remove the cause, and the same command continues from "
                "the one before"
            ) from error
        written(step, time.perf_counter() - since)

    def _write_aside(self, path: Path, facts: dict[str, Any]) -> None:
        with aside(path) as partial:
            partial.mkdir()
            for kind, tensors in self._memory.items():
                if kind in self._models:
                    self._models[kind].save(partial / _place(kind))
                else:
                    save_file(tensors, partial / _place(kind))
            seal(partial, facts)
            if path.exists():  # a damaged one, which the run did not continue from
                _remove(path)
        write_atomically(self._folder / LATEST, path.name.encode())
        found = newest_first(self._folder)
        # Newer ones are damaged: the run did not continue from them.
        kept = found[found.index(path) :][: self._keep]
        for old in set(found) - set(kept):
            _remove(old)
        _remove_leftovers(self._folder)


def _place(kind: str) -> str:
    """The path of a kind in a checkpoint: a model's folder for an average, else one file."""
    if kind.startswith(_AVERAGE):
        return folder_of_average(int(kind.removeprefix(_AVERAGE)))
    return f"{kind}.safetensors"


def _files(path: Path, kind: str) -> list[Path]:
    """The files of a kind; a large model has several."""
    place = path / _place(kind)
    return sorted((place / "unet").glob("*.safetensors")) if place.is_dir() else [place]


def _remove(path: Path) -> None:
    """Remove a checkpoint in one move: readers see it whole or not at all."""
    path.rename(path.with_name(f"{PARTIAL}old-{path.name}"))


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left unfinished, and what `_remove` has put aside.

    A network file system may keep a file that a reader has open; the next call removes it.
    """
    for path in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
