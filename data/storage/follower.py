"""What a cache fetches ahead of need, in the order in which it will be read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple


class Visit(NamedTuple):
    """A shard's use by one block of one lane."""

    shard: int
    first: int  # position that reads it first
    last: int


TRANSFERS = 4  # shards that come at a time to a process

LOOK = 0.2  # seconds between looks at what to fetch, while nobody waits
SEEN = 8192  # visits that the follower looks ahead; bounds its memory where all shards fit

RETRY_AFTER = 5.0  # seconds until a shard that nobody waits for is tried again


class Plan(NamedTuple):
    """What a follower does next."""

    keep: set[int]  # shards that are, or shall be, in the cache
    fetch: list[int]  # those for which there is room now, in the order of need
    evict: list[int]


def make_plan(
    need: Sequence[int],
    here: Collection[int],
    coming: Collection[int],
    sizes: Sequence[int],
    room: int,
    tidy: bool,
) -> Plan:
    """Keep what is needed first, as far as there is room; fetch of it what is not here.

    Args:
        need: Shards in the order in which they are needed, each once.
        here: Shards that are in the cache and may be removed.
        coming: Shards whose room is taken, and which cannot be removed now.
        sizes: Bytes of each shard.
        room: Bytes.
        tidy: Remove what nobody needs at once; else only for the room it takes.
    """
    keep: set[int] = set()
    total = 0
    for number in need:
        total += sizes[number]
        if total > room:
            break
        keep.add(number)
    missing = [n for n in need if n in keep and n not in here and n not in coming]
    places = {number: place for place, number in enumerate(need)}
    # First what nobody needs, then what is needed last.
    spare = sorted(
        (n for n in here if n not in keep), key=lambda n: (n in places, -places.get(n, 0), n)
    )
    taken = sum(sizes[n] for n in {*here, *coming})
    wanted = taken + sum(sizes[n] for n in missing)
    evict = []
    for number in spare:
        if wanted > room or (tidy and number not in places):
            evict.append(number)
            taken, wanted = taken - sizes[number], wanted - sizes[number]
    fetch = []
    for number in missing:
        taken += sizes[number]
        if taken > room:
            break
        fetch.append(number)
    return Plan(keep, fetch, evict)
