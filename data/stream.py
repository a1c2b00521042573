"""The order of training: which examples a global batch holds, whoever reads it."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .. import jobs
from ..seeding import derive_seed
from .masks import latent_mask
from .shards import Example, ShardedDataset


@dataclass(frozen=True)
class Batch:
    """One process's examples of a global batch, in the order of their positions."""

    keys: list[str]
    positions: list[int]  # counted from the first example of the first epoch
    latents: Float[Tensor, "batch frames channels h w"]
    masked_latents: Float[Tensor, "batch frames channels h w"]
    latent_mask: Float[Tensor, "batch frames 1 h w"]  # hidden share of each latent, 0 to 1

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return dataclasses.replace(
            self,
            latents=self.latents.to(device),
            masked_latents=self.masked_latents.to(device),
            latent_mask=self.latent_mask.to(device),
        )


class Stream:
    """Endless epochs over a dataset, cut into global batches.

    The order of an epoch sorts the keys by a hash of (seed, epoch, key). Position p is example
    p mod N of epoch p div N, and batch k holds the positions from k * batch_size on, so every
    example comes exactly once an epoch, a batch may hold the end of one and the start of the
    next, and a resumed run reads on from its batch number alone.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Read as process `process_index` of `process_count`.

        Args:
            dataset: what to read.
            batch_size: examples of a global batch, all processes together.
            seed: of the order.
            process_index: this process; it holds the contiguous run of slots of that number.
            process_count: processes that share each batch.

        Raises:
            jobs.BadInput: the processes cannot share a batch evenly.
        """
        if batch_size < 1 or batch_size % process_count:
            raise jobs.BadInput(
                f"batch_size is {batch_size}, shared by {process_count} processes: "
                f"give a multiple of {process_count}"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self._share = batch_size // process_count
        self._first_slot = process_index * self._share
        # A batch may reach into the next epoch, so two orders are in use at a time.
        self._order = functools.lru_cache(maxsize=2)(self._sort_epoch)

    def batch(self, k: int) -> Batch:
        """This process's part of global batch `k`: a pure function of `k`.

        In constant time, but for the first batch of an epoch, which sorts the epoch's keys.
        """
        first = k * self.batch_size + self._first_slot
        positions = list(range(first, first + self._share))
        examples = [self.dataset[self._index(position)] for position in positions]
        return Batch(
            keys=[example.key for example in examples],
            positions=positions,
            latents=_stack([example.latents for example in examples]),
            masked_latents=_stack([example.masked_latents for example in examples]),
            latent_mask=torch.stack([_shrink_mask(example) for example in examples]),
        )

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.dataset))
        return self._order(epoch)[place]

    def _sort_epoch(self, epoch: int) -> list[int]:
        keys = self.dataset.keys
        return sorted(range(len(keys)), key=lambda i: derive_seed(self.seed, epoch, keys[i]))


def _stack(latents: list[np.ndarray]) -> Float[Tensor, "batch frames channels h w"]:
    return torch.from_numpy(np.stack(latents)).float()


def _shrink_mask(example: Example) -> Float[Tensor, "frames 1 h w"]:
    return latent_mask(example.mask, *example.latents.shape[-2:])
