"""The cache of a node, filled from a real server by real processes."""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import hashlib
import http.server
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vidfill.data.shards.format import DamagedShard, Example, ShardTable
from vidfill.data.shards.order import Order
from vidfill.data.shards.reading import ShardedDataset
from vidfill.data.shards.stream import Stream
from vidfill.data.storage.cache import NodeCache
from vidfill.data.storage.follower import Visit, make_plan
from vidfill.data.storage.names import MANIFEST, index_name, shard_name
from vidfill.data.storage.store import CacheConfig, LocalStore, open_store
from vidfill.data.storage.transfer import GaveUp, Remote, Stopped, WrongFile
from vidfill.errors import BadInput
from vidfill.files import hash_file

SIZE = 20_000  # bytes of a shard
BUSY = 503


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, and counts."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: collections.Counter[str] = collections.Counter()  # by the file's name
        self.busy = False
        self.seconds = 0.0  # that an answer takes
        self._counting = threading.Lock()

    def count(self, path: str) -> None:
        with self._counting:
            self.asked[path.rpartition("/")[2]] += 1

    def shards_asked(self) -> dict[str, int]:
        return {name: count for name, count in self.asked.items() if name.endswith(".tar")}


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.count(self.path)
        time.sleep(self.server.seconds)
        if self.server.busy:
            self.send_error(BUSY)
            return
        with contextlib.suppress(ConnectionError):
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def put_shards(folder: Path, count: int, size: int = SIZE, split: str = "train") -> ShardTable:
    """Write shards of noise where they are served from."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    digests = []
    for number in range(count):
        content = np.random.default_rng(number).bytes(size)
        digests.append(hashlib.sha256(content).hexdigest())
        (folder / split / shard_name(number)).write_bytes(content)
        (folder / split / index_name(number)).write_text(json.dumps({"sha256": digests[-1]}))
    return ShardTable((1,) * count, (size,) * count, tuple(digests))


@pytest.fixture
def make_cache(tmp_path: Path, server: Server) -> Iterator[Callable[..., NodeCache]]:
    """A cache of the server's split "train", as one process of the node has it."""
    made = []

    def make(table: ShardTable, gigabytes: float = 0.0, process: int = 0, **settings) -> NodeCache:
        attempts = settings.pop("attempts", 3)
        remote = Remote(server.url, stall=5.0, attempts=attempts, first_pause=0.01)
        folder = settings.pop("folder", tmp_path / "cache")
        settings = {"patience": 0.3, "grace": 0.0, "lonely": 0.2} | settings
        cache = NodeCache(remote, "train", folder, gigabytes, process, 2, **settings)
        cache.expect(table)
        made.append(cache)
        return cache

    yield make
    for cache in made:
        cache.close()


def visits_of(*shards: int, length: int = 10) -> list[Visit]:
    """Shards that are read one after the other, `length` positions each."""
    return [Visit(n, place * length, place * length + length - 1) for place, n in enumerate(shards)]


def holds(path: Path, table: ShardTable, number: int) -> bool:
    index = json.loads(path.with_name(index_name(number)).read_text())
    return hash_file(path) == table.sha256[number] == index["sha256"]


def size_of(folder: Path) -> int:
    """Bytes of shards, whole or not, that lie in a folder."""
    total = 0
    for where, _, names in os.walk(folder):  # which passes over what goes meanwhile
        for name in names:
            if name.endswith(".tar"):
                with contextlib.suppress(FileNotFoundError):
                    total += os.stat(f"{where}/{name}").st_size
    return total


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# Which store


def test_a_folder_is_read_in_place(tmp_path: Path) -> None:
    put_shards(tmp_path, 1)
    (tmp_path / "train" / MANIFEST).write_text("{}")
    for root in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        store = open_store(root, "train", CacheConfig())
        assert isinstance(store, LocalStore)
        assert store.read(MANIFEST) == b"{}"
        assert store.path(0) == tmp_path / "train" / shard_name(0)
        assert store.splits() == ["train"]


def test_the_folder_of_a_job_is_private_and_goes_when_the_job_is_over(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = put_shards(server.folder, 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def folders() -> list[Path]:
        return sorted(tmp_path.glob("vidfill-*"))

    def open_as(job: str) -> NodeCache:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        store = open_store(server.url, "train", CacheConfig())
        assert isinstance(store, NodeCache)
        store.expect(table)
        store.path(0)
        return store

    first = open_as("1")
    assert [path.stat().st_mode & 0o777 for path in folders()] == [0o700]
    second = open_as("2")
    assert len(folders()) == 2
    del first
    third = open_as("3")
    assert [path.name[-1] for path in folders()] == ["2", "3"]
    del second, third


def test_a_folder_that_others_can_write_to_is_refused(
    server: Server, tmp_path: Path, make_cache: Callable[..., NodeCache]
) -> None:
    table = put_shards(server.folder, 1)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(BadInput, match="written by others"):
        make_cache(table, folder=tmp_path / "open")


def test_the_splits_are_found_where_the_server_lists_them(server: Server, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        put_shards(server.folder, 1, split=split)
        (server.folder / split / MANIFEST).write_text("{}")
    (server.folder / "other").mkdir()
    store = open_store(server.url, "test", CacheConfig(str(tmp_path / "cache")))
    assert store.splits() == ["train", "validation"]
    with pytest.raises(FileNotFoundError):
        store.read(MANIFEST)


# Without an order


def test_a_shard_is_fetched_once_however_many_ask_for_it(
    server: Server, make_cache: Callable[..., NodeCache]
) -> None:
    table = put_shards(server.folder, 3)
    server.seconds = 0.05
    caches = [make_cache(table, process=process) for process in (0, 1, 0, 1)]
    got: list[Path] = []
    threads = [
        threading.Thread(target=lambda c=cache, n=number: got.append(c.path(n)))
        for cache in caches
        for number in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 12
    for number in range(3):
        assert holds(caches[0].path(number), table, number)
    assert set(server.asked.values()) == {1}


def test_random_reading_stays_in_its_bound(
    server: Server, tmp_path: Path, make_cache: Callable[..., NodeCache]
) -> None:
    table = put_shards(server.folder, 6)
    cache = make_cache(table, gigabytes=3.5 * SIZE / 1e9)
    for number in [0, 1, 2, 3, 4, 5, 4, 3, 5, 0, 1]:
        assert holds(cache.path(number), table, number)
        assert size_of(tmp_path / "cache") <= 3 * SIZE
        time.sleep(0.002)  # which one was asked for last is told by the clock
    assert server.shards_asked() == {shard_name(n): 2 if n < 2 else 1 for n in range(6)}
    with pytest.raises(BadInput, match=r"gigabytes is 1e-06: shard 0 alone has 2e-05 GB"):
        make_cache(table, gigabytes=1e-6, folder=tmp_path / "other").path(0)


def test_what_is_there_is_not_fetched_again_unless_it_lost_its_end(
    server: Server, make_cache: Callable[..., NodeCache]
) -> None:
    table = put_shards(server.folder, 2)
    paths = [make_cache(table).path(number) for number in range(2)]
    os.truncate(paths[1], SIZE - 1)
    again = make_cache(table)
    for number in range(2):
        assert holds(again.path(number), table, number)
    assert server.shards_asked() == {shard_name(0): 1, shard_name(1): 2}


def test_a_data_set_that_was_encoded_anew_does_not_mix_with_the_old_one(
    server: Server, make_cache: Callable[..., NodeCache]
) -> None:
    old = put_shards(server.folder, 2)
    make_cache(old).path(0)
    new = put_shards(server.folder, 2, size=SIZE + 1)
    cache = make_cache(new)
    assert holds(cache.path(0), new, 0)
    cache.follow(iter(visits_of(0)))  # and what nobody can need any more goes
    assert len(list(cache.folder.glob("000000-*"))) == 1


def test_a_shard_that_was_changed_on_the_server_is_not_kept(
    server: Server, make_cache: Callable[..., NodeCache]
) -> None:
    table = put_shards(server.folder, 3)
    (server.folder / "train" / shard_name(0)).write_bytes(bytes(SIZE))
    (server.folder / "train" / index_name(1)).write_text("{}")
    (server.folder / "train" / shard_name(2)).unlink()
    cache = make_cache(table)
    for number, reason in enumerate(["than its manifest says", "not the index", "not there"]):
        with pytest.raises(WrongFile, match=reason) as caught:
            cache.path(number)
        assert "\n" not in str(caught.value)
    cache.follow(iter(visits_of(0, 1, 2)))
    for number, reason in enumerate(["than its manifest says", "not the index", "not there"]):
        with pytest.raises(WrongFile, match=reason):
            cache.path(number)
    assert size_of(cache.folder) == 0


# Along an order


def test_shards_are_there_before_they_are_needed_and_gone_when_all_have_passed(
    server: Server, make_cache: Callable[..., NodeCache]
) -> None:
    table = put_shards(server.folder, 4)
    caches = [make_cache(table, process=process) for process in (0, 1)]
    caches[0].follow(iter(visits_of(0, 1, 2, 3)))

    def held() -> set[int]:
        return caches[0].held()

    for cache in caches:
        cache.passed(0)
    wait_until(lambda: held() == {0, 1})  # a visit's length ahead
    caches[0].passed(10)
    time.sleep(0.2)
    assert held() == {0, 1}
    open_file = caches[1].path(0).open("rb")
    caches[1].passed(10)
    wait_until(lambda: held() == {1, 2})
    with open_file:  # a removed file lives as long as it is open
        assert hashlib.sha256(open_file.read()).hexdigest() == table.sha256[0]
    caches[1].close()  # who is gone does not hold up the others
    caches[0].passed(30)
    wait_until(lambda: held() == {3})


@pytest.mark.parametrize("shards_that_fit", [0, 7, 100])
def test_a_node_fetches_a_shard_once_an_epoch_into_a_bounded_cache(
    server: Server, make_cache: Callable[..., NodeCache], shards_that_fit: int
) -> None:
    shards, examples, epochs, lanes = 24, 20, 3, 2
    table = put_shards(server.folder, shards)
    order = Order([examples] * shards, lanes, 30, seed=0)
    total = shards * examples
    caches = [make_cache(table, shards_that_fit * SIZE / 1e9, process) for process in (0, 1)]
    visits = order.visits(0, lambda first, last: range(lanes + 1))
    caches[0].follow(itertools.takewhile(lambda visit: visit.first < epochs * total, visits))
    largest, done = 0, threading.Event()

    def measure() -> None:
        nonlocal largest
        while not done.wait(0.001):
            largest = max(largest, size_of(caches[0].folder))

    watching = threading.Thread(target=measure)
    watching.start()
    positions = np.arange(epochs * total)
    for position, number in zip(positions, order.locate(positions)[0].tolist(), strict=True):
        reader = caches[position % 2]
        for cache in caches:
            cache.passed(int(position))
        assert holds(reader.path(number), table, number)
    done.set()
    watching.join()
    counts = server.shards_asked()
    if shards_that_fit == 100:
        assert set(counts.values()) == {1}
    else:
        assert set(counts.values()) <= set(range(1, epochs + 1))
        assert largest <= (shards_that_fit or 2 * lanes * 3) * SIZE


def test_a_cache_that_is_too_small_is_said_and_nobody_waits_for_ever(
    server: Server, make_cache: Callable[..., NodeCache]
) -> None:
    table = put_shards(server.folder, 3)
    caches = [make_cache(table, 2.5 * SIZE / 1e9, process) for process in (0, 1)]
    caches[0].follow(iter([Visit(n, n, 100) for n in range(3)]))
    for cache in caches:
        cache.passed(0)
        for number in range(2):
            assert holds(cache.path(number), table, number)
    for cache in caches:
        with pytest.raises(BadInput, match=r"gigabytes is 5e-05, and 6e-05 GB .* 0\.00012"):
            cache.path(2)


def test_an_absent_server_is_no_error_before_somebody_waits(
    server: Server, make_cache: Callable[..., NodeCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = put_shards(server.folder, 2)
    cache = make_cache(table)
    server.busy = True
    cache.follow(iter(visits_of(0, 1)))
    time.sleep(0.3)
    server.busy = False
    assert holds(cache.path(0), table, 0)
    server.busy = True
    cache.follow(iter(visits_of(0, 1)))
    assert holds(cache.path(0), table, 0)
    if not cache.is_whole(1):
        with pytest.raises(GaveUp, match=r"HTTP 503 .* 3 attempts"):
            cache.path(1)


def test_what_was_asked_before_the_follower_began_comes(
    server: Server, make_cache: Callable[..., NodeCache]
) -> None:
    table = put_shards(server.folder, 1)
    first, second = make_cache(table), make_cache(table, process=1, lonely=100.0)
    second.passed(0)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(second.path, 0)
        time.sleep(0.1)
        first.follow(iter([]))
        assert holds(found.result(timeout=20), table, 0)


def test_a_shard_that_was_damaged_in_the_cache_is_fetched_again(
    server: Server, tmp_path: Path, write_dataset: Callable[..., list[Example]]
) -> None:
    examples = write_dataset(server.folder, sizes=(3,))
    cache = CacheConfig(folder=str(tmp_path / "cache"))
    path = ShardedDataset(server.url, "train", cache).shard(0).path
    path.write_bytes(bytes(path.stat().st_size))
    batch = Stream(ShardedDataset(server.url, "train", cache), 3, 0).batch(0)
    assert sorted(batch.keys) == [example.key for example in examples]
    served = server.folder / "train" / shard_name(0)
    served.write_bytes(bytes(served.stat().st_size))
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DamagedShard, match="another size or SHA-256"):
        Stream(ShardedDataset(server.url, "train", cache), 3, 0).batch(0)


def test_what_no_visit_foresaw_comes_too(
    server: Server, make_cache: Callable[..., NodeCache]
) -> None:
    table = put_shards(server.folder, 3)
    cache = make_cache(table)
    cache.follow(iter(visits_of(0, 1)))
    assert holds(cache.path(2), table, 2)


def test_a_process_without_a_follower_fetches_by_itself(
    server: Server, make_cache: Callable[..., NodeCache]
) -> None:
    table = put_shards(server.folder, 1)
    cache = make_cache(table, process=1)
    cache.passed(0)
    assert holds(cache.path(0), table, 0)


def test_a_process_that_reads_a_stream_of_its_own_has_a_cache_of_its_own(
    server: Server, make_cache: Callable[..., NodeCache]
) -> None:
    table = put_shards(server.folder, 2)
    for process in (0, 1):
        cache = make_cache(table, process=process)
        cache.follow(iter(visits_of(0, 1)))
        assert holds(cache.path(1), table, 1)
    assert set(server.shards_asked().values()) == {2}


def test_a_second_job_in_the_same_folder_is_refused(
    server: Server, make_cache: Callable[..., NodeCache]
) -> None:
    table = put_shards(server.folder, 2)
    first, second = make_cache(table), make_cache(table)
    first.follow(iter(visits_of(0)))
    with pytest.raises(BadInput, match="another job of this node"):
        second.follow(iter(visits_of(0)))
    first.close()
    second.follow(iter(visits_of(1)))
    assert holds(second.path(1), table, 1)


def test_who_waits_is_let_go_when_the_cache_is_closed(
    server: Server, make_cache: Callable[..., NodeCache]
) -> None:
    table = put_shards(server.folder, 1)
    server.busy = True
    cache = make_cache(table, lonely=100.0, attempts=10**6)
    for begin in (lambda: None, lambda: cache.follow(iter(visits_of(0)))):
        begin()
        threading.Timer(0.01, cache.close).start()
        with pytest.raises(Stopped):
            cache.path(0)


def test_a_full_disk_is_one_line_and_a_small_one_is_enough(
    server: Server, tmp_path: Path, make_cache: Callable[..., NodeCache], capsys
) -> None:
    table = put_shards(server.folder, 6, size=300_000)
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        cache = make_cache(table, gigabytes=1.0, folder=small / "cache")
        cache.follow(iter(visits_of(*range(6))))
        for number in range(6):
            cache.passed(10 * number)
            assert holds(cache.path(number), table, number)
        assert "the disk has room for" in capsys.readouterr().err
        cache.close()
        shutil.rmtree(small / "cache")
        (small / "other").write_bytes(bytes(850_000))
        cache = make_cache(table, folder=small / "cache2")
        with pytest.raises(BadInput, match=r"full: shard-000000\.tar of 0\.0003 GB"):
            cache.path(0)
        cache.follow(iter(visits_of(0)))
        with pytest.raises(BadInput, match=r"has room for .*, and 0\.0003 GB are read at once"):
            cache.path(0)
        assert size_of(small / "cache2") == 0
        cache.close()
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


def test_a_killed_follower_leaves_nothing_that_looks_whole(
    server: Server, tmp_path: Path, make_cache: Callable[..., NodeCache]
) -> None:
    table = put_shards(server.folder, 8, size=2_000_000)
    script = f"""
import pathlib, time, types
from vidfill.data.storage.cache import NodeCache
from vidfill.data.shards.order import Visit
from vidfill.data.storage.transfer import Remote
cache = NodeCache(Remote({server.url!r}), "train", pathlib.Path({str(tmp_path / "cache")!r}))
cache.expect(types.SimpleNamespace(bytes={table.bytes}, sha256={table.sha256}))
cache.follow(Visit(n, n, 100) for n in range(8))
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
    cache.follow(iter([Visit(n, n, 100) for n in range(8)]))
    for number in range(8):
        assert holds(cache.path(number), table, number)


READER = """
import sys
from vidfill.data.storage.store import CacheConfig
from vidfill.data.shards.reading import ShardedDataset
from vidfill.data.shards.stream import Stream
import os, time
url, folder, steps, rank = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(os.environ["LOCAL_RANK"])
dataset = ShardedDataset(url, "train", CacheConfig(folder))
stream = Stream(dataset, 5, seed=3, process=rank, processes=2)
for k, batch in zip(range(steps), stream.run(0, workers=2)):
    print(",".join(batch.keys), float(batch.latents.double().sum()), flush=True)
"""


def test_two_processes_of_a_node_share_a_stream_and_fetch_each_shard_once_an_epoch(
    server: Server, tmp_path: Path, write_dataset: Callable[..., list]
) -> None:
    sizes, epochs = [6, 5, 7, 6, 8, 6, 7, 5], 2
    write_dataset(server.folder, sizes, lanes=(2, 12))
    steps = epochs * sum(sizes) // 5
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, server.url, str(tmp_path / "cache"), str(steps)],
            env={**os.environ, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [reader.communicate()[0].splitlines() for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0]
    local = ShardedDataset(server.folder, "train")
    for rank in (0, 1):
        stream = Stream(local, 5, seed=3, process=rank, processes=2)
        expected = [stream.batch(k) for k in range(steps)]
        assert said[rank] == [
            f"{','.join(batch.keys)} {float(batch.latents.double().sum())}" for batch in expected
        ]
    counts = server.shards_asked()
    assert set(counts) == {shard_name(number) for number in range(len(sizes))}
    assert sum(counts.values()) <= (epochs + 1) * len(sizes)
    assert max(counts.values()) <= epochs + 1


def test_memory_does_not_grow_with_what_was_read(tmp_path: Path) -> None:
    import fsspec

    table = put_shards(tmp_path, 4, size=100)
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/train/", "/memory-is-flat/train/", recursive=True)
    cache = NodeCache(Remote("memory://memory-is-flat"), "train", tmp_path / "cache", grace=0.0)
    cache.expect(table)
    cache.follow(Visit(n % 4, n, n + 1) for n in itertools.count())

    def read(first: int, last: int) -> int:
        for position in range(first, last):
            cache.passed(position)
            cache.path(position % 4)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before, after = read(0, 100), read(100, 400)
    finally:
        tracemalloc.stop()
        cache.close()
    assert after - before < 40_000  # bytes; 300 visits that were kept would be more


numbers = st.integers(0, 9)


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
    here = there - coming

    def total(shards: set[int]) -> int:
        return sum(sizes[number] for number in shards)

    plan = make_plan(need, here, coming, sizes, room, tidy)
    assert plan.keep == set(need[: len(plan.keep)])
    assert total(plan.keep) <= room
    if len(plan.keep) < len(need):
        assert total(plan.keep) + sizes[need[len(plan.keep)]] > room
    assert set(plan.evict) <= here - plan.keep
    assert set(plan.fetch) <= plan.keep - here - coming
    if plan.fetch:
        assert total((here - set(plan.evict)) | coming | set(plan.fetch)) <= room
    elif not coming:
        assert plan.keep <= here
    if tidy:
        assert here - set(plan.evict) <= set(need)
