"""Files that appear whole or not at all, folders that one job at a time writes into."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

from filelock import FileLock, Timeout
from pydantic import AfterValidator

from .errors import BadInput, say

Item = TypeVar("Item")
Result = TypeVar("Result")

PARTIAL = ".partial-"  # begins the name of what is not yet whole
LOCK = "job.lock"  # names the file in a folder that the job at work there has locked
_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # file systems say


def _stay_inside(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError("it leads out of its folder: give a name inside it")
    return name


def be_plain(name: str) -> str:
    """A stranger's name of a file or folder, if it leads nowhere else; ValueError where it does."""
    if "/" in _stay_inside(name) or name == ".":
        raise ValueError("it leads into another folder: give a plain name")
    return name


# Types of the names that records give, for Annotated: paths below a folder, and names in it.
INSIDE, PLAIN = AfterValidator(_stay_inside), AfterValidator(be_plain)


def locate(root: str) -> str:
    """What a record says of a place: a URL without its secrets, a folder by its whole path."""
    return hide_secrets(root) if "://" in root else str(Path(root).resolve())


def hide_secrets(text: str) -> str:
    """`text` without the user names, passwords and queries of the URLs in it."""
    return re.sub(r"\?[^\s'\")]*", "", re.sub(r"://[^/\s]*@", "://", text))


@contextlib.contextmanager
def hold(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Be the one job that writes into a folder, for as long as this lasts.

    It locks a file there, since network file systems do not lock folders. On a file system without
    locks it keeps nobody out, and says so.

    `patience` is how many seconds to wait for the other job; a lost node's lock outlives it.

    Raises:
        BadInput: another job is at work there.
    """
    path = folder / LOCK
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock outlives a killed job for ever
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if patience > 0:
                said = f"another job writes into {folder}: waiting {patience:g} s for it"
                say(said)
            lock.acquire(timeout=patience, poll_interval=min(1.0, patience or 1.0))
    except Timeout:
        raise BadInput(f"another job writes into {folder}: let it end first") from None
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
        said = f"{folder} lies where files cannot be locked: let no other job write there"
        say(said)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is unlocked, so that nobody holds it meanwhile
        lock.release()


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
    """A place to write a file or folder; it appears at `path`, flushed, if nothing is raised."""
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
    """`map` by threads, which stop when the caller does; `at_once` bounds the results that wait."""
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(threads)
    try:
        for first in range(0, len(items), at_once):
            yield from pool.map(function, items[first : first + at_once])
    finally:
        pool.shutdown(cancel_futures=True)
