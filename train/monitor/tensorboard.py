"""What a person sees of a run: TensorBoard's scalars, its first page, pictures, the console."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import operator
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams, text

from ... import jobs
from ...data.shards.stream import Stream
from ...errors import say
from ...modeling.cost import cost_of
from ...modeling.denoiser import Denoiser
from ...modeling.unet import VideoUNet
from ..config import TrainConfig
from ..state import TrainState, describe_event, located
from ..step import StepResult
from . import trackers
from .previews import PreviewClips, film_of, picture_of, png_of
from .profiling import Profile, profiled_steps
from .rates import peak_rate
from .tags import HPARAMS, IMAGES, LAYOUT, SCALARS

FORWARDS = 64  # the last forward passes, whose times are kept


class ForwardTimes:
    """Times the last forward passes of a network, in which its process waits for no other.

    On a GPU they are timed by events, which are read once the GPU has passed them.
    """

    def __init__(self, engine: torch.nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: deque[tuple[Any, Any]] = deque(maxlen=FORWARDS)
        self._begun: Any = None
        self._hooks = [
            engine.register_forward_pre_hook(self._begin),
            engine.register_forward_hook(self._end),
        ]

    def _begin(self, *_: object) -> None:
        self._begun = self._mark()

    def _end(self, *_: object) -> None:
        self._marks.append((self._begun, self._mark()))

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mean(self) -> float:
        """Mean seconds of the passes that have ended; 0 before the first has."""
        if self._on_gpu:
            times = [a.elapsed_time(b) / 1000 for a, b in self._marks if b.query()]
        else:
            times = [b - a for a, b in self._marks]
        return statistics.fmean(times) if times else 0.0

    def close(self) -> None:
        """Stop timing."""
        for hook in self._hooks:
            hook.remove()


@dataclasses.dataclass
class StepsSinceLog:
    """The steps since values were last logged."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # for data, of these seconds
    losses: list[Tensor] = dataclasses.field(default_factory=list)  # on the device
    norms: list[float] = dataclasses.field(default_factory=list)

    def add(self, result: StepResult, seconds: float, waited: float) -> None:
        """One more step; of one that was left out, only the time."""
        self.steps += 1
        self.seconds += seconds
        self.waited += waited
        if math.isfinite(result.gradient_norm):
            self.losses.append(result.loss)
            self.norms.append(result.gradient_norm)


class Monitor:
    """Writes a run's TensorBoard events and the console's note; every process has one.

    Only the first process writes. Every `log_every` steps the processes exchange what they
    measured, in one gather; the other steps synchronise nothing. Each call counts the time since
    the last one as its own: call `step` right after a step, and `evaluation`, `preview` and
    `checkpoint` right after what they are named for.

    Args:
        config: The run's.
        state: Where the run begins or continues: later events of an earlier start are hidden.
        denoiser: Its network determines what a step computes.
        stream: Knows how long it was waited for, and which examples it left out.
        preview: What to show of the model, if anything; None but on the first process.
        accelerator: The run's.
        clock: Seconds since any moment; they only ever grow.
        now: Seconds since 1970, by a clock that may be set.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        denoiser: Denoiser,
        stream: Stream,
        preview: PreviewClips | None,
        accelerator: Accelerator,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._accelerator, self._clock = config, accelerator, clock
        self._stream, self._preview = stream, preview
        alone = accelerator.num_processes == 1
        self._forwards = None if alone else ForwardTimes(state.engine, accelerator.device)
        self._writer: FileWriter | None = None
        self._profile: Profile | None = None
        if accelerator.is_main_process:
            if trackers.TENSORBOARD in trackers.names_in(config):
                self._writer = _open_writer(config, state)
            trackers.begin(config, accelerator, state.began)
            self._profile = Profile(profiled_steps(config.profile), config.out / "profile")
            self._peak = peak_rate(accelerator.device, config.precision)
            frames, _, height, width = denoiser.space.shape
            options = denoiser.network.config
            cost = cost_of(lambda: VideoUNet.from_config(options), frames, height, width)
            self._operations = cost.training_operations  # a clip
        self._note = ""
        self._step = state.step
        # Of earlier lives there is only what the clocks of their machines said.
        before = max(now() - state.began, state.productive)
        self._lost = before - state.productive
        self._began = clock() - before
        self._since_log = StepsSinceLog()
        self._waited = stream.waited
        self._damaged = 0  # examples that are listed
        self._last = clock()

    def __enter__(self) -> Monitor:
        if self._profile:
            self._profile.step(self._step)
        self._last = self._clock()
        return self

    def __exit__(self, *_: object) -> None:
        if self._forwards:
            self._forwards.close()
        if self._profile:
            self._profile.end(self._step)
        if self._writer:
            self._writer.close()

    def step(self, state: TrainState, result: StepResult) -> str:
        """Count a finished step, and log when it is due; every process calls this.

        The step's time, without its wait for data, is added to `state.productive`.

        Returns:
            The console's note, with the values that were logged last.
        """
        self._step = state.step
        seconds, waited = self._lap(), self._stream.waited - self._waited
        state.productive += seconds - waited
        self._waited += waited
        self._since_log.add(result, seconds, waited)
        self._list_damaged()
        if self._profile:
            self._profile.step(state.step)
            self._lap()  # writing a trace is not part of the next step
        if state.step % self._config.log_every == 0 or state.step == self._config.steps:
            self._log(state, result)
            self._since_log = StepsSinceLog()
        return self._note

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the held-out losses that HeldOut.measure returned, and the time that they took."""
        named = {f"held_out/{name}": value for name, value in figures.items()}
        self._write(step, named | {"time/evaluation_seconds": self._lap()})

    def preview(self, step: int, denoiser: Denoiser) -> None:
        """Let the first process show masked, filled and true frames of some validation clips.

        The others wait for it in their next step.
        """
        if self._writer and self._preview:
            clips = self._preview.draw(denoiser)
            frames = _image_summary("samples/frames", png_of(picture_of(clips)))
            self._writer.add_summary(frames, step)
            self._writer.add_summary(_image_summary("samples/film", film_of(clips)), step)
        self._write(step, {"time/preview_seconds": self._lap()})

    def checkpoint(self, step: int, seconds: float) -> None:
        """Log how long the steps waited for a checkpoint."""
        self._lap()
        self._write(step, {"time/checkpoint_seconds": seconds})

    def written(self, step: int, seconds: float) -> None:
        """Log how long a checkpoint took to be on disk; any thread may call this.

        To TensorBoard alone: other trackers take steps only in their order.
        """
        self._write_events(step, {"time/checkpoint_written_seconds": seconds})

    def _lap(self) -> float:
        """Seconds since the last lap."""
        before, self._last = self._last, self._clock()
        return self._last - before

    def _list_damaged(self) -> None:
        """Append the examples that the stream left out lately to this process's list."""
        fresh = self._stream.skipped[self._damaged :]
        if not fresh:
            return
        path = self._config.out / f"skipped-{self._accelerator.process_index:05}.jsonl"
        with path.open("a") as file:
            file.writelines(json.dumps(example._asdict()) + "\n" for example in fresh)
        self._damaged += len(fresh)
        say(
            f"vidfill train: {self._damaged} damaged example(s) left out, the last is "
            f"{fresh[-1].key}: {fresh[-1].reason}; all are listed in {path}"
        )

    def _log(self, state: TrainState, result: StepResult) -> None:
        """Gather what the processes measured, and write the scalars."""
        measured = self._measure(state)
        row = torch.tensor([*measured.values()], dtype=torch.float64)
        rows = self._accelerator.gather(row[None].to(self._accelerator.device))
        # What every process measured, by name.
        of_all = dict(zip(measured, rows.T.tolist(), strict=True))
        if not self._accelerator.is_main_process:
            return
        since, config, processes = self._since_log, self._config, len(rows)
        speed = since.steps * config.batch_size / since.seconds
        since_first = max(self._clock() - self._began, 1e-9)
        slowest, mean = max(of_all["own"]), statistics.fmean(of_all["own"])
        # Under ZeRO each process has a part of the weights, otherwise all of them.
        squares = of_all["squares"] if config.zero_stage else of_all["squares"][:1]
        values = {
            "train/learning_rate": result.learning_rate,
            "train/skipped_steps": float(state.skipped),
            "train/damaged_examples": math.fsum(of_all["damaged"]),
            "train/weight_norm": math.sqrt(math.fsum(squares)),
            "train/epochs": state.step * config.batch_size / len(self._stream.dataset),
            "speed/clips_per_second": speed,
            "speed/clips_per_second_per_device": speed / processes,
            "speed/seconds_per_step": since.seconds / since.steps,
            "speed/slowest_process": float(of_all["own"].index(slowest)),
            "speed/slowest_over_mean": slowest / mean if mean else 1.0,
            "speed/share_of_peak": self._operations * speed / processes / self._peak,
            "time/data_wait": max(of_all["waited"]) / since.seconds,
            "time/goodput": state.productive / since_first,
            "time/lost_to_restarts": self._lost / since_first,
            "memory/gigabytes": max(of_all["memory"]) / 1e9,
        }
        if config.precision == "float16":
            values["train/loss_scale"] = state.scale
        if since.norms:
            values["train/loss"] = statistics.fmean(of_all["loss"])
            values["train/gradient_norm"] = statistics.fmean(since.norms)
            values["train/gradient_norm_largest"] = max(since.norms)
        self._write(state.step, values)
        waited = values["time/data_wait"]
        wait = f", {waited:.0%} waiting for data" if waited > 0.01 else ""
        self._note = f"loss {values.get('train/loss', math.nan):.4f}, {speed:.1f} clips/s{wait}"

    def _measure(self, state: TrainState) -> dict[str, float]:
        """What only this process knows of the steps since values were last logged."""
        since, device = self._since_log, self._accelerator.device
        forward = self._forwards.mean() if self._forwards else 0.0
        loss = float(torch.stack(since.losses).double().mean()) if since.losses else math.nan
        with torch.no_grad():
            weights = torch.nn.utils.get_total_norm(state.optimizer.state).double()
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
        else:  # Linux counts in KiB
            memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "loss": loss,  # its part of the mean
            "squares": float(weights**2),  # the sum over the weights that its optimizer holds
            "waited": since.waited,  # seconds for data
            # Seconds a step in which it waited for no other process.
            "own": since.waited / since.steps + forward * self._config.gradient_accumulation,
            "memory": memory,
            "damaged": self._damaged,
        }

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars, on the first process."""
        if self._accelerator.is_main_process:
            self._accelerator.log(dict(values), step=step)
        self._write_events(step, values)

    def _write_events(self, step: int, values: Mapping[str, float]) -> None:
        if not self._writer:
            return
        summary = Summary()
        for tag, value in values.items():
            summary.value.add(tag=tag, simple_value=value)
        self._writer.add_summary(summary, step)


def _open_writer(config: TrainConfig, state: TrainState) -> FileWriter:
    """TensorBoard's events, with the run's configuration and the layout of its first page."""
    writer, step = FileWriter(str(config.out / "tensorboard")), state.step
    # What an earlier start of the run wrote about later steps is hidden from here on.
    writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step + 1)
    record = jobs.record_of(located(config))
    lines = yaml.safe_dump(record, sort_keys=False).splitlines()
    writer.add_summary(text("configuration", "\n".join(f"    {line}" for line in lines)), step)
    if history := "\n".join(f"- {describe_event(event)}" for event in state.history):
        writer.add_summary(text("history", history), step)
    rows = [f"| {tag} | {meaning} |" for tag, meaning in (SCALARS | IMAGES).items()]
    table = "\n".join(["| tag | what it is |", "| --- | --- |", *rows])
    writer.add_summary(text("explanation", table), step)
    writer.add_summary(custom_scalars(LAYOUT))
    compared = {name: operator.attrgetter(name)(config) for name in HPARAMS}
    experiment, session, _ = hparams(compared, {"held_out/loss": None, "train/loss": None})
    writer.add_summary(experiment)
    writer.add_summary(session)
    return writer


def _image_summary(tag: str, encoded: bytes) -> Summary:
    width, height = Image.open(io.BytesIO(encoded)).size
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=encoded)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def tensorboard_command(out: Path) -> str:
    """What a person types to watch the run."""
    return f"tensorboard --logdir {out / 'tensorboard'}"
