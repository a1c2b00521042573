"""Files that appear whole or not at all, folders that one job at a time writes into."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from .errors import BadInput


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether what is open is what lies at `path` now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


Item = TypeVar("Item")
Result = TypeVar("Result")

PARTIAL = ".partial-"  # begins the name of what is not yet whole


def locate(root: str) -> str:
    """What a record says of a place: a URL without its secrets, a folder by its whole path."""
    return hide_secrets(root) if "://" in root else str(Path(root).resolve())


def hide_secrets(text: str) -> str:
    """`text` without the user names, passwords and queries of the URLs in it."""
    return re.sub(r"\?[^\s'\")]*", "", re.sub(r"://[^/\s]*@", "://", text))


@contextlib.contextmanager
def hold(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Be the one job that writes into a folder, for as long as this lasts.

    It holds the lock of a file there, for network file systems lock no folders, and nothing that is
    not open for writing. Those that cannot lock hold nobody up.

    Args:
        folder: It exists.
        patience: Seconds to wait for the other job's end; a lost node's lock outlives it.

    Raises:
        BadInput: another job is at work there.
    """
    path, ends = folder / "job.lock", time.monotonic() + patience
    held = _lock(path)
    if held is None and patience > 0:
        print(f"another job writes into {folder}: waiting {patience:g} s for it", file=sys.stderr)
    while held is None:
        if time.monotonic() >= ends:
            raise BadInput(f"another job writes into {folder}: let it end first")
        time.sleep(min(1.0, patience))
        held = _lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(held)


def _lock(path: Path) -> int | None:
    """The descriptor of a file that nobody else has locked; None where somebody has."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        return descriptor
    try:
        is_there = os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        is_there = False
    if is_there:
        return descriptor
    os.close(descriptor)  # of a file that its last holder has just removed
    return _lock(path)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees all of it or none."""
    with aside(path) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A place to write a file or a folder that appears at `path`, flushed, when all went well."""
    partial = path.with_name(PARTIAL + path.name)
    _remove(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        for file in sorted(partial.rglob("*")) if partial.is_dir() else []:
            _flush(file)
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int, at_once: int
) -> Generator[Result, None, None]:
    """`map`, by threads that stop at once when the caller does.

    Args:
        function: What each item goes through.
        items: Of any number.
        threads: That share them.
        at_once: Items under way, and results waiting, at most.
    """
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(threads)
    try:
        for first in range(0, len(items), at_once):
            yield from pool.map(function, items[first : first + at_once])
    finally:
        pool.shutdown(cancel_futures=True)
