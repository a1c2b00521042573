"""The order of training: which example each position of the stream reads, whoever reads it.

A position counts examples from the start of the first epoch: position p is turn p mod N of epoch
p div N. The order is a pure function of (seed, epoch, examples of each shard, lanes, block), and
constant time leads from any position to its example. docs/data.md ("The order") specifies it: an
epoch's shards, sorted by a hash, are laid end to end and cut into lanes, whose blocks of examples
are permuted; turn t reads lane t mod lanes at its offset t div lanes, and a tail comes last.

So a shard, which lies in one lane or at the seam of two, goes to about one node, and a lane goes
through its shards once: each is fetched once an epoch. What is open at a time is one block a lane,
two while it moves on: that bounds the cache, and what a resume reads again. Two examples of one
shard are at least `lanes` positions apart within a lane, so a batch mixes as many shards.

The hash is SplitMix64 in integers that wrap, and then a sort: the same on every machine and in
every version, which library random streams are not. It is a bijection of the number that it
hashes, so there are no ties.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from ...seeding import derive_seed
from ..storage.follower import ShardUse

LANES = 64  # at most: each keeps a block of shards open, and a batch is seldom much larger
EPOCHS = 3  # tables kept: a batch may hold examples of two, and a downloader is ahead of it


def choose_lanes(examples: Sequence[int]) -> tuple[int, int]:
    """Lanes and block for shards of so many `examples`.

    A lane needs two shards to be worth its seams, and a block of two shards' length mixes each
    shard with others. Few shards are one lane and one block: all of them are open anyway.
    """
    filled, total = int(np.count_nonzero(examples)), int(np.sum(examples, dtype=np.int64))
    lanes = min(LANES, max(1, filled // 2))
    return (1, total) if lanes == 1 else (lanes, -(-2 * total // filled))


def hash_numbers(key: int, numbers: Int64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """SplitMix64: for number i output i + 1 of the generator that starts at `key`, 0 to 2^64 - 1.

    Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014, with the constants
    of the authors' `mix64variant13`.
    """
    z = np.uint64(key) + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class _EpochShards(NamedTuple):
    """The shards of an epoch that hold examples, in its order, laid end to end."""

    shards: Int64[np.ndarray, " filled"]
    ends: Int64[np.ndarray, " filled"]  # place behind the shard's last example


class _Block(NamedTuple):
    place: int  # of its first example, in the shards laid end to end
    size: int  # examples
    turn: int  # of the epoch that reads its first example
    step: int  # turns from one example to the next


class Order:
    """The order of all epochs over shards of so many examples."""

    def __init__(self, examples: Sequence[int], lanes: int, block: int, seed: int) -> None:
        """An epoch's table is made when the epoch is asked for.

        Some of `examples` may be 0. `lanes` and `block` are the manifest's, both 1 or more.
        """
        counts = np.asarray(examples, dtype=np.int64)
        self.lanes, self.block = lanes, block
        self.examples = int(counts.sum())
        self._length = self.examples // lanes  # of a lane
        self._laned = self._length * lanes  # turns before the tail
        self._table = functools.lru_cache(EPOCHS)(functools.partial(_lay_shards, counts, seed))
        self._seed = seed
        # Batches that are prepared at the same time are in at most two blocks of a lane.
        self._cached_places = functools.lru_cache(2 * (lanes + 1))(self._places)

    def locate(
        self, positions: Int64[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Shard and row that each of `positions` reads; they may be of several epochs."""
        epochs, turns = np.divmod(positions, self.examples)
        lanes, offsets = self._find_lanes(turns)
        blocks, withins = np.divmod(offsets, self.block)
        columns = (column.tolist() for column in (epochs, lanes, blocks, withins))
        places = np.array(
            [self._cached_places(*block)[within] for *block, within in zip(*columns, strict=True)],
            dtype=np.int64,
        )
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        for epoch in set(epochs.tolist()):
            table, here = self._table(epoch), epochs == epoch
            index = np.searchsorted(table.ends, places[here], side="right")
            shards[here] = table.shards[index]
            rows[here] = places[here] - np.where(index > 0, table.ends[index - 1], 0)
        return shards, rows

    def share(
        self, k: int, batch_size: int, process: int, processes: int
    ) -> Int64[np.ndarray, " slots"]:
        """Positions of one process's slots of global batch `k`.

        Batch k holds positions k * batch_size up to the next's first. Sorted by lane they are cut
        into contiguous runs, the longer ones first; -1 fills each to the length of the longest.
        """
        positions = self._slots(k, batch_size)[_cut(batch_size, process, 1, processes)]
        padded = np.full(-(-batch_size // processes), -1, dtype=np.int64)
        padded[: len(positions)] = positions
        return padded

    def lanes_read(
        self, first: int, last: int, batch_size: int, first_process: int, count: int, processes: int
    ) -> frozenset[int]:
        """Lanes that a node's `count` processes read at the positions `first` to `last`.

        The positions are of one stretch of blocks, as `uses` asks for them; the tail is lane
        number `lanes`.
        """
        # Batches inside a stretch repeat their cut when they start at the same lane again. Only
        # the first and the last can hold positions outside, and be cut in another way.
        period = self.lanes // math.gcd(batch_size, self.lanes)
        begin, end = first // batch_size, last // batch_size
        batches = {*range(begin, min(begin + period, end) + 1), end}
        run = _cut(batch_size, first_process, count, processes)
        slots = np.concatenate([self._slots(k, batch_size)[run] for k in sorted(batches)])
        slots = slots[(slots >= first) & (slots <= last)]
        return frozenset(self._find_lanes(slots % self.examples)[0].tolist())

    def uses(
        self, position: int, lanes_of: Callable[[int, int], Collection[int]]
    ) -> Iterator[ShardUse]:
        """The uses of shards from `position` on, without end, sorted by `first`.

        Block b of all lanes is one stretch of positions; behind the last one comes the tail. A
        shard whose examples in a block all lie before `position` is not used. `lanes_of` names the
        lanes that matter in a stretch, from its first and last position.
        """
        while True:
            epoch, turn = divmod(position, self.examples)
            begin, end, number = self._stretch(turn)
            start = epoch * self.examples
            lanes = lanes_of(start + begin, start + end - 1)
            there = range(self.lanes) if turn < self._laned else [self.lanes]
            found = [
                use
                for lane in there
                if lane in lanes
                for use in self._block_uses(epoch, lane, number, position)
            ]
            yield from sorted(found, key=lambda use: use.first)
            position = start + end

    def _find_lanes(
        self, turns: Int64[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Lane and offset in it of turns of an epoch."""
        in_lane = turns < self._laned
        lanes = np.where(in_lane, turns % self.lanes, self.lanes)
        return lanes, np.where(in_lane, turns // self.lanes, turns - self._laned)

    def _slots(self, k: int, batch_size: int) -> Int64[np.ndarray, " batch"]:
        """The positions of a global batch, sorted by lane."""
        positions = np.arange(k * batch_size, (k + 1) * batch_size, dtype=np.int64)
        lanes, _ = self._find_lanes(positions % self.examples)
        return positions[np.argsort(lanes, kind="stable")]

    def _stretch(self, turn: int) -> tuple[int, int, int]:
        """First turn, turn behind the last, and number of the blocks that are read at `turn`."""
        lanes, first, end = self.lanes, 0, self._laned
        if turn >= self._laned:
            lanes, first, end = 1, self._laned, self.examples
        number, turns = (turn - first) // (self.block * lanes), self.block * lanes
        return first + number * turns, min(first + (number + 1) * turns, end), number

    def _block(self, lane: int, number: int) -> _Block:
        begin = number * self.block  # in the lane
        if lane == self.lanes:
            turn = self._laned + begin
            return _Block(turn, min(self.block, self.examples - turn), turn, 1)
        size = min(self.block, self._length - begin)
        return _Block(lane * self._length + begin, size, begin * self.lanes + lane, self.lanes)

    def _places(self, epoch: int, lane: int, number: int) -> Int64[np.ndarray, " size"]:
        """What a block reads first, second, …: places in the epoch's shards laid end to end."""
        block = self._block(lane, number)
        key = derive_seed(self._seed, epoch, lane, number, "block")
        hashes = hash_numbers(key, np.arange(block.size, dtype=np.int64))
        return block.place + np.argsort(hashes, kind="stable")

    def _block_uses(self, epoch: int, lane: int, number: int, position: int) -> list[ShardUse]:
        """Uses of a block's shards from `position` on."""
        block, table = self._block(lane, number), self._table(epoch)
        # Not from the cache: looking ahead would push out what the readers are using.
        places = self._places(epoch, lane, number)
        turns = block.turn + block.step * np.arange(block.size, dtype=np.int64)
        read = np.empty(block.size, dtype=np.int64)  # the position that reads each place
        read[places - block.place] = epoch * self.examples + turns
        low, high = np.searchsorted(
            table.ends, [block.place, block.place + block.size - 1], side="right"
        )
        cuts = np.concatenate([[0], table.ends[low:high] - block.place])
        never = np.iinfo(np.int64).max
        firsts = np.minimum.reduceat(np.where(read >= position, read, never), cuts)
        lasts = np.maximum.reduceat(read, cuts)
        uses = zip(table.shards[low : high + 1], firsts, lasts, strict=True)
        return [ShardUse(*map(int, use)) for use in uses if use[2] >= position]


def _cut(batch_size: int, process: int, count: int, processes: int) -> slice:
    """The run of a batch's slots that `count` processes from `process` on hold."""
    size, longer = divmod(batch_size, processes)
    ends = [n * size + min(n, longer) for n in (process, process + count)]
    return slice(*ends)


def _lay_shards(counts: Int64[np.ndarray, " shards"], seed: int, epoch: int) -> _EpochShards:
    filled = np.flatnonzero(counts)
    key = derive_seed(seed, epoch, "shards")
    shards = filled[np.argsort(hash_numbers(key, filled), kind="stable")]
    return _EpochShards(shards, np.cumsum(counts[shards]))
