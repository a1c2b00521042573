"""A server that counts, and caches that fetch from it."""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import http.server
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from vidfill.data.shards.format import ShardTable
from vidfill.data.storage import folder
from vidfill.data.storage.cache import NodeCache
from vidfill.data.storage.names import index_name, shard_name
from vidfill.data.storage.transfer import Remote

SIZE = 20_000  # bytes of a shard
BUSY = 503


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder of splits, and counts."""

    daemon_threads = True
    size = SIZE

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: collections.Counter[str] = collections.Counter()  # by the file's name
        self.busy = False
        self.seconds = 0.0  # that an answer takes
        self._counting = threading.Lock()

    def put(self, count: int, size: int = SIZE, split: str = "train") -> ShardTable:
        """Serve shards of noise."""
        (self.folder / split).mkdir(exist_ok=True)
        digests = []
        for number in range(count):
            content = np.random.default_rng(number).bytes(size)
            digests.append(hashlib.sha256(content).hexdigest())
            (self.folder / split / shard_name(number)).write_bytes(content)
            (self.folder / split / index_name(number)).write_text(
                json.dumps({"sha256": digests[-1]})
            )
        return ShardTable((1,) * count, (size,) * count, tuple(digests))

    def gave(self, shard: Path) -> bool:
        """Whether a shard and the index beside it are those of the split "train"."""
        names = shard.name, index_name(int(shard.stem.removeprefix("shard-")))
        served = [(self.folder / "train" / name).read_bytes() for name in names]
        return served == [shard.with_name(name).read_bytes() for name in names]

    def shards_asked(self) -> dict[str, int]:
        return {name: count for name, count in self.asked.items() if name.endswith(".tar")}

    def count(self, path: str) -> None:
        with self._counting:
            self.asked[path.rpartition("/")[2]] += 1


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


@pytest.fixture
def make_cache(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., NodeCache]]:
    """A cache of the server's split "train", as one process of the node has it."""
    made = []
    monkeypatch.setattr(folder, "PATIENCE", 0.3)
    monkeypatch.setattr(folder, "GRACE", 0.0)

    def make(table: ShardTable, gigabytes: float = 0.0, process: int = 0, **settings) -> NodeCache:
        remote = Remote(server.url)
        remote.stall, remote.attempts, remote.first_pause = 5.0, settings.pop("attempts", 3), 0.01
        place = settings.pop("folder", tmp_path / "cache")
        cache = NodeCache(remote, "train", place, gigabytes, process, **settings)
        cache.expect(table)
        made.append(cache)
        return cache

    yield make
    for cache in made:
        cache.close()


@pytest.fixture(scope="session")
def bytes_in() -> Callable[[Path], int]:
    """Bytes of shards, whole or not, that lie in a folder."""

    def measure(folder: Path) -> int:
        total = 0
        for where, _, names in os.walk(folder):  # which passes over what goes meanwhile
            for name in names:
                if name.endswith(".tar"):
                    with contextlib.suppress(FileNotFoundError):
                        total += os.stat(f"{where}/{name}").st_size
        return total

    return measure
