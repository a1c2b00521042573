"""What a person sees of a run: TensorBoard scalars and inpainted validation frames."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import UInt8
from torch.utils.tensorboard import SummaryWriter

from ..data.shards import Example, ShardedDataset, has_split
from ..data.stream import SkippedExample
from ..jobs import hide_secrets
from ..modeling.autoencoder import Autoencoder, load_autoencoder
from ..modeling.diffusion import Denoiser
from ..sampling.baselines import fill
from ..sampling.sampler import inpaint
from ..sampling.schedules import compile_schedule, parse
from .config import TrainConfig
from .step import StepResult

COLUMNS = 8  # frames of a clip that a preview shows


@dataclass(frozen=True)
class Preview:
    """What a look at the model needs: some held-out clips, their autoencoder, a schedule."""

    examples: Sequence[Example]
    autoencoder: Autoencoder
    schedule: str
    seed: int

    def draw(self, denoiser: Denoiser) -> UInt8[np.ndarray, "rows columns 3"]:
        """Masked, inpainted and true frames of each clip, as one picture."""
        results = inpaint(
            denoiser,
            self.autoencoder,
            self.examples,
            self.schedule,
            seed=self.seed,
            capacity=len(self.examples),
        )
        return np.concatenate([preview_rows(example, frames) for example, frames in results])


def open_preview(config: TrainConfig, denoiser: Denoiser) -> Preview | None:
    """Load what previews need; None, said on stderr, where the shards have nothing to show.

    Raises:
        BadInput: The schedule or the autoencoder cannot be used.
    """
    wanted = config.preview
    if not wanted.every or not wanted.clips:
        return None
    compile_schedule(parse(wanted.schedule), denoiser.timesteps)
    place = hide_secrets(config.shards)
    if not has_split(config.shards, "validation"):
        print(f"{place} has no validation split: no previews", file=sys.stderr)
        return None
    validation = ShardedDataset(config.shards, "validation", config.data.cache)
    examples = [validation[index] for index in range(min(wanted.clips, len(validation)))]
    if any(example.pixels is None for example in examples):
        print(f"{place}/validation keeps no pixels: no previews", file=sys.stderr)
        return None
    name = wanted.autoencoder or denoiser.autoencoder["name"]
    autoencoder = load_autoencoder(name, denoiser.network.device, denoiser.precision)
    return Preview(examples, autoencoder, wanted.schedule, config.seed)


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


class Monitor:
    """Writes a run's TensorBoard events; only the first process has one.

    Args:
        out: The run's folder.
        step: The step that the run continues from: later events of an earlier life are dropped.
        preview: What to show of the model, or nothing.
    """

    def __init__(self, out: Path, step: int, preview: Preview | None) -> None:
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self._preview = preview

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()

    def scalars(self, step: int, result: StepResult, clips_per_second: float) -> None:
        """Log one step's loss, learning rate, gradient norm and speed."""
        self._writer.add_scalar("train/loss", result.loss, step)
        self._writer.add_scalar("train/learning_rate", result.learning_rate, step)
        self._writer.add_scalar("train/gradient_norm", result.gradient_norm, step)
        self._writer.add_scalar("train/clips_per_second", clips_per_second, step)

    def preview(self, step: int, denoiser: Denoiser) -> None:
        """Log a grid: masked, inpainted and true frames of some validation clips."""
        if self._preview:
            picture = self._preview.draw(denoiser)
            self._writer.add_image("validation/inpainted", picture, step, dataformats="HWC")


def preview_rows(
    example: Example, result: UInt8[np.ndarray, "frames height width 3"]
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Three film strips under each other: masked, inpainted, truth."""
    assert example.pixels is not None
    rows = (fill(example), result, example.pixels)
    return np.concatenate([_strip(frames) for frames in rows])


def _strip(frames: UInt8[np.ndarray, "frames height width 3"]) -> np.ndarray:
    chosen = np.linspace(0, len(frames) - 1, min(COLUMNS, len(frames))).round().astype(int)
    return np.concatenate(list(frames[chosen]), axis=1)


def tensorboard_command(out: Path) -> str:
    """What a person types to watch the run."""
    return f"tensorboard --logdir {out / 'tensorboard'}"
