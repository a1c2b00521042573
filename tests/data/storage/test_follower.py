"""Fetching ahead of need, along an order."""

from __future__ import annotations

import gc
import hashlib
import itertools
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vidfill.data.shards.order import Order
from vidfill.data.storage.cache import NodeCache
from vidfill.data.storage.folder import Contents
from vidfill.data.storage.follower import ShardUse, plan_cache
from vidfill.data.storage.transfer import GaveUp, Remote
from vidfill.errors import BadInput
from vidfill.files import PARTIAL

Server = Any  # of conftest.py
MakeCache = Callable[..., NodeCache]


def uses_of(*shards: int, length: int = 10) -> list[ShardUse]:
    """Shards that are read one after the other, `length` positions each."""
    return [
        ShardUse(n, place * length, place * length + length - 1) for place, n in enumerate(shards)
    ]


def whole(cache: NodeCache) -> set[int]:
    return cache.folder.contents().whole


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_shards_are_there_before_they_are_needed_and_gone_when_passed(
    server: Server, make_cache: MakeCache
) -> None:
    table = server.put(4)
    first, second = (make_cache(table, process=process) for process in (0, 1))
    first.follow(iter(uses_of(0, 1, 2, 3)))
    for cache in (first, second):
        cache.passed(0)
    wait_until(lambda: whole(first) == {0, 1})  # a use's length ahead
    with second.path(0).open("rb") as file:  # a removed file lives as long as it is open
        first.passed(10)
        wait_until(lambda: whole(first) == {1, 2})
        assert hashlib.sha256(file.read()).hexdigest() == table.sha256[0]
    assert server.gave(second.path(0))  # a process that is far behind fetches it again
    first.passed(30)
    wait_until(lambda: whole(first) == {3})


@pytest.mark.parametrize("shards_that_fit", [0, 7, 100])
def test_a_node_fetches_a_shard_once_an_epoch_into_a_bounded_cache(
    server: Server,
    make_cache: MakeCache,
    bytes_in: Callable[[Path], int],
    monkeypatch: pytest.MonkeyPatch,
    shards_that_fit: int,
) -> None:
    monkeypatch.setattr("vidfill.data.storage.follower.LOOK", 0.01)
    shards, examples, epochs, lanes = 24, 10, 2, 2
    table = server.put(shards)
    order = Order([examples] * shards, lanes, 15, seed=0)
    total = shards * examples
    caches = [make_cache(table, shards_that_fit * server.size / 1e9, n) for n in (0, 1)]
    uses = order.uses(0, lambda first, last: range(lanes + 1))
    caches[0].follow(itertools.takewhile(lambda use: use.first < epochs * total, uses))
    largest, done = 0, threading.Event()

    def measure() -> None:
        nonlocal largest
        while not done.wait(0.001):
            largest = max(largest, bytes_in(caches[0].folder.path))

    watching = threading.Thread(target=measure)
    watching.start()
    positions = np.arange(epochs * total)
    for position, number in zip(positions, order.locate(positions)[0].tolist(), strict=True):
        for cache in caches:
            cache.passed(int(position))
        assert server.gave(caches[position % 2].path(number))
        time.sleep(0.001)  # less than a look in a block
    done.set()
    watching.join()
    counts = server.shards_asked()
    if shards_that_fit == 100:
        assert set(counts.values()) == {1}
    else:
        assert max(counts.values()) <= epochs
        assert largest <= (shards_that_fit or 2 * lanes * 3) * server.size


def test_a_cache_that_is_too_small_is_said_and_nobody_waits_for_ever(
    server: Server, make_cache: MakeCache
) -> None:
    table = server.put(3)
    caches = [make_cache(table, 2.5 * server.size / 1e9, process) for process in (0, 1)]
    caches[0].follow(iter([ShardUse(n, n, 100) for n in range(3)]))
    for cache in caches:
        cache.passed(0)
        for number in range(2):
            assert server.gave(cache.path(number))
    for cache in caches:
        with pytest.raises(BadInput, match=r"gigabytes is 5e-05, and 6e-05 GB .* 0\.00012"):
            cache.path(2)


def test_room_is_made_for_what_a_process_needs_though_its_follower_wants_other_shards(
    server: Server, make_cache: MakeCache
) -> None:
    table = server.put(4)
    first, second = (make_cache(table, 2 * server.size / 1e9, process) for process in (0, 1))
    first.follow(iter(uses_of(0, 1, 2)))
    wait_until(lambda: whole(first) == {0, 1})
    second.passed(0)
    assert server.gave(second.path(3))


def test_an_absent_server_is_no_error_before_somebody_waits(
    server: Server, make_cache: MakeCache
) -> None:
    cache = make_cache(server.put(2))
    server.busy = True
    cache.follow(iter(uses_of(0, 1)))
    wait_until(lambda: server.asked.total() > 4)
    server.busy = False
    assert server.gave(cache.path(0))
    server.busy = True
    if 1 not in whole(cache):
        with pytest.raises(GaveUp, match=r"HTTP 503 .* 3 attempts"):
            cache.path(1)


def test_what_nobody_foresaw_or_asked_for_before_comes_too(
    server: Server, make_cache: MakeCache
) -> None:
    table = server.put(3)
    first, second = make_cache(table), make_cache(table, process=1)
    second.passed(0)
    server.seconds = 0.05
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(second.path, 0)
        first.follow(iter(uses_of(0, 1)))
        assert server.gave(first.path(2)) and server.gave(found.result(timeout=20))
    assert set(server.shards_asked().values()) == {1}


def test_a_process_that_reads_a_stream_of_its_own_has_a_cache_of_its_own(
    server: Server, make_cache: MakeCache
) -> None:
    table = server.put(2)
    for process in (0, 1):
        cache = make_cache(table, process=process)
        cache.follow(iter(uses_of(0, 1)))
        assert server.gave(cache.path(1))
        wait_until(lambda cache=cache: whole(cache) == {0, 1})
    assert set(server.shards_asked().values()) == {2}


def test_a_second_job_in_the_same_folder_is_refused_and_takes_nothing_away(
    server: Server, make_cache: MakeCache
) -> None:
    table = server.put(70)
    first, second = make_cache(table), make_cache(table)
    first.follow(iter(uses_of(*range(70), length=1)))
    with pytest.raises(BadInput, match="another job of this node"):
        second.follow(iter(uses_of(0)))
    assert server.gave(second.path(69))
    first.close()
    second.follow(iter(uses_of(1)))
    assert server.gave(second.path(1))


def test_what_earlier_jobs_left_is_continued_or_removed(
    server: Server, make_cache: MakeCache
) -> None:
    cache = make_cache(server.put(3))
    folder = cache.folder.path
    for number, room in ((0, PARTIAL), (2, PARTIAL), (2, ".lock-")):
        entry = cache.folder.entry(number).name
        (folder / f"{room}{entry}").mkdir() if room == PARTIAL else (
            folder / f"{room}{entry}"
        ).touch()
    (folder / f"000001-{'0' * 16}").mkdir()  # of another manifest
    (folder / f"{PARTIAL}{'0' * 32}").mkdir()  # a removal that was cut short
    cache.follow(iter(uses_of(0)))
    wait_until(lambda: whole(cache) == {0} and len(list(folder.iterdir())) == 3)
    assert {path.name for path in folder.iterdir()} == {
        cache.folder.entry(0).name,
        ".evict",
        ".room",
    }


@pytest.mark.slow
def test_a_killed_follower_leaves_nothing_that_looks_whole(
    server: Server, tmp_path: Path, make_cache: MakeCache
) -> None:
    table = server.put(8, size=2_000_000)
    script = f"""
import pathlib, time, types
from vidfill.data.storage.cache import NodeCache
from vidfill.data.storage.follower import ShardUse
from vidfill.data.storage.transfer import Remote
cache = NodeCache(Remote({server.url!r}), "train", pathlib.Path({str(tmp_path / "cache")!r}))
cache.expect(types.SimpleNamespace(bytes={table.bytes}, sha256={table.sha256}))
cache.follow(ShardUse(n, n, 100) for n in range(8))
time.sleep(100)
"""
    for seconds in (0.0, 0.01, 0.03):
        before = server.asked.total()
        killed = subprocess.Popen([sys.executable, "-c", script])
        wait_until(lambda before=before: server.asked.total() > before)
        time.sleep(seconds)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    cache = make_cache(table)
    cache.follow(iter([ShardUse(n, n, 100) for n in range(8)]))
    assert all(server.gave(cache.path(number)) for number in range(8))


@pytest.mark.slow
@pytest.mark.slow
def test_memory_does_not_grow_with_what_was_read(server: Server, tmp_path: Path) -> None:
    import fsspec

    table = server.put(4, size=100)
    memory = fsspec.filesystem("memory")
    memory.put(f"{server.folder}/train/", "/memory-is-flat/train/", recursive=True)
    cache = NodeCache(Remote("memory://memory-is-flat"), "train", tmp_path / "cache")
    cache.expect(table)
    cache.follow(ShardUse(n % 4, n, n + 1) for n in itertools.count())

    def read(first: int, last: int) -> int:
        for position in range(first, last):
            cache.passed(position)
            cache.path(position % 4)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        sizes = [read(first, first + 300) for first in range(0, 1500, 300)]
    finally:
        tracemalloc.stop()
        cache.close()
    # Bytes; 300 uses that were kept would be more. Python's tables grow once in a while.
    assert sorted(np.diff(sizes))[1] < 40_000


numbers = st.integers(0, 9)


@settings(max_examples=40)
@given(
    st.lists(numbers, unique=True),
    st.sets(numbers),
    st.sets(numbers, max_size=4),
    st.lists(st.integers(1, 9), min_size=10, max_size=10),
    st.integers(0, 40),
    st.booleans(),
)
def test_a_plan_keeps_what_is_needed_first_and_never_exceeds_its_room(
    need: list[int], there: set[int], coming: set[int], sizes: list[int], room: int, tidy: bool
) -> None:
    here = Contents(there - coming, coming, set())

    def total(shards: set[int]) -> int:
        return sum(sizes[number] for number in shards)

    fetch, evict = plan_cache(need, here, sizes, room, tidy)
    fitting = itertools.takewhile(lambda n: total(set(need[:n])) <= room, range(len(need) + 1))
    keep = set(need[: max(fitting)])
    assert fetch == [number for number in need if number in keep - here.whole]
    assert set(evict) <= here.whole - keep
    left = here.whole - set(evict)
    if left - keep:
        assert total(left | coming | keep) <= room
    if tidy:
        assert left <= set(need)
