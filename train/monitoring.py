"""What a person sees of a run: TensorBoard scalars and inpainted validation frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import UInt8
from torch.utils.tensorboard import SummaryWriter

from ..data.shards import Example, ShardedDataset
from ..modeling.autoencoder import Autoencoder, load_autoencoder
from ..modeling.diffusion import Denoiser
from ..sampling.baselines import fill
from ..sampling.sampler import inpaint
from .config import TrainConfig
from .step import StepResult

COLUMNS = 8  # frames of a clip that a preview shows


class Monitor:
    """Writes a run's TensorBoard events; only the first process has one.

    Args:
        config: The run's configuration.
        step: The step that the run continues from: later events of an earlier life are dropped.
        validation: Clips to preview, or none.
    """

    def __init__(self, config: TrainConfig, step: int, validation: ShardedDataset | None) -> None:
        self._writer = SummaryWriter(str(config.out / "tensorboard"), purge_step=step + 1)
        self._preview = config.preview
        self._seed = config.seed
        self._examples = _first(validation, config.preview.clips) if validation else []
        self._autoencoder: Autoencoder | None = None

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
        if not self._examples:
            return
        if self._autoencoder is None:
            name = self._preview.autoencoder or denoiser.autoencoder["name"]
            self._autoencoder = load_autoencoder(name, denoiser.network.device, denoiser.precision)
        results = inpaint(
            denoiser,
            self._autoencoder,
            self._examples,
            self._preview.schedule,
            seed=self._seed,
            capacity=len(self._examples),
        )
        rows = [preview_rows(example, frames) for example, frames in results]
        self._writer.add_image(
            "validation/inpainted", np.concatenate(rows), step, dataformats="HWC"
        )


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


def _first(validation: ShardedDataset, clips: int) -> Sequence[Example]:
    examples = (validation[index] for index in range(min(clips, len(validation))))
    return [example for example in examples if example.pixels is not None]


def tensorboard_command(out: Path) -> str:
    """What a person types to watch the run."""
    return f"tensorboard --logdir {out / 'tensorboard'}"
