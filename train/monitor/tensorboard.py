"""What a person sees of a run: TensorBoard's scalars, its first page, pictures, the console."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import operator
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams, text

from ...data.shards.stream import SkippedExample, Stream
from ...files import locate
from ...modeling.cost import cost_of
from ...modeling.denoiser import Denoiser
from ...modeling.unet import VideoUNet
from ..config import TrainConfig
from ..state import TrainState
from ..step import StepResult
from .previews import Preview, film_of, picture_of, png_of
from .profiling import Profile, profiled_steps
from .rates import peak_rate

# What there is, and what TensorBoard's page "Text" says of it.
SCALARS = {
    "train/loss": "The training loss: the mean over the steps since the last value.",
    "train/learning_rate": "Of the last step.",
    "train/gradient_norm": "Over all processes, before clipping: the mean since the last value.",
    "train/gradient_norm_largest": "The largest since the last value.",
    "train/weight_norm": "Of all weights together.",
    "train/skipped_steps": "Steps left out because they were not finite, in all.",
    "train/damaged_examples": "Examples left out because they were damaged, since this start.",
    "train/epochs": "How often each training clip was seen.",
    "train/loss_scale": "What the loss is multiplied by in float16.",
    "held_out/loss": "Mean squared error of the averaged network on validation clips, at noise "
    "and timesteps that never change; without the training loss's weights.",
    "held_out/loss_hole": "The same, of latents inside the hole.",
    "held_out/loss_visible": "The same, of latents outside the hole.",
    "held_out/loss_quantile_1": "The same, at the least noisy timesteps; the last is the noisiest.",
    "speed/clips_per_second": "Of all processes, over the steps alone.",
    "speed/clips_per_second_per_device": "Of one process.",
    "speed/seconds_per_step": "With the wait for data; without checkpoints and evaluations.",
    "speed/share_of_peak": "MFU: operations that the network needs, forward and backward, over "
    "those that the device could do in that time; recomputed ones are not counted.",
    "speed/slowest_process": "The rank whose own time was longest: its wait for data and its "
    "forward passes, in which it does not wait for others (under ZeRO-3 it does, for weights).",
    "speed/slowest_over_mean": "That process's own time over the mean of all; 1 is balanced.",
    "time/data_wait": "Share of the steps' time that the process that waited longest waited for "
    "data.",
    "time/goodput": "Share of the time since the run's first start that went into steps that "
    "count.",
    "time/lost_to_restarts": "Share of the time since the run's first start that passed before "
    "this start and went into no step that counts: waiting to be started again, starting, steps "
    "done twice, and the pauses of earlier starts.",
    "time/checkpoint_seconds": "That the steps waited for a checkpoint.",
    "time/checkpoint_written_seconds": "From the beginning of a checkpoint until it was whole on "
    "disk, while the steps went on.",
    "time/evaluation_seconds": "That the steps waited for the held-out loss.",
    "time/preview_seconds": "That the steps waited for the samples.",
    "memory/gigabytes": "Largest so far of any process: allocated on its GPU, or resident.",
}

IMAGES = {
    "samples/frames": "For each validation clip the frames masked, filled and true, from the top.",
    "samples/film": "For each validation clip the frames masked, filled and true, from the left.",
}

# TensorBoard's page "Custom Scalars": each chart, and the tags in it as regular expressions.
LAYOUT = {
    "The four that matter": {
        "Loss: training and held out": ["Multiline", ["^train/loss$", "^held_out/loss$"]],
        "Speed: clips per second": ["Multiline", ["^speed/clips_per_second$"]],
        "Time: share in steps, share waiting for data": [
            "Multiline",
            ["^time/goodput$", "^time/data_wait$"],
        ],
        "Gradient norm: mean and largest": ["Multiline", ["^train/gradient_norm"]],
    },
    "Held-out loss": {
        "Inside and outside the hole": ["Multiline", ["^held_out/loss_(hole|visible)$"]],
        "By timestep, 1 the least noisy": ["Multiline", ["^held_out/loss_quantile_"]],
    },
    "Machine": {
        "Share of the peak rate (MFU)": ["Multiline", ["^speed/share_of_peak$"]],
        "Slowest process over the mean": ["Multiline", ["^speed/slowest_over_mean$"]],
        "Memory, GB": ["Multiline", ["^memory/"]],
        "Seconds that pauses took, and checkpoints": ["Multiline", ["^time/.*_seconds$"]],
    },
}

# By what runs are compared, on the page "HParams".
COMPARED = (
    "batch_size",
    "seed",
    "precision",
    "zero_stage",
    "model.preset",
    "model.conditioning",
    "optimizer.learning_rate",
    "optimizer.warmup",
    "optimizer.decay",
    "optimizer.weight_decay",
    "diffusion.process",
    "diffusion.target",
    "diffusion.mask_channel",
    "loss.weighting",
    "loss.hole",
    "loss.timesteps",
)

FORWARDS = 64  # the last forward passes, whose times are kept


class SkipLog:
    """Lists the damaged examples that a process left out, as the stream comes upon them."""

    def __init__(self, out: Path, process: int) -> None:
        self._path = out / f"skipped-{process:05}.jsonl"
        self._listed = 0

    def write(self, skipped: Sequence[SkippedExample]) -> None:
        """Append those of `skipped` that were not listed yet; say it once an example."""
        fresh = skipped[self._listed :]
        if not fresh:
            return
        with self._path.open("a") as file:
            for example in fresh:
                file.write(json.dumps(example._asdict()) + "\n")
        self._listed += len(fresh)
        print(
            f"vidfill train: {self._listed} damaged example(s) left out, the last is "
            f"{fresh[-1].key}: {fresh[-1].reason}; all are listed in {self._path}",
            file=sys.stderr,
        )


class Forwards:
    """Times the last forward passes of a network, in which its process waits for no other.

    On a GPU by events, which are read when a later step has long passed them.
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

    def seconds(self) -> float:
        """Mean time of those that have ended."""
        if self._on_gpu:
            times = [a.elapsed_time(b) / 1000 for a, b in self._marks if b.query()]
        else:
            times = [b - a for a, b in self._marks]
        return statistics.fmean(times) if times else 0.0

    def close(self) -> None:
        """Time no more."""
        for hook in self._hooks:
            hook.remove()


class Share(NamedTuple):
    """What a process tells the others when values are logged."""

    loss: float  # its part of the mean over the window; NaN where no step counted
    squares: float  # sum of its weights' squares
    waited: float  # seconds for data
    own: float  # seconds a step in which it waited for no other process
    memory: float  # bytes
    damaged: float  # examples


@dataclasses.dataclass
class Window:
    """The steps since values were last logged."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # of them, for data
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

    Only the first process writes. The processes tell one another what they measured when values
    are logged, every `log_every` steps, by one gather; other steps synchronise nothing. Each call
    takes the time since the last one as its own: so `step` follows a step at once, and
    `evaluation`, `preview` and `checkpoint` what they are named after.

    Args:
        config: The run's.
        state: Where the run begins or continues: later events of an earlier life are dropped.
        denoiser: Its network says what a step computes.
        stream: Says how long it was waited for, and what it left out.
        preview: What to show of the model, on the first process, or nothing.
        accelerator: The run's.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        denoiser: Denoiser,
        stream: Stream,
        preview: Preview | None,
        accelerator: Accelerator,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._accelerator, self._clock = config, accelerator, clock
        self._stream, self._preview = stream, preview
        self._skips = SkipLog(config.out, accelerator.process_index)
        alone = accelerator.num_processes == 1
        self._forwards = None if alone else Forwards(state.engine, accelerator.device)
        self._writer: FileWriter | None = None
        self._profile: Profile | None = None
        if accelerator.is_main_process:
            self._writer = _open_writer(config, state)
            self._profile = Profile(profiled_steps(config.profile), config.out / "profile")
            self._peak = peak_rate(accelerator.device, config.precision)
            frames, _, height, width = denoiser.space.shape
            options = denoiser.network.config
            cost = cost_of(lambda: VideoUNet.from_config(options), frames, height, width)
            self._operations = cost.training_operations  # a clip
        self._note = ""
        self._step = state.step
        self._lost = clock() - state.began - state.productive
        self._window = Window()
        self._waited = stream.waited
        self._last = clock()

    def __enter__(self) -> Monitor:
        if self._profile:
            self._profile.step(self._step)
        self._last = self._clock()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._forwards:
            self._forwards.close()
        if self._profile:
            self._profile.end(self._step)
        if self._writer:
            self._writer.close()

    def step(self, state: TrainState, result: StepResult) -> str:
        """Count a finished step, and log where it is due; all processes call this alike.

        The step's time, without its wait for data, is added to `state.productive`.

        Returns:
            The console's note, of the values that were last logged.
        """
        self._step = state.step
        seconds, waited = self._lap(), self._stream.waited - self._waited
        state.productive += seconds - waited
        self._waited += waited
        self._window.add(result, seconds, waited)
        self._skips.write(self._stream.skipped)
        if self._profile:
            self._profile.step(state.step)
            self._lap()  # a trace that was written is no part of the next step
        if state.step % self._config.log_every == 0 or state.step == self._config.steps:
            self._log(state, result)
            self._window = Window()
        return self._note

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Log held-out losses, as HeldOut.measure gave them, and the time that they took."""
        named = {f"held_out/{name}": value for name, value in figures.items()}
        self._write(step, named | {"time/evaluation_seconds": self._lap()})

    def preview(self, step: int, denoiser: Denoiser) -> None:
        """Let the first process show masked, filled and true frames of some validation clips.

        The others wait for it in their next step.
        """
        if self._writer and self._preview:
            clips = self._preview.draw(denoiser)
            for tag, image in {
                "samples/frames": png_of(picture_of(clips)),
                "samples/film": film_of(clips),
            }.items():
                self._writer.add_summary(_show(tag, image), step)
        self._write(step, {"time/preview_seconds": self._lap()})

    def checkpoint(self, step: int, seconds: float) -> None:
        """Log how long the steps waited for a checkpoint."""
        self._lap()
        self._write(step, {"time/checkpoint_seconds": seconds})

    def written(self, step: int, seconds: float) -> None:
        """Log how long a checkpoint took to be on disk; any thread may call this."""
        self._write(step, {"time/checkpoint_written_seconds": seconds})

    def _lap(self) -> float:
        """Seconds since the last lap."""
        before, self._last = self._last, self._clock()
        return self._last - before

    def _log(self, state: TrainState, result: StepResult) -> None:
        """Gather what the processes measured, and write the scalars."""
        share = torch.tensor(self._share(state), dtype=torch.float64)
        everyone = self._accelerator.gather(share[None].to(self._accelerator.device))
        shares = [Share(*row) for row in everyone.tolist()]
        if not self._writer:
            return
        window, config = self._window, self._config
        waited = max(share.waited for share in shares) / window.seconds
        speed = window.steps * config.batch_size / window.seconds
        values = _learning(state, result, window, shares, config)
        values |= {
            "train/epochs": state.step * config.batch_size / len(self._stream.dataset),
            **_speed(speed, window, shares),
            "speed/share_of_peak": self._operations * speed / len(shares) / self._peak,
            "time/data_wait": waited,
            **self._goodput(state),
            "memory/gigabytes": max(share.memory for share in shares) / 1e9,
        }
        self._write(state.step, values)
        loss = values.get("train/loss", math.nan)
        wait = f", {waited:.0%} waiting for data" if waited > 0.01 else ""
        self._note = f"loss {loss:.4f}, {speed:.1f} clips/s{wait}"

    def _share(self, state: TrainState) -> Share:
        window = self._window
        forward = self._forwards.seconds() if self._forwards else 0.0
        losses = torch.stack(window.losses).double().mean() if window.losses else math.nan
        return Share(
            loss=float(losses),
            squares=_sum_of_squares(state),
            waited=window.waited,
            own=window.waited / window.steps + forward * self._config.gradient_accumulation,
            memory=_memory(self._accelerator.device),
            damaged=len(self._stream.skipped),
        )

    def _goodput(self, state: TrainState) -> dict[str, float]:
        since_first = max(self._clock() - state.began, 1e-9)
        return {
            "time/goodput": state.productive / since_first,
            "time/lost_to_restarts": max(0.0, self._lost) / since_first,
        }

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars, on the first process."""
        if not self._writer:
            return
        summary = Summary()
        for tag, value in values.items():
            summary.value.add(tag=tag, simple_value=value)
        self._writer.add_summary(summary, step)


def _open_writer(config: TrainConfig, state: TrainState) -> FileWriter:
    """TensorBoard's events, with the run's configuration and the layout of its first page."""
    writer = FileWriter(str(config.out / "tensorboard"))
    # From here on what an earlier life wrote of later steps is no longer shown.
    writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), state.step + 1)
    located = dataclasses.replace(config, shards=locate(config.shards))
    record = json.loads(json.dumps(dataclasses.asdict(located), default=str))
    lines = yaml.safe_dump(record, sort_keys=False).splitlines()
    indented = "\n".join(f"    {line}" for line in lines)
    for name, said in {"configuration": indented, "explanation": _explain()}.items():
        writer.add_summary(text(name, said), state.step)
    writer.add_summary(custom_scalars(LAYOUT))
    compared = {name: operator.attrgetter(name)(config) for name in COMPARED}
    experiment, session, _ = hparams(compared, {"held_out/loss": None, "train/loss": None})
    writer.add_summary(experiment)
    writer.add_summary(session)
    return writer


def _explain() -> str:
    """What the values and pictures are, as a Markdown table."""
    rows = [f"| {tag} | {meaning} |" for tag, meaning in (SCALARS | IMAGES).items()]
    return "\n".join(["| tag | what it is |", "| --- | --- |", *rows])


def _show(tag: str, encoded: bytes) -> Summary:
    width, height = Image.open(io.BytesIO(encoded)).size
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=encoded)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def _learning(
    state: TrainState,
    result: StepResult,
    window: Window,
    shares: Sequence[Share],
    config: TrainConfig,
) -> dict[str, float]:
    values = {
        "train/learning_rate": result.learning_rate,
        "train/skipped_steps": float(state.skipped),
        "train/damaged_examples": math.fsum(share.damaged for share in shares),
    }
    if window.norms:
        values["train/loss"] = statistics.fmean(share.loss for share in shares)
        values["train/gradient_norm"] = statistics.fmean(window.norms)
        values["train/gradient_norm_largest"] = max(window.norms)
    # Under ZeRO each process has a part of the weights, else all of them.
    squares = [share.squares for share in shares[: None if config.zero_stage else 1]]
    values["train/weight_norm"] = math.sqrt(math.fsum(squares))
    if config.precision == "float16":
        values["train/loss_scale"] = state.scale
    return values


def _speed(speed: float, window: Window, shares: Sequence[Share]) -> dict[str, float]:
    own = [share.own for share in shares]
    mean = statistics.fmean(own)
    return {
        "speed/clips_per_second": speed,
        "speed/clips_per_second_per_device": speed / len(shares),
        "speed/seconds_per_step": window.seconds / window.steps,
        "speed/slowest_process": float(own.index(max(own))),
        "speed/slowest_over_mean": max(own) / mean if mean else 1.0,
    }


@torch.no_grad()
def _sum_of_squares(state: TrainState) -> float:
    """Of the weights that this process's optimizer holds."""
    return float(torch.nn.utils.get_total_norm(state.optimizer.state).double() ** 2)


def _memory(device: torch.device) -> int:
    """Largest number of bytes so far: allocated on the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def tensorboard_command(out: Path) -> str:
    """What a person types to watch the run."""
    return f"tensorboard --logdir {out / 'tensorboard'}"
