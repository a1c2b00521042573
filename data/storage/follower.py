"""Fetches a node's shards ahead of need, in the order in which they will be read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .folder import CacheFolder, Contents
from .transfer import Stopped, WrongFile

TRANSFERS = 4  # shards that are fetched at a time
LOOK = 0.2  # seconds between looks at what to fetch
SEEN = 8192  # uses that a follower looks ahead; bounds its memory where all shards fit
RETRY_AFTER = 5.0  # seconds until a shard that could not be fetched is tried again


class ShardUse(NamedTuple):
    """A shard's use by one block of one lane."""

    shard: int
    first: int  # position that reads it first
    last: int


def plan_cache(
    need: Sequence[int], here: Contents, sizes: Sequence[int], room: int, tidy: bool
) -> tuple[list[int], list[int]]:
    """What to fetch, in the order of need, and what to evict, so that what is needed first is here.

    Args:
        need: Shards in the order in which they are needed, each once.
        here: What is in the cache.
        sizes: Bytes of each shard.
        room: Bytes.
        tidy: Remove at once what nobody needs; otherwise only where its room is needed.
    """
    keep: set[int] = set()
    total = 0
    for number in need:
        total += sizes[number]
        if total > room:
            break
        keep.add(number)
    places = {number: place for place, number in enumerate(need)}
    excess = sum(sizes[n] for n in here.whole | here.coming | keep) - room
    evict = []
    # First what nobody needs, then what is needed last.
    for number in sorted(here.whole - keep, key=lambda n: (n in places, -places.get(n, 0), n)):
        if excess > 0 or (tidy and number not in places):
            evict.append(number)
            excess -= sizes[number]
    return [n for n in need if n in keep and n not in here.whole], evict


class Follower:
    """Threads of a node's first process that fetch what the whole node will read.

    A shard stays until this process has passed its last position of the uses seen so far. With a
    bound the follower sees as far ahead as fits. Without one it sees as far as the longest use is
    long, which is about one block, and removes what nobody needs: so two blocks of each lane are
    here.
    """

    def __init__(self, folder: CacheFolder, uses: Iterator[ShardUse]) -> None:
        """Begin at once.

        No other process may remove shards of `folder` meanwhile. `uses` are sorted by `first`, and
        read by the threads, as far as needed.
        """
        self._folder, self._uses = folder, uses
        self._next = next(uses, None)  # the first use that is not in `_seen`
        self._start = self._next.first if self._next else 0
        self._longest = 0  # positions of a use
        self._seen: list[ShardUse] = []  # not yet passed
        self._fetching: set[int] = set()
        self._not_before: dict[int, float] = {}  # time.monotonic() of another attempt
        self._todo: list[int] = []
        self._looked: float | None = None
        self._turn, self._stop = threading.Lock(), threading.Event()
        for _ in range(TRANSFERS):
            # They end with the process: what they leave half done is continued later.
            threading.Thread(target=self._work, name="vidfill cache", daemon=True).start()

    def close(self) -> None:
        """Let the threads end; afterwards none of them removes anything."""
        self._stop.set()
        with self._turn:
            pass

    def _work(self) -> None:
        while not self._stop.is_set():
            number = self._choose()
            if number is None:
                self._stop.wait(LOOK / 4)
                continue
            try:
                self._folder.fetch(number, self._stop)
            except Stopped:
                return
            except WrongFile:
                self._not_before[number] = float("inf")
            except Exception:  # whoever needs the shard fetches it too, and says what is wrong
                self._not_before[number] = time.monotonic() + RETRY_AFTER
            finally:
                self._fetching.discard(number)

    def _choose(self) -> int | None:
        """The shard to fetch next; the first thread that asks after a while plans anew."""
        with self._turn:
            now = time.monotonic()
            if self._looked is None or now - self._looked > LOOK:
                self._todo = [] if self._stop.is_set() else self._look()
                self._looked = now
            for number in self._todo:
                if number not in self._fetching and self._not_before.get(number, 0.0) <= now:
                    self._todo.remove(number)
                    self._fetching.add(number)
                    return number
            return None

    def _look(self) -> list[int]:
        """Remove what is not needed, and say what to fetch."""
        folder = self._folder
        self._look_ahead(max(self._start, folder.position or 0))
        here = folder.contents()
        order = dict.fromkeys(use.shard for use in self._seen)
        need = [*sorted(here.asked - order.keys()), *order]
        if self._looked is None:
            folder.clean(need)
        room = folder.room(here.whole)
        fetch, evict = plan_cache(need, here, folder.shards.bytes, room, tidy=not folder.bound)
        for number in evict:
            folder.evict(number)
        return fetch

    def _look_ahead(self, position: int) -> None:
        """Drop the uses that have passed, and see as many new ones as there is room for."""
        self._seen = [use for use in self._seen if use.last >= position]
        shards = {use.shard for use in self._seen}
        total = self._folder.size(shards)
        bound = self._folder.bound
        while self._next and len(self._seen) < SEEN and not self._stop.is_set():
            use = self._next
            self._longest = max(self._longest, use.last - use.first + 1)
            if total >= bound if bound else use.first > position + self._longest:
                break
            self._next = next(self._uses, None)
            if use.last >= position:
                total += 0 if use.shard in shards else self._folder.shards.bytes[use.shard]
                shards.add(use.shard)
                self._seen.append(use)
