"""Files that appear whole or not at all and are known again, folders of one job at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from filelock import FileLock, Timeout
from pydantic import AfterValidator

from .errors import BadInput, say

Item = TypeVar("Item")
Result = TypeVar("Result")

PIECES, PIECE = 8, 2**16  # how many parts of a large file are read to know it again; bytes of each

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
    with _locked(folder / LOCK, folder, patience):
        yield


@contextlib.contextmanager
def _locked(path: Path, place: Path, patience: float = 0.0) -> Iterator[None]:
    """Lock the file `path`, which stands for a `place`; it is gone afterwards."""
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock outlives a killed job for ever
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if patience > 0:
                say(f"another job writes into {place}: waiting {patience:g} s for it")
            lock.acquire(timeout=patience, poll_interval=min(1.0, patience or 1.0))
    except Timeout:
        raise BadInput(f"another job writes into {place}: let it end first") from None
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
        say(f"{place} lies where files cannot be locked: let no other job write there")
    mine = path.stat().st_ino if path.exists() else None
    try:
        yield
    finally:
        # Before it is unlocked, so that nobody holds it meanwhile; not that of another job, which
        # may have made the folder anew.
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == mine:
                path.unlink()
        lock.release()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Fingerprint(NamedTuple):
    """What tells one or more files from others of the same names."""

    bytes: int
    times: str
    """When they were last written; "" where an older version did not record it."""
    content: str
    """A hash of what they hold; "" likewise."""


def fingerprint(files: Mapping[str, Path], known: Any = None, whole: bool = True) -> Fingerprint:
    """The fingerprint of files, by the names under which they are used.

    Files of the size and times of a `known` fingerprint are not read. Otherwise all of them is read
    or, if not `whole`, some pieces of each that is larger than these.
    """
    stats = {name: path.stat() for name, path in sorted(files.items())}
    now = seen_as((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())
    match known:  # a record may hold anything
        case [int(size), str(times), str(content)] if (size, times) == now[:2] and content:
            return Fingerprint(size, times, content)
    read = hash_file if whole else _hash_pieces
    return now._replace(content=_hash_json([[name, read(files[name])] for name in stats]))


def seen_as(files: Iterable[tuple[str, int, int]]) -> Fingerprint:
    """The fingerprint, without a content, of files: name, bytes, and nanoseconds when written."""
    listed = list(files)
    return Fingerprint(sum(size for _, size, _ in listed), _hash_json(listed), "")


def is_same(was: Fingerprint, now: Fingerprint) -> bool:
    """Whether files are those that they were, whenever they were written."""
    if was.content and now.content:
        return was.content == now.content
    return was.bytes == now.bytes and (was.times == now.times or not was.times)


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _hash_pieces(path: Path) -> str:
    """SHA-256 of a file's size and of parts of it from its beginning to its end."""
    size = path.stat().st_size
    if size <= PIECES * PIECE:
        return hash_file(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(PIECES):
            file.seek((size - PIECE) * number // (PIECES - 1))
            digest.update(file.read(PIECE))
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees all of it or none."""
    with aside(path) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def aside(path: Path, new: bool = False) -> Iterator[Path]:
    """A place to write a file or folder; it appears at `path`, flushed, if nothing is raised.

    What is `new` takes nobody's place: one job at a time writes it, and what has come to `path`
    meanwhile stays.

    Raises:
        BadInput: It is to be new, and something is there, or another job writes it.
    """
    partial = partial_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = partial.with_name(f"{partial.name}.lock")
    with _locked(lock, path) if new else contextlib.nullcontext():
        remove(partial)
        try:
            if new:
                refuse_existing(path)
            yield partial
            for file in sorted(partial.rglob("*")) if partial.is_dir() else []:
                _flush(file)
            _flush(partial)
            (_put_new if new else os.replace)(partial, path)
            _flush(path.parent)
        except BaseException:
            remove(partial)
            raise


def partial_of(path: Path) -> Path:
    """Where a file or folder is written that will be at `path`."""
    return path.with_name(PARTIAL + path.name)


def fresh_partial_of(path: Path) -> Path:
    """A place beside `path` that no other job writes."""
    return path.with_name(f"{PARTIAL}{uuid.uuid4().hex}{path.suffix}")


def refuse_existing(path: Path) -> None:
    """Raise BadInput where there is anything, a link that leads nowhere included."""
    if os.path.lexists(path):
        raise BadInput(f"{path} exists: choose another name or remove it")


def _put_new(partial: Path, path: Path) -> None:
    """Rename, but never over a file or over a folder that holds something."""
    try:
        if not partial.is_dir():
            os.link(partial, path)
            return partial.unlink()
    except FileExistsError:
        refuse_existing(path)
    except OSError:  # the file system has no links
        refuse_existing(path)
    try:
        os.rename(partial, path)
    except OSError:
        refuse_existing(path)
        raise


def write_new(path: Path, content: bytes) -> bool:
    """Write a file that is not there yet, whole or not at all; whether it was written.

    Of several processes that do so at once, one does, on file systems without locks too.
    """
    partial = fresh_partial_of(path)
    try:
        partial.write_bytes(content)
        _flush(partial)
        _put_new(partial, path)
        _flush(path.parent)
    except BadInput:
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it, if it is there; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
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
