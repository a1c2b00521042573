"""Files behind a URL, of any protocol that fsspec knows, fetched so that nothing is half there.

A file is asked for in ranges of some megabytes, which are appended to a partial file: a transfer
that broke goes on where it stopped, in this process or in a later one, and what has come is checked
as a whole at its end. Credentials come from where the protocol's library looks for them (for S3 the
environment and ~/.aws), or stand in the URL, and then no message repeats them.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import BadInput, say
from ...files import PARTIAL, hash_file, hide_secrets
from ...records import LARGEST
from ...seeding import derive_seed

LEAST_CHUNK = 256 << 10  # bytes
LONGEST_PAUSE = 30.0  # seconds

# Of the statuses 4xx those that pass; as 400 aiohttp reports an answer that was garbled.
_PASSING = (400, 408, 425, 429)


class GaveUp(BadInput):
    """A file could not come now: the server, the network or a full disk; it may later."""


class WrongFile(BadInput):
    """The server has no such file, or another than the manifest says."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(
            f"{where} {reason}: put there what was encoded with its manifest, or encode again"
        )
        self.reason = reason


class Stopped(Exception):
    """Raised by a transfer whose `stop` was set."""


def is_remote(root: str) -> bool:
    """Whether `root` is a URL, and not one of this machine's files."""
    protocol, separator, _ = root.partition("://")
    return bool(separator) and protocol not in ("file", "local")


class Remote:
    """A folder behind a URL. Threads may share it."""

    chunk = 8 << 20  # bytes asked for at a time; fewer where a connection does not last so long
    # Seconds that a chunk may take; protocols without asynchronous requests (such as sftp) have
    # their library's own limits.
    stall = 30.0
    attempts = 9  # in a row without a byte; with the pauses between them about two minutes
    first_pause = 1.0  # seconds; the pauses double

    def __init__(self, root: str) -> None:
        """Nothing is asked of the server yet; a query in `root` is given to every file.

        Raises:
            BadInput: the protocol is unknown, or its library is not installed.
        """
        self._root, self._query = root.rstrip("/"), ""
        if root.startswith(("http://", "https://")):
            self._root, question, query = root.partition("?")
            self._root, self._query = self._root.rstrip("/"), question + query
        self._open = functools.lru_cache(1)(functools.partial(_open_protocol, self._root))
        self._open(os.getpid())

    def describe(self, name: str) -> str:
        """The URL of a file as messages may show it."""
        return hide_secrets(f"{self._root}/{name}")

    def read(self, name: str, stop: threading.Event | None = None) -> bytes:
        """The content of a record's file.

        Raises:
            FileNotFoundError: there is none.
            BadInput: it cannot be had, or has more than `LARGEST` bytes; one line says why.
            Stopped: `stop` was set.
        """
        content = bytearray()
        try:
            for offset, piece in self._pieces(name, 0, LARGEST + 1, stop):
                # A server that knows no ranges sends a file of just a chunk's length twice.
                if offset == len(piece) and piece == content:
                    break
                content[offset:] = piece
        except WrongFile:
            raise FileNotFoundError(
                errno.ENOENT, os.strerror(errno.ENOENT), self.describe(name)
            ) from None
        if len(content) > LARGEST:
            where = self.describe(name)
            raise BadInput(f"{where} has more than {LARGEST >> 20} MiB: see that the URL is right")
        return bytes(content)

    def fetch(
        self, name: str, to: Path, size: int, sha256: str, stop: threading.Event | None = None
    ) -> None:
        """Bring a file to `to`, where it appears whole or not at all.

        What has come lies beside `to` until then, and the next call goes on behind it. Nothing is
        flushed to the disk: what is kept this way can be fetched again.

        Raises:
            WrongFile: there is none, or twice something else came.
            GaveUp: the server or the network failed too often in a row.
            BadInput: the server refuses it.
            OSError: it cannot be written here.
            Stopped: `stop` was set.
        """
        partial = to.with_name(PARTIAL + to.name)
        for _ in range(2):
            self._append(name, partial, size, stop)
            if partial.stat().st_size == size and hash_file(partial) == sha256:
                os.replace(partial, to)
                return
            partial.unlink()  # damaged on its way, or begun from another file
        raise WrongFile(self.describe(name), "has another size or SHA-256 than its manifest says")

    def folders_with(self, name: str) -> list[str]:
        """The folders here that hold a file `name`; empty where the server does not list."""
        try:
            listed = self._call("ls", self._locate(""), detail=False)
            folders = {hide_secrets(entry).rstrip("/").rpartition("/")[2] for entry in listed}
            return sorted(f for f in folders if self._call("exists", self._locate(f"{f}/{name}")))
        except Exception:  # a listing is a help in a message, and no server owes one
            return []

    def _append(self, name: str, partial: Path, size: int, stop: threading.Event | None) -> None:
        """Add to a partial file what is missing, up to `size` or to where the file ends."""
        with partial.open("ab") as file:
            if file.tell() > size:
                file.truncate(0)
            for offset, piece in self._pieces(name, os.fstat(file.fileno()).st_size, size, stop):
                file.truncate(offset)
                file.write(piece)
                file.flush()

    def _pieces(
        self, name: str, start: int, size: int, stop: threading.Event | None
    ) -> Iterator[tuple[int, bytes]]:
        """Offset and content of what lies from `start` to `size`, or to the file's end.

        Offset 0 comes again where a server that knows no ranges sends the whole file, of which
        one byte more than `size` is read.
        """
        chunk, failures = self.chunk, 0
        while start < size:
            asked = min(chunk, size - start)
            if stop and stop.is_set():
                raise Stopped
            try:
                piece = self._request(name, start, asked, size + 1)
            except Exception as error:
                failures += 1
                self._judge(error, name, failures)
                if _status(error) is None:  # cut, or too slow for so much
                    chunk = max(chunk // 4, min(chunk, LEAST_CHUNK))
                self._pause(name, failures, stop)
                continue
            failures, chunk = 0, min(2 * chunk, self.chunk)
            if len(piece) > asked:
                yield 0, piece
                return
            if piece:
                yield start, piece
            if len(piece) < asked:
                return
            start += len(piece)

    def _request(self, name: str, start: int, length: int, most: int) -> bytes:
        """Bytes of a file from `start` on; fewer, or none, where it ends before.

        A server that knows no ranges sends the file from its begin on, of which `most` are read.
        """
        from fsspec.asyn import sync

        files, _ = self._open(os.getpid())
        where, end = self._locate(name), start + length
        try:
            if "https" in files.protocol:
                return sync(files.loop, _get, files, where, start, end, most, timeout=self.stall)
            return self._call("cat_file", where, start=start, end=end)
        except Exception as error:
            if _status(error) == 416:
                return b""
            raise

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        from fsspec.asyn import sync

        files, _ = self._open(os.getpid())
        if not files.async_impl:
            return getattr(files, method)(*args, **kwargs)
        return sync(files.loop, getattr(files, f"_{method}"), *args, timeout=self.stall, **kwargs)

    def _locate(self, name: str) -> str:
        return f"{self._open(os.getpid())[1]}/{name}{self._query}"

    def _judge(self, error: Exception, name: str, failures: int) -> None:
        """Raise what ends the transfer; return where another attempt may help."""
        where, status = self.describe(name), _status(error)
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            raise WrongFile(where, "is not there") from None
        said = f"{where}: {self._describe_error(error)}"
        # botocore has a class of its own for each way in which credentials can be missing.
        named = "Credential" in type(error).__name__
        if named or isinstance(error, PermissionError) or status in (401, 403):
            raise BadInput(f"{said}: give credentials that may read it") from None
        wrong = status is not None and 400 <= status < 500 and status not in _PASSING
        if wrong or isinstance(error, ValueError) or _is_astray(error):
            raise BadInput(f"{said}: see that the URL is right") from None
        if failures >= self.attempts:
            raise GaveUp(
                f"{said}; given up after {failures} attempts: see that the server can be reached, "
                "the same command continues"
            ) from None
        if failures == 3:
            say(f"{said}; attempt 4 of {self.attempts} follows")

    def _describe_error(self, error: Exception) -> str:
        from fsspec.exceptions import FSTimeoutError

        if isinstance(error, FSTimeoutError):
            return f"no answer within {self.stall:g} s"
        kind, text = type(error).__name__, str(error)
        if status := _status(error):
            kind, text = f"HTTP {status}", str(getattr(error, "message", ""))
        line = hide_secrets(text).partition("\n")[0]
        return f"{kind} {line}".rstrip()

    def _pause(self, name: str, failures: int, stop: threading.Event | None) -> None:
        """Wait longer after each failure, and not as long as the other nodes do."""
        longest = min(self.first_pause * 2 ** (failures - 1), LONGEST_PAUSE)
        draw = derive_seed(socket.gethostname(), os.getpid(), name, failures) / 2**63
        (stop or threading.Event()).wait(longest * (1 + draw) / 2)


def _open_protocol(root: str, process: int) -> tuple[Any, str]:
    """The file system of a URL for one process, and the URL as that wants it.

    A fork takes along neither the thread of the requests nor the right to use its sockets.
    """
    import fsspec

    protocol = root.partition("://")[0].rpartition("::")[2]
    # A server that compresses would count its ranges in compressed bytes.
    options = {"headers": {"Accept-Encoding": "identity"}} if protocol in ("http", "https") else {}
    try:
        return fsspec.core.url_to_fs(root, skip_instance_cache=True, **options)
    except ImportError as error:
        library = getattr(error.__cause__, "name", None) or protocol
        problem = f"needs a library: pip install {library}"
    except ValueError:
        problem = "is no protocol that fsspec knows"
    raise BadInput(f"{hide_secrets(root)}: {protocol}:// {problem}")


async def _get(files: Any, url: str, start: int, end: int, most: int) -> bytes:
    """Bytes `start` to `end` of a file over HTTP; `most` of what a server sends without ranges."""
    session = await files.set_session()
    options = dict(files.kwargs)
    options["headers"] = {**options.get("headers", {}), "Range": f"bytes={start}-{end - 1}"}
    content = bytearray()
    async with session.get(files.encode_url(url), **options) as answer:
        answer.raise_for_status()
        async for piece in answer.content.iter_any():
            content += piece
            if len(content) >= most:
                break
    return bytes(content[:most])


def _is_astray(error: Exception) -> bool:
    """Whether a server sends to places where no file can be had: file://, or round in circles."""
    import aiohttp

    astray = (aiohttp.RedirectClientError, aiohttp.NonHttpUrlClientError, aiohttp.TooManyRedirects)
    return isinstance(error, astray)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error stands for."""
    for name in ("status", "code"):  # aiohttp's, gcsfs's
        if isinstance(value := getattr(error, name, None), int):
            return value if 400 <= value < 600 else None
    cause = error.__cause__ or error
    response = getattr(cause, "response", None)  # botocore's
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None
