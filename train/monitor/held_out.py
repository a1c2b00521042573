"""The loss on held-out clips, at noise and timesteps that never change during a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float64
from torch import Tensor

from ...data.shards.format import DamagedShard, Example
from ...data.shards.reading import ShardedDataset, has_split
from ...data.shards.stream import Batch
from ...errors import say
from ...files import hide_secrets
from ...modeling.autoencoder import latent_mask
from ...modeling.denoiser import Denoiser
from ...modeling.noise import timesteps_at
from ...modeling.precision import autocast
from ...modeling.settings import LossConfig
from ...sampling.examples import check_shards
from ...seeding import derive_seed, generator
from ..config import TrainConfig
from ..step import draw_latents, draw_noise

# Sums over clips, a row for each range of timesteps; their quotients are the figures.
Sums = Float64[Tensor, "quantiles 6"]

TRAINED = "the network"  # in messages, before "was trained on"


class HeldOut:
    """A process's share of the held-out clips, in memory; a position is an index in the split.

    A draw depends only on the seed, the clip's index in its split and the range of timesteps. So
    the figures of two evaluations differ by the network only, and are the same on any number of
    processes, up to rounding. There are `quantiles` ranges of timesteps, of equal length.
    """

    def __init__(self, batches: Sequence[Batch], quantiles: int, seed: int) -> None:
        self.batches = batches
        self.quantiles = quantiles
        self.seed = seed

    def measure(self, denoiser: Denoiser, accelerator: Accelerator) -> dict[str, float]:
        """The figures over all processes, each of which calls this with the averaged network."""
        return figures(accelerator.reduce(self.sums(denoiser, accelerator.device), "sum"))

    @torch.no_grad()
    def sums(self, denoiser: Denoiser, device: torch.device) -> Sums:
        """This process's part of the sums that `figures` takes; the parts are to be added."""
        rows = []
        for quantile in range(self.quantiles):
            row = torch.zeros(6, dtype=torch.float64, device=device)
            for batch in self.batches:
                row += self._measure_batch(denoiser, batch.to(device), quantile)
            rows.append(row)
        return torch.stack(rows)

    def _measure_batch(
        self, denoiser: Denoiser, batch: Batch, quantile: int
    ) -> Float64[Tensor, " 6"]:
        seed = derive_seed(self.seed, "held out", quantile)
        latents = denoiser.normalise(draw_latents(batch, seed))
        noise = draw_noise(batch.positions, seed, latents.shape[1:]).to(latents.device)
        # ⌊(q + u)/Q · T⌋ for a uniform draw u of each clip.
        sources = [generator(seed, index, "timestep") for index in batch.positions]
        draws = [torch.rand(1, generator=source, dtype=torch.float64) for source in sources]
        share = (quantile + torch.cat(draws)) / self.quantiles
        timestep = timesteps_at(share, denoiser.timesteps, LossConfig()).to(latents.device)
        condition = denoiser.condition(batch.masked_latents, batch.latent_mask)
        noisy, target = denoiser.training_pair(latents, noise, timestep)
        with autocast(latents.device, denoiser.precision):
            prediction = denoiser.network(noisy, timestep, condition)
        error = (prediction.to(target.dtype) - target).square().double()
        hole = batch.latent_mask.double().expand_as(error)
        return torch.stack(
            [
                error.mean(dim=(1, 2, 3, 4)).sum(),
                torch.tensor(len(batch.keys), dtype=torch.float64, device=error.device),
                (error * hole).sum(),
                hole.sum(),
                (error * (1 - hole)).sum(),
                (1 - hole).sum(),
            ]
        )


def figures(sums: Sums) -> dict[str, float]:
    """Mean squared errors of the training target, without the training loss's weights.

    Returns:
        `loss`, over all places and ranges; `loss_quantile_1`, the least noisy range, and so on;
        `loss_hole` and `loss_visible`, over all latents of all clips, each weighted by the share
        of it inside or outside the hole. Figures that no clip contributes to are left out.
    """
    named: dict[str, Tensor] = {"loss": sums[:, :2].sum(dim=0)}
    named |= {"loss_hole": sums[:, 2:4].sum(dim=0), "loss_visible": sums[:, 4:].sum(dim=0)}
    named |= {f"loss_quantile_{n}": row for n, row in enumerate(sums[:, :2], start=1)}
    found = {name: pair.tolist() for name, pair in named.items()}
    return {name: error / count for name, (error, count) in found.items() if count > 0}


def open_held_out(
    config: TrainConfig, denoiser: Denoiser, process: int, processes: int
) -> HeldOut | None:
    """Read this process's share of the held-out clips.

    They are spread evenly over the split; a process takes neighbours, which lie in few shards. All
    are read now, so that a damaged or missing shard is found before the first step.

    None if there is nothing to measure: no clips are wanted, or the shards have no validation
    split, which the first process reports.

    Raises:
        DamagedShard: A clip is not what was written, and `data.damaged` is "stop".
    """
    wanted = config.evaluation
    if not wanted.every or not wanted.clips:
        return None
    if not has_split(config.shards, "validation"):
        if process == 0:
            place = hide_secrets(config.shards)
            say(f"{place} has no validation split: no held-out loss")
        return None
    dataset = ShardedDataset(config.shards, "validation", config.data.cache)
    check_shards(dataset, f"{hide_secrets(config.shards)}/validation", denoiser, TRAINED)
    spread = np.linspace(0, len(dataset) - 1, min(wanted.clips, len(dataset))).round().astype(int)
    share = np.array_split(spread, processes)[process].tolist()
    examples: dict[int, Example] = {}
    for index in share:
        try:
            examples[index] = dataset[index]
        except DamagedShard as damage:
            if config.data.damaged == "stop":
                raise
            say(f"vidfill train: left out of the held-out clips: {damage}")
    dataset.store.close()
    at_once = -(-config.batch_size // (processes * config.gradient_accumulation))
    read = list(examples)
    parts = [read[first : first + at_once] for first in range(0, len(read), at_once)]
    batches = [_collate(part, [examples[index] for index in part]) for part in parts]
    return HeldOut(batches, wanted.quantiles, config.seed)


def _collate(positions: list[int], examples: Sequence[Example]) -> Batch:
    """A batch as the stream gives it."""
    latents = np.stack([example.latents for example in examples])
    log_variances = [e.log_variance for e in examples if e.log_variance is not None]
    masks = [latent_mask(example.mask, *latents.shape[-2:]) for example in examples]
    return Batch(
        keys=[example.key for example in examples],
        positions=positions,
        weights=torch.ones(len(examples)),
        latents=torch.from_numpy(latents),
        masked_latents=torch.from_numpy(np.stack([e.masked_latents for e in examples])),
        latent_mask=torch.stack(masks),
        log_variance=torch.from_numpy(np.stack(log_variances)) if log_variances else None,
    )
