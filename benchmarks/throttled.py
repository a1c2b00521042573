"""The server that `benchmarks.data` reads from: HTTP, at a fixed number of bytes per second."""

from __future__ import annotations

import contextlib
import http.server
import math
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from vidfill.data.shards.reading import ShardedDataset
from vidfill.data.shards.stream import Stream
from vidfill.data.storage.store import CacheConfig

from .readers import BATCH, SPLIT

PIECE = 256 << 10  # bytes sent at a time
BURST = 0.02  # seconds' worth of bytes that may be sent at once after a pause


class Budget:
    """A limit in bytes per second for all connections together."""

    def __init__(self, rate: float) -> None:
        self._rate, self._spent = rate, 0.0  # bytes per second; time until which all is spent
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Wait until `count` more bytes may be sent."""
        with self._lock:
            now = time.monotonic()
            self._spent = max(self._spent, now - BURST) + count / self._rate
            delay = self._spent - now
        time.sleep(max(delay, 0))


class Handler(http.server.BaseHTTPRequestHandler):
    """Files of a folder, and ranges of them."""

    protocol_version = "HTTP/1.1"
    folder: Path
    budget: Budget

    def do_GET(self) -> None:
        try:
            file = (self.folder / self.path.lstrip("/")).open("rb")
        except FileNotFoundError:
            self.send_error(404)
            return
        with file:
            size = os.fstat(file.fileno()).st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = (int(asked[1]), min(int(asked[2]), size - 1)) if asked else (0, size - 1)
            if first >= size:
                self.send_error(416)
                return
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(last + 1 - first))
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.end_headers()
            self._send(file.fileno(), first, last + 1)

    def _send(self, file: int, start: int, end: int) -> None:
        while start < end:
            count = min(PIECE, end - start)
            self.budget.take(count)
            start += os.sendfile(self.connection.fileno(), file, start, count)

    def log_message(self, *message: object) -> None:
        """Say nothing."""


class Server(http.server.ThreadingHTTPServer):
    """A server that does not report clients that disconnect."""

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def run_server(folder: Path, rate: float, port: Connection) -> None:
    """Serve `folder` at `rate` bytes per second until the process is ended; send the port."""
    handler = type("Handler", (Handler,), {"folder": folder, "budget": Budget(rate)})
    with Server(("127.0.0.1", 0), handler) as server:
        port.send(server.server_port)
        server.serve_forever()


@contextlib.contextmanager
def serve(folder: Path, rate: float) -> Iterator[str]:
    """The URL of `folder`, served by a process of its own."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    server = context.Process(target=run_server, args=(folder, rate, there), daemon=True)
    server.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        server.terminate()
        server.join()


class Waits(NamedTuple):
    """How long a loop over batches from the server waited; seconds."""

    first_batch: float  # from opening the dataset
    elapsed: float  # after the first batch
    waited: float  # part of elapsed
    examples: int  # delivered in it
    processor: float  # processor seconds of this process in it


def consume(url: str, cache: CacheConfig, rate: float, seconds: float) -> Waits:
    """Take batches for `seconds`, and work on each for as long as `rate` allows.

    Args:
        url: Of the dataset.
        cache: Where its shards are kept.
        rate: Examples per second.
        seconds: From the first batch on.
    """
    began = time.perf_counter()
    stream = Stream(ShardedDataset(url, SPLIT, cache), BATCH, seed=0)
    with contextlib.closing(stream.run(0)) as batches:
        next(batches)
        first, waited, processor = time.perf_counter(), stream.waited, time.process_time()
        steps = math.ceil(seconds * rate / BATCH)
        for _ in range(steps):
            time.sleep(BATCH / rate)
            next(batches)
        return Waits(
            first_batch=first - began,
            elapsed=time.perf_counter() - first,
            waited=stream.waited - waited,
            examples=steps * BATCH,
            processor=time.process_time() - processor,
        )
