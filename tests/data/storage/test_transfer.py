"""Transfers from real servers, over a connection that breaks in every way."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import http.server
import itertools
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from vidfill.data.storage.transfer import GaveUp, Remote, Stopped, WrongFile
from vidfill.errors import BadInput
from vidfill.files import PARTIAL, hide_secrets
from vidfill.records import LARGEST

SIZE = 1_000_000
NAME = "shard-000000.tar"
CONTENT = np.random.default_rng(0).bytes(SIZE)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
QUICK = {"chunk": 1 << 18, "stall": 0.4, "attempts": 4, "first_pause": 0.01}

CONFIGURATION = """
{user}daemon off;
worker_processes 1;
pid {scratch}/nginx.pid;
error_log {scratch}/error.log;
events {{}}
http {{
    access_log {scratch}/access.log;
    client_body_temp_path {scratch}/body;
    proxy_temp_path {scratch}/proxy;
    fastcgi_temp_path {scratch}/fastcgi;
    uwsgi_temp_path {scratch}/uwsgi;
    scgi_temp_path {scratch}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {folder};
        location /slow/ {{ alias {folder}/; limit_rate 1m; }}
        location /busy/ {{ return 503; }}
        location /secret/ {{ return 403; }}
        location /unranged/ {{ alias {folder}/; max_ranges 0; }}
    }}
}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server serves."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def port(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """An nginx on this machine."""
    if NGINX is None:
        pytest.skip("needs nginx")
    scratch = tmp_path_factory.mktemp("nginx")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    user = "user root;\n" if os.getuid() == 0 else ""  # else nobody, who may not look here
    (scratch / "nginx.conf").write_text(
        CONFIGURATION.format(user=user, scratch=scratch, folder=folder, port=port)
    )
    command = [NGINX, "-e", "stderr", "-p", str(scratch), "-c", str(scratch / "nginx.conf")]
    server = subprocess.Popen(command)
    try:
        while not (scratch / "nginx.pid").exists():  # written when it listens
            assert server.poll() is None, "nginx did not start"
            time.sleep(0.02)
        yield port
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(autouse=True)
def file(folder: Path) -> Path:
    """The file that is fetched, as it should be."""
    file = folder / NAME
    file.write_bytes(CONTENT)
    return file


Fault = Callable[[bytes], bytes | None]  # what the client sees of what the server sends; None: end


class Proxy:
    """A TCP proxy in front of a server, each of whose connections has the next of `faults`."""

    def __init__(self, port: int, faults: Iterator[Callable[[], Fault]]) -> None:
        self._server, self._faults = port, faults
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.sent = 0  # bytes to clients
        self.connections = 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                self.connections += 1
                self._open.append(client)
                threading.Thread(target=self._serve, args=(client, next(self._faults)())).start()

    def _serve(self, client: socket.socket, fault: Fault) -> None:
        with (
            client,
            socket.create_connection(("127.0.0.1", self._server)) as server,
            contextlib.suppress(OSError),
        ):
            while True:
                for end in select.select([client, server], [], [])[0]:
                    data = end.recv(1 << 16)
                    if end is client:
                        if not data:
                            return
                        server.sendall(data)
                        continue
                    seen = fault(data) if data else None
                    if seen is None:
                        return
                    client.sendall(seen)
                    self.sent += len(seen)

    def close(self) -> None:
        for end in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def proxy(port: int) -> Iterator[Callable[..., Proxy]]:
    """Put a proxy with these faults, then none, before the server."""
    made: list[Proxy] = []

    def make(*faults: Callable[[], Fault], forever: bool = False) -> Proxy:
        rest = itertools.repeat(faults[-1] if forever else unharmed)
        made.append(Proxy(port, itertools.chain(faults, rest)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def unharmed() -> Fault:
    return lambda data: data


def cut_after(count: int, rest: bytes | None = None) -> Callable[[], Fault]:
    """Let so many bytes through; then close the connection, or send `rest` in place of more."""

    def connect() -> Fault:
        left = count

        def see(data: bytes) -> bytes | None:
            nonlocal left
            left -= len(data)
            return data if left > 0 else rest

        return see

    return connect


def stall_after(count: int) -> Callable[[], Fault]:
    return cut_after(count, rest=b"")


def answer_503() -> Fault:
    answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    answers = iter([answer])
    return lambda data: next(answers, None)


def flip_a_bit() -> Fault:
    """Change the last byte of the first 100 kB that are sent, or a little later."""
    left = [100_000]

    def see(data: bytes) -> bytes:
        before, left[0] = left[0], left[0] - len(data)
        return data[:-1] + bytes([data[-1] ^ 1]) if before > 0 >= left[0] else data

    return see


def connect(url: str, **settings: object) -> Remote:
    remote = Remote(url)
    vars(remote).update({**QUICK, **settings})
    return remote


def fetch(url: str, to: Path, **settings: object) -> None:
    connect(url, **settings).fetch(NAME, to, SIZE, SHA256)


def url_of(port: int, path: str = "") -> str:
    return f"http://127.0.0.1:{port}{path}"


def refuse(url: str, to: Path, kind: type[BadInput]) -> str:
    """The one line that a transfer ends with; nothing of it may look whole."""
    with pytest.raises(kind) as caught:
        fetch(url, to)
    assert type(caught.value) is kind
    assert not to.exists()
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.slow
def test_a_file_comes_whole_in_pieces_of_any_size(port: int, tmp_path: Path) -> None:
    for chunk in (SIZE // 7, SIZE, 2 * SIZE):
        to = tmp_path / f"{chunk}"
        fetch(url_of(port), to, chunk=chunk)
        assert to.read_bytes() == CONTENT
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_a_small_file_is_read_at_once_and_a_large_one_in_pieces(port: int, folder: Path) -> None:
    remote = connect(url_of(port))
    for size in (0, 1, QUICK["chunk"] - 1, QUICK["chunk"], QUICK["chunk"] + 1, SIZE):
        (folder / "manifest.json").write_bytes(CONTENT[:size])
        assert remote.read("manifest.json") == CONTENT[:size]


@pytest.mark.slow
def test_a_cut_connection_costs_less_than_a_second_transfer(
    proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    between = proxy(*[cut_after(300_000)] * 3)
    fetch(url_of(between.port), tmp_path / "a", chunk=1 << 17)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert between.connections == 4
    assert between.sent < 2 * SIZE


@pytest.mark.slow
def test_connections_that_always_break_still_bring_a_file_as_long_as_something_comes(
    proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    between = proxy(cut_after(400_000), forever=True)
    fetch(url_of(between.port), tmp_path / "a", chunk=SIZE, attempts=3)
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.slow
def test_what_passes_is_waited_for(proxy: Callable[..., Proxy], tmp_path: Path) -> None:
    for name, fault in {"503": answer_503, "stall": stall_after(1000)}.items():
        fetch(url_of(proxy(fault, fault).port), tmp_path / name)
        assert (tmp_path / name).read_bytes() == CONTENT


@pytest.mark.slow
def test_what_does_not_pass_is_given_up_in_one_line_that_says_what_it_was(
    proxy: Callable[..., Proxy], port: int, tmp_path: Path
) -> None:
    to = tmp_path / "a"
    line = refuse(url_of(port, "/busy"), to, GaveUp)
    assert f"{url_of(port, '/busy')}/{NAME}: HTTP 503" in line
    assert "4 attempts" in line
    stalled = proxy(stall_after(1000), forever=True)
    assert "no answer within 0.4 s" in refuse(url_of(stalled.port), to, GaveUp)
    cut = proxy(cut_after(1000), forever=True)
    assert "4 attempts" in refuse(url_of(cut.port), to, GaveUp)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = free.getsockname()[1]
    assert "ClientConnectorError" in refuse(url_of(nobody), to, GaveUp)
    assert "4 attempts" in refuse("http://no-such-host.invalid", to, GaveUp)


@pytest.mark.slow
def test_what_is_refused_or_missing_is_not_asked_for_again(
    proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    between, to = proxy(), tmp_path / "a"
    assert "HTTP 403" in refuse(url_of(between.port, "/secret"), to, BadInput)
    assert "is not there" in refuse(url_of(between.port, "/elsewhere"), to, WrongFile)
    assert between.connections == 2
    remote = Remote(url_of(between.port))
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        remote.read("none/manifest.json")


@pytest.mark.slow
def test_a_byte_that_was_changed_on_its_way_is_fetched_again(
    proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    fetch(url_of(proxy(flip_a_bit).port), tmp_path / "a", chunk=SIZE)
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-1],
        lambda content: content[: SIZE // 3],
        lambda content: b"",
        lambda content: content + b"more" * SIZE,
        lambda content: bytes([content[0] ^ 1]) + content[1:],
    ],
    ids=["a byte short", "cut off", "empty", "longer", "a bit flipped"],
)
@pytest.mark.parametrize("path", ["", "/unranged"])
def test_another_file_than_the_manifests_leaves_nothing(
    port: int, file: Path, tmp_path: Path, change: Callable[[bytes], bytes], path: str
) -> None:
    changed = change(CONTENT)
    file.write_bytes(changed)
    if len(changed) > SIZE and not path:
        file.write_bytes(changed[1:])  # ranges end where the manifest does
    line = refuse(url_of(port, path), tmp_path / "a", WrongFile)
    assert "than its manifest says" in line
    assert not list(tmp_path.iterdir())


def test_a_server_that_knows_no_ranges_is_no_harm(folder: Path, tmp_path: Path) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = url_of(server.server_address[1])
        for chunk in (SIZE // 2, SIZE - 1, SIZE, SIZE + 1):
            (tmp_path / f"{PARTIAL}a").write_bytes(CONTENT[: SIZE // 3])
            fetch(url, tmp_path / "a", chunk=chunk)
            assert (tmp_path / "a").read_bytes() == CONTENT
            assert connect(url, chunk=chunk).read(NAME) == CONTENT
        server.shutdown()


@pytest.mark.slow
def test_what_a_killed_process_fetched_is_not_fetched_again(
    port: int, proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    to = tmp_path / "a"
    partial = tmp_path / f"{PARTIAL}a"
    script = f"""
import pathlib
from vidfill.data.storage.transfer import Remote
remote = Remote({url_of(port, "/slow")!r})
remote.chunk = 1 << 16
remote.fetch({NAME!r}, pathlib.Path({str(to)!r}), {SIZE}, {SHA256!r})
"""
    killed = subprocess.Popen([sys.executable, "-c", script])
    while not partial.exists() or partial.stat().st_size < SIZE // 3:
        assert killed.poll() is None
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not to.exists()
    came = partial.stat().st_size
    between = proxy()
    fetch(url_of(between.port), to)
    assert to.read_bytes() == CONTENT
    assert between.sent < SIZE - came + 10_000


@pytest.mark.slow
def test_a_partial_file_of_something_else_is_begun_anew(port: int, tmp_path: Path) -> None:
    for other in (b"other" * 100, b"x" * SIZE, b"y" * (2 * SIZE)):
        (tmp_path / f"{PARTIAL}a").write_bytes(other)
        fetch(url_of(port), tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.slow
def test_a_transfer_can_be_stopped(proxy: Callable[..., Proxy], port: int, tmp_path: Path) -> None:
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    remote = connect(url_of(port, "/busy"), attempts=100, first_pause=10.0)
    began = time.monotonic()
    with pytest.raises(Stopped):
        remote.fetch(NAME, tmp_path / "a", SIZE, SHA256, stop)
    assert time.monotonic() - began < 5


@pytest.mark.slow
def test_a_full_disk_is_one_error_that_is_no_fault_of_the_server(port: int, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with pytest.raises(OSError, match="No space left"):
            fetch(url_of(port), small / "a")
        assert not (small / "a").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
def test_memory_is_a_few_chunks_however_large_the_file(
    port: int, file: Path, tmp_path: Path
) -> None:
    content = CONTENT * 20
    file.write_bytes(content)
    remote = connect(url_of(port), chunk=1 << 19)
    remote.read(NAME)  # what is imported and kept once
    tracemalloc.start()
    remote.fetch(NAME, tmp_path / "a", len(content), hashlib.sha256(content).hexdigest())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


@pytest.mark.slow
def test_no_message_repeats_credentials(port: int, tmp_path: Path) -> None:
    for url in (
        f"http://user:hunter2@127.0.0.1:{port}/busy?signature=hunter2",
        f"http://user:hunter2@127.0.0.1:{port}/secret?signature=hunter2",
        f"http://user:hunter2@127.0.0.1:{port}/none?signature=hunter2",
        "http://user:hunter2@no-such-host.invalid?signature=hunter2",
        "nonsense://user:hunter2@host/folder",
    ):
        with pytest.raises(BadInput) as caught:
            connect(url).fetch(NAME, tmp_path / "a", SIZE, SHA256)
        assert "hunter2" not in str(caught.value)
    assert hide_secrets("(GET 's3://k:s@b/x?y=1') failed") == "(GET 's3://b/x') failed"


@pytest.mark.slow
def test_the_query_of_a_signed_url_goes_to_every_file(port: int, tmp_path: Path) -> None:
    fetch(url_of(port) + "/?signature=abc", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT


class Hostile(http.server.BaseHTTPRequestHandler):
    """Answers each path with another malice."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        self.send_response(302 if kind in ("file", "circle") else 206 if kind == "ranged" else 200)
        if kind == "file":
            self.send_header("Location", "file:///etc/passwd")
        if kind == "circle":
            self.send_header("Location", self.path)
        if kind == "gzip":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        piece = gzip.compress(bytes(2**24)) if kind == "gzip" else bytes(2**20)
        with contextlib.suppress(OSError):  # the client has heard enough
            while kind in ("endless", "gzip", "ranged"):
                self.wfile.write(piece)


@pytest.fixture
def hostile() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever).start()
        yield url_of(server.server_address[1])
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("endless", "has more than 128 MiB"),
        ("ranged", "has more than 128 MiB"),
        ("gzip", "has more than 128 MiB"),
        ("file", "see that the URL is right"),
        ("circle", "see that the URL is right"),
    ],
)
def test_a_hostile_server_takes_no_memory_and_no_patience(
    hostile: str, path: str, message: str
) -> None:
    began = time.monotonic()
    tracemalloc.start()
    with pytest.raises(BadInput, match=message):
        connect(f"{hostile}/{path}", chunk=Remote.chunk, stall=30.0).read(NAME)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * LARGEST
    assert time.monotonic() - began < 20
