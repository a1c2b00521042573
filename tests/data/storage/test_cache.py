"""The cache of a node, filled from a real server as its processes ask for shards."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vidfill.data.shards.format import DamagedShard, Example
from vidfill.data.shards.reading import ShardedDataset
from vidfill.data.shards.stream import Stream
from vidfill.data.storage.cache import NodeCache
from vidfill.data.storage.follower import ShardUse
from vidfill.data.storage.names import MANIFEST, index_name, shard_name
from vidfill.data.storage.store import CacheConfig, LocalStore, open_store
from vidfill.data.storage.transfer import GaveUp, Remote, Stopped, WrongFile
from vidfill.errors import BadInput

Server = Any  # of conftest.py
MakeCache = Callable[..., NodeCache]


# Which store


def test_a_folder_is_read_in_place(server: Server) -> None:
    server.put(1)
    root = server.folder
    (root / "train" / MANIFEST).write_text("{}")
    for named in (root, str(root), f"file://{root}"):
        store = open_store(named, "train", CacheConfig())
        assert isinstance(store, LocalStore)
        assert store.read(MANIFEST) == b"{}"
        assert store.path(0) == root / "train" / shard_name(0)
        assert store.splits() == ["train"]


def test_the_splits_are_found_where_the_server_lists_them(server: Server, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        server.put(1, split=split)
        (server.folder / split / MANIFEST).write_text("{}")
    (server.folder / "other").mkdir()
    store = open_store(server.url, "test", CacheConfig(str(tmp_path / "cache")))
    assert store.splits() == ["train", "validation"]
    with pytest.raises(FileNotFoundError):
        store.read(MANIFEST)


def test_the_folder_of_a_job_is_private_and_goes_when_the_job_is_over(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = server.put(1)
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
    server: Server, tmp_path: Path, make_cache: MakeCache
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(BadInput, match="written by others"):
        make_cache(server.put(1), folder=tmp_path / "open")


# What is fetched


def test_a_shard_is_fetched_once_however_many_ask_for_it(
    server: Server, make_cache: MakeCache
) -> None:
    table = server.put(3)
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
    assert len(got) == 12 and all(map(server.gave, got))
    assert set(server.asked.values()) == {1}
    assert not list(caches[0].folder.path.glob(".lock-*"))


def test_random_reading_stays_in_its_bound(
    server: Server, tmp_path: Path, make_cache: MakeCache, bytes_in: Callable[[Path], int]
) -> None:
    table = server.put(6)
    cache = make_cache(table, gigabytes=3.5 * server.size / 1e9)
    for number in [0, 1, 2, 3, 4, 5, 4, 3, 5, 0, 1]:
        path = cache.path(number)
        assert server.gave(path)
        os.utime(path.parent, ns=(time.monotonic_ns(),) * 2)  # in their order, whatever the clock
        assert bytes_in(tmp_path / "cache") <= 3 * server.size
    assert server.shards_asked() == {shard_name(n): 2 if n < 2 else 1 for n in range(6)}
    with pytest.raises(BadInput, match=r"gigabytes is 1e-06, and 2e-05 GB"):
        make_cache(table, gigabytes=1e-6, folder=tmp_path / "other").path(0)


def test_what_is_there_is_not_fetched_again_unless_it_lost_its_end(
    server: Server, make_cache: MakeCache
) -> None:
    table = server.put(2)
    paths = [make_cache(table).path(number) for number in range(2)]
    os.truncate(paths[1], server.size - 1)
    again = make_cache(table)
    assert all(server.gave(again.path(number)) for number in range(2))
    assert server.shards_asked() == {shard_name(0): 1, shard_name(1): 2}


def test_a_dataset_that_was_encoded_again_does_not_mix_with_the_old_one(
    server: Server, make_cache: MakeCache
) -> None:
    make_cache(server.put(2)).path(0)
    cache = make_cache(server.put(2, size=server.size + 1))
    assert server.gave(cache.path(0))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_shard_that_was_changed_on_the_server_is_not_kept(
    server: Server, make_cache: MakeCache, bytes_in: Callable[[Path], int], ahead: bool
) -> None:
    table = server.put(3)
    (server.folder / "train" / shard_name(0)).write_bytes(bytes(server.size))
    (server.folder / "train" / index_name(1)).write_text("[" * 100_000)
    (server.folder / "train" / shard_name(2)).unlink()
    cache = make_cache(table)
    if ahead:
        cache.follow(iter([ShardUse(number, number, 10) for number in range(3)]))
    for number, reason in enumerate(["than its manifest says", "not the index", "not there"]):
        with pytest.raises(WrongFile, match=reason) as caught:
            cache.path(number)
        assert "\n" not in str(caught.value)
    cache.close()
    assert bytes_in(cache.folder.path) == 0


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


def test_who_waits_is_let_go_when_the_cache_is_closed(
    server: Server, make_cache: MakeCache
) -> None:
    server.busy = True
    cache = make_cache(server.put(1), attempts=10**6)
    for begin in (lambda: None, lambda: cache.follow(iter([]))):
        begin()
        threading.Timer(0.01, cache.close).start()
        with pytest.raises(Stopped):
            cache.path(0)


def test_a_small_disk_is_enough_and_a_full_one_is_one_line(
    server: Server, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = server.put(6)
    disk = 2.5 * server.size
    cache = make_cache(table)
    folder = cache.folder

    def disk_usage(path: Path) -> Any:
        return namedtuple("usage", "free")(int(disk - folder.size(folder.contents().whole)))

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    for number in range(6):
        assert server.gave(cache.path(number))
        assert len(folder.contents().whole) <= 2
    disk = 0.5 * server.size
    with pytest.raises(BadInput, match=r"has room for 1e-05 GB, and .* are read at once"):
        cache.path(0)
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Remote, "fetch", full)
    with pytest.raises(GaveUp, match=r"full: shard-000000\.tar of 2e-05 GB"):
        cache.path(0)


READER = """
import sys
from vidfill.data.storage.store import CacheConfig
from vidfill.data.shards.reading import ShardedDataset
from vidfill.data.shards.stream import Stream
import os
from torch import distributed
url, folder, steps, rank = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(os.environ["LOCAL_RANK"])
distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
dataset = ShardedDataset(url, "train", CacheConfig(folder))
stream = Stream(dataset, 5, seed=3, process=rank, processes=2)
for k, batch in zip(range(steps), stream.run(0, workers=2)):
    print(",".join(batch.keys), float(batch.latents.double().sum()), flush=True)
    distributed.barrier()  # as each step of training waits for all gradients
"""


@pytest.mark.slow
def test_two_processes_of_a_node_in_lockstep_fetch_each_shard_once_an_epoch(
    server: Server, tmp_path: Path, write_dataset: Callable[..., list]
) -> None:
    sizes, epochs = [6, 5, 7, 6, 8, 6, 7, 5], 2
    write_dataset(server.folder, sizes, lanes=(2, 12))
    steps = epochs * sum(sizes) // 5
    (tmp_path / "cache").mkdir(mode=0o700)
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
    assert max(counts.values()) <= epochs + 1  # the readers are ahead, in a third epoch
