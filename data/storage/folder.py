"""The folder of a node's cache: its entries, failures and locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from ...errors import BadInput
from ...files import PARTIAL, _is_at, _try_lock
from .transfer import GaveUp, Stopped, WrongFile

TICK = 0.02  # seconds between looks at what other processes wrote

_ENTRY = re.compile(r"(\d{6,})-[0-9a-f]{16}")
_EVICTED = PARTIAL + "evicted-"
_FAILED = ".failed-"

_FULL = (errno.ENOSPC, errno.EDQUOT)
_KINDS = {kind.__name__: kind for kind in (BadInput, GaveUp, WrongFile)}


@runtime_checkable
class Table(Protocol):
    """What a manifest says of its shards, by their numbers."""

    @property
    def bytes(self) -> tuple[int, ...]: ...

    @property
    def sha256(self) -> tuple[str, ...]: ...


def remove(folder: Path) -> None:
    """Remove a folder of the cache, or a file: at once for who looks for it, unless it is in use.

    A shard that comes is in use, one that is read is not: its file lives on until it is closed.
    """
    gone = folder.with_name(f"{_EVICTED}{os.getpid()}-{threading.get_ident()}-{folder.name}")
    with contextlib.suppress(FileNotFoundError):
        if not folder.is_dir():
            folder.unlink()
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            if _try_lock(descriptor, fcntl.LOCK_EX):
                folder.rename(gone)
                shutil.rmtree(gone)
        finally:
            os.close(descriptor)


def _number_of(name: str) -> int | None:
    found = _ENTRY.fullmatch(name)
    return int(found[1]) if found else None


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


@contextlib.contextmanager
def _lock_folder(folder: Path, stop: threading.Event) -> Iterator[None]:
    """Make a folder, and hold its lock; it may be renamed meanwhile."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process was done with it
        try:
            while not _try_lock(descriptor, fcntl.LOCK_EX):
                if stop.wait(TICK):
                    raise Stopped
            if _is_at(descriptor, folder):
                yield
                return
        finally:
            os.close(descriptor)
