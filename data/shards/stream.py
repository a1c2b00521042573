"""The stream of training: the batches of an `Order`, read ahead of need by threads."""

from __future__ import annotations

import functools
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ...errors import BadInput
from .format import TRAINING, DamagedShard
from .order import Order
from .reading import ExampleLayout, ShardedDataset

PREPARED = 3  # batches that are prepared while the caller works on one; more for more threads
TOGETHER = 32  # batches whose examples are located at a time


class SkippedExample(NamedTuple):
    """An example that was damaged, and so got no weight."""

    position: int
    key: str  # "" where not even that could be read
    shard: int
    reason: str


@dataclass(frozen=True)
class Node:
    """The processes of one machine, which are neighbours in rank and share its cache."""

    first_process: int
    processes: int
    local_process: int  # this one's place among them

    @classmethod
    def from_environment(cls, process: int, processes: int) -> Node:
        """As a launcher says (LOCAL_RANK, LOCAL_WORLD_SIZE); without one a process is alone.

        So it is where the launcher's processes do not share the stream, but each reads all of it.
        """
        local = int(os.environ.get("LOCAL_RANK", "0"))
        count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        first = process - local
        if local < count and first >= 0 and first + count <= processes:
            return cls(first, count, local)
        return cls(process, 1, 0)


class _Buffer:
    """Room for one batch: the examples' spans as they lie in the shards."""

    def __init__(self, slots: int, layout: ExampleLayout, pinned: bool) -> None:
        self.raw = torch.empty((slots, layout.bytes), dtype=torch.uint8, pin_memory=pinned)
        self.slots = [slot.data for slot in self.raw.numpy()]
        self.views = layout.views(self.raw)
        self._layout = layout
        self._copies: list[torch.cuda.Event] = []

    def arrays(self, device: torch.device) -> dict[str, Tensor]:
        """The batch's arrays on `device`: float16 views of one copy, or of the buffer itself."""
        if device.type == "cpu":
            return self.views
        raw = self.raw.to(device, non_blocking=self.raw.is_pinned())
        if device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(device))
            self._copies.append(copied)
        return self._layout.views(raw)

    def wait(self) -> None:
        """Return when no copy to a device reads the buffer any more."""
        while self._copies:
            self._copies.pop().synchronize()


@dataclass(frozen=True)
class Batch:
    """One process's slots of a global batch, of equal number in every process.

    A slot beyond this process's share is a pad: zeros without weight. The global batch's mean
    loss is the sum of `weights * loss` over all processes, divided by its batch_size.
    """

    keys: list[str]  # "" in a pad
    positions: list[int]  # counted from the first example of the first epoch; -1 in a pad
    weights: Float[Tensor, " batch"]  # 1, or 0 for a pad and for an example that was skipped
    latents: Float[Tensor, "batch frames channels h w"]
    masked_latents: Float[Tensor, "batch frames channels h w"]
    latent_mask: Float[Tensor, "batch frames 1 h w"]  # hidden share of each latent, 0 to 1
    log_variance: Float[Tensor, "batch frames channels h w"] | None = None
    _buffer: _Buffer | None = field(default=None, repr=False)

    def to(self, device: torch.device) -> Batch:
        """The same batch with float32 tensors of its own on `device`."""
        arrays = {name: getattr(self, name) for name in TRAINING}
        if self._buffer:
            arrays = self._buffer.arrays(device)
        return Batch(
            self.keys,
            self.positions,
            self.weights.to(device),
            _buffer=None,
            **{n: array.to(device).float() for n, array in arrays.items() if array is not None},
        )


class Stream:
    """Endless epochs over a dataset, cut into global batches.

    Batch k holds the positions from k * batch_size on of the order that `Order` describes, so a
    batch may hold the end of one epoch and the start of the next, and a resumed run reads on from
    its batch number alone.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        batch_size: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
        *,
        node: Node | None = None,
        damaged: Literal["stop", "skip"] = "stop",
    ) -> None:
        """Read as process `process` of the `processes` that share each batch of `batch_size`.

        Without a `node` the launcher's environment says which processes are on this machine. An
        example that is damaged raises DamagedShard where `damaged` is "stop"; where it is "skip" it
        gets weight 0 and is listed in `skipped`.
        """
        if batch_size < 1:
            raise BadInput(f"batch_size is {batch_size}: give 1 or more")
        manifest = dataset.manifest
        self.dataset = dataset
        self.batch_size = batch_size
        self.process, self.processes = process, processes
        self.node = node or Node.from_environment(process, processes)
        self.damaged = damaged
        self.order = Order(manifest.shards.examples, manifest.lanes, manifest.block, seed)
        self.skipped: list[SkippedExample] = []
        self.waited = 0.0  # seconds that `run` made its caller wait
        self._layout = ExampleLayout.of(manifest)
        # Threads prepare batches of two stretches at most.
        self._located = functools.lru_cache(2)(self._locate)
        self._lost: dict[int, DamagedShard] = {}  # whole shards, not to be fetched again and again

    def batch(self, k: int) -> Batch:
        """This process's part of global batch `k`: a pure function of `k`, in constant time."""
        batch, skipped = self._read(k, self._make_buffer(pinned=False), threading.Event())
        self.skipped += skipped
        return batch

    def run(self, first: int, workers: int = 1) -> Generator[Batch, None, None]:
        """Batches `first`, `first` + 1, … without end, prepared by threads.

        A batch is valid until the next one is asked for: its memory is used again. What `to`
        returned stays. An error is raised at the batch that has it. No byte depends on the number
        of threads, `workers`.
        """
        store, ahead = self.dataset.store, max(PREPARED, workers)
        ended = threading.Event()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="stream")
        # With a device one more than are in use, so that a batch's copy may still be under way
        # while the next is being prepared. No more than that: they share the processor's cache.
        pinned = torch.cuda.is_available()
        room = ahead + 1 + pinned
        free = deque(self._make_buffer(pinned) for _ in range(room))
        pending: deque[tuple[_Buffer, Future[tuple[Batch, list[SkippedExample]]]]] = deque()
        try:
            # A node beyond the batch's last slot has nothing to fetch, however far it looks.
            if self.node.local_process == 0 and self.node.first_process < self.batch_size:
                store.follow(self.order.uses(first * self.batch_size, self._lanes_of_node))
            for k in itertools.count(first):
                # Each step waits for the gradients of all processes, but a device may be as many
                # steps behind its process as there are buffers; others of this node as well.
                store.passed(max(first, k - room - 1) * self.batch_size)
                while len(pending) <= ahead:
                    buffer, number = free.popleft(), k + len(pending)
                    pending.append((buffer, pool.submit(self._read, number, buffer, ended)))
                buffer, future = pending.popleft()
                began = time.perf_counter()
                batch, skipped = future.result()
                self.waited += time.perf_counter() - began
                self.skipped += skipped
                yield batch
                free.append(buffer)
        finally:
            ended.set()
            store.close()  # a thread may be waiting for it to bring a shard
            pool.shutdown(cancel_futures=True)

    def _lanes_of_node(self, first: int, last: int) -> frozenset[int]:
        node = self.node
        return self.order.lanes_read(
            first, last, self.batch_size, node.first_process, node.processes, self.processes
        )

    def _make_buffer(self, pinned: bool) -> _Buffer:
        return _Buffer(-(-self.batch_size // self.processes), self._layout, pinned)

    def _read(
        self, k: int, buffer: _Buffer, ended: threading.Event
    ) -> tuple[Batch, list[SkippedExample]]:
        """Batch `k` in `buffer`, and its damaged examples; gives up once `ended` is set."""
        buffer.wait()
        positions, shards, rows = self._located(k - k % TOGETHER)[k % TOGETHER]
        held = positions >= 0
        buffer.raw[np.count_nonzero(held) :] = 0  # pads are behind the share
        keys, weights = [""] * len(positions), held.astype(np.float32)
        skipped: list[SkippedExample] = []
        for slot, (number, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            if ended.is_set():
                raise CancelledError
            if number < 0:
                continue  # a pad
            try:
                keys[slot] = self._read_example(number, row, buffer.slots[slot])
            except DamagedShard as damage:
                if self.damaged == "stop":
                    raise
                buffer.raw[slot], weights[slot] = 0, 0
                keys[slot] = damage.key
                position = int(positions[slot])
                skipped.append(SkippedExample(position, damage.key, number, damage.reason))
        weighed = torch.from_numpy(weights)
        batch = Batch(keys, positions.tolist(), weighed, **buffer.views, _buffer=buffer)
        return batch, skipped

    def _locate(self, first: int) -> Int64[np.ndarray, "batches 3 slots"]:
        """Positions, shards and rows, -1 in a pad, of the slots of TOGETHER batches from `first`.

        One batch alone would take as long.
        """
        numbers = range(first, first + TOGETHER)
        positions = np.stack(
            [self.order.share(k, self.batch_size, self.process, self.processes) for k in numbers]
        )
        shards, rows = np.full_like(positions, -1), np.full_like(positions, -1)
        held = positions >= 0
        shards[held], rows[held] = self.order.locate(positions[held])
        return np.stack([positions, shards, rows], axis=1)

    def _read_example(self, number: int, row: int, into: memoryview) -> str:
        """Copy an example's span into a slot, and return its key."""
        if number in self._lost:
            raise self._lost[number].with_traceback(None)
        try:
            shard = self.dataset.shard(number)
        except DamagedShard as damage:
            if self.damaged == "skip":
                self._lost[number] = damage
            raise
        try:
            shard.read_span(row, into)
        except DamagedShard:
            if not self.dataset.renew(number):
                raise
            shard = self.dataset.shard(number)
            shard.read_span(row, into)
        return shard.keys[row]
