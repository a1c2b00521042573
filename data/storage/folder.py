"""The folder of a node's cache, which the node's processes share.

    000012-0123456789abcdef/           shard 12 and its index; the digits begin its SHA-256
    .partial-000012-0123456789abcdef/  the same while it is fetched; its room is taken
    .lock-000012-0123456789abcdef      held by the thread that fetches it, or waits for room
    .room                              held for a moment by a thread that takes room
    .evict                             held by the process that may remove shards

A shard's folder appears by a rename, so it is whole, and its name says which content it holds: a
dataset that was encoded again never mixes with the one before it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from filelock import FileLock, Timeout
from pydantic import BaseModel

from ...errors import BadInput
from ...files import PARTIAL
from ...records import parse_json
from .names import index_name, shard_name
from .transfer import GaveUp, Remote, Stopped, WrongFile

KEPT = 64  # of the largest shards: the bound of a cache that has no size and follows no order
GRACE = 2.0  # seconds for a caller to open the shard it asked for; it is not removed before
PATIENCE = 60.0  # seconds without any progress until a cache is called too small
TICK = 0.02  # seconds between looks at what other processes did

_ENTRY = re.compile(r"(\d{6,})-[0-9a-f]{16}")
_LOCK = ".lock-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@runtime_checkable
class ShardFiles(Protocol):
    """What a manifest says of its shards' files, by the shards' numbers."""

    @property
    def bytes(self) -> tuple[int, ...]: ...

    @property
    def sha256(self) -> tuple[str, ...]: ...


class _Index(BaseModel):
    """What is looked at of a shard's index before it is opened."""

    sha256: str


class Contents(NamedTuple):
    """The numbers of the shards in a cache."""

    whole: set[int]
    coming: set[int]  # their room is taken
    asked: set[int]  # a thread fetches it, or waits for room


class CacheFolder:
    """The shards of one split that are on this node."""

    def __init__(
        self,
        remote: Remote,
        split: str,
        path: Path,
        shards: ShardFiles,
        gigabytes: float,
    ) -> None:
        """The folder `path` exists, and holds shards of this split alone."""
        self.path, self.shards = path, shards
        self.bound = round(gigabytes * 1e9)  # bytes; 0 is none
        self.position: int | None = None  # of this process in the order; None is without an order
        self._remote, self._split = remote, split
        self._gigabytes = gigabytes

    def entry(self, number: int) -> Path:
        """The folder that holds a shard when it is here."""
        return self.path / f"{number:06}-{self.shards.sha256[number][:16]}"

    def size(self, numbers: Iterable[int]) -> int:
        """Bytes of some shards."""
        return sum(self.shards.bytes[number] for number in numbers)

    def room(self, whole: set[int]) -> int:
        """Bytes that shards may take: the bound, or what the disk has for them."""
        disk = self.size(whole) + shutil.disk_usage(self.path).free
        return min(self.bound or disk, disk)

    def contents(self) -> Contents:
        """What is here of the manifest's shards."""
        found: dict[str, set[int]] = {"": set(), PARTIAL: set(), _LOCK: set()}
        for name in os.listdir(self.path):
            prefix, number = self._parse(name)
            if number is not None:
                found[prefix].add(number)
        return Contents(found[""], found[PARTIAL], found[_LOCK] - found[""])

    def is_whole(self, number: int) -> bool:
        """Whether a shard is here; one that lost its end in a crash of the machine is removed."""
        entry = self.entry(number)
        try:
            size = (entry / shard_name(number)).stat().st_size
        except FileNotFoundError:
            return False
        if size != self.shards.bytes[number]:
            _remove(entry)
        return size == self.shards.bytes[number]

    def remove(self, number: int) -> None:
        """Remove a shard; a process that has it open may read on."""
        _remove(self.entry(number))

    def evict(self, number: int) -> bool:
        """Remove a shard unless a caller that asked for it may not have opened it yet."""
        if abs(time.time() - self._asked_at(number)) < GRACE:  # a clock may be set back
            return False
        self.remove(number)
        return True

    def clean(self, needed: Iterable[int]) -> None:
        """Remove shards of another manifest, and transfers that broke off and are not needed."""
        needed = set(needed)
        for path in self.path.iterdir():
            prefix, number = self._parse(path.name)
            if prefix == PARTIAL and number not in needed:
                self._remove_partial(path)
            elif prefix == "" and number is None and _ENTRY.fullmatch(path.name):
                _remove(path)
            elif prefix == _LOCK:
                with contextlib.suppress(Timeout), _hold(path, blocking=False):
                    pass  # which removes it

    def fetch(self, number: int, stop: threading.Event) -> None:
        """Fetch a shard and its index, unless another thread or process just did.

        Raises:
            WrongFile: the server has no such file, or another than the manifest says.
            GaveUp: it cannot be fetched now.
            BadInput: it cannot be fetched, or the cache cannot hold it.
            Stopped: `stop` was set.
        """
        entry = self.entry(number)
        partial = entry.with_name(PARTIAL + entry.name)
        try:
            with _hold(entry.with_name(_LOCK + entry.name), stop=stop):
                if self.is_whole(number):
                    return
                self._take_room(number, partial, stop)
                self._fetch_into(partial, number, stop)
                os.replace(partial, entry)
        except Timeout:
            raise Stopped from None

    def _fetch_into(self, partial: Path, number: int, stop: threading.Event) -> None:
        shard, size = partial / shard_name(number), self.shards.bytes[number]
        try:
            if not shard.exists() or shard.stat().st_size != size:
                name = f"{self._split}/{shard_name(number)}"
                self._remote.fetch(name, shard, size, self.shards.sha256[number], stop)
            (partial / index_name(number)).write_bytes(self._read_index(number, stop))
        except WrongFile:
            shutil.rmtree(partial)
            raise
        except OSError as error:
            if error.errno not in _FULL:
                raise
            shutil.rmtree(partial)
            raise GaveUp(
                f"{self.path} is full: {shard_name(number)} of {in_gigabytes(size)} does not fit; "
                "make room there, or choose another cache.folder"
            ) from None

    def _read_index(self, number: int, stop: threading.Event) -> bytes:
        name = f"{self._split}/{index_name(number)}"
        for _ in range(2):
            try:
                content = self._remote.read(name, stop)
                if parse_json(_Index, content).sha256 == self.shards.sha256[number]:
                    return content
            except FileNotFoundError:
                raise WrongFile(self._remote.describe(name), "is not there") from None
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # damaged on its way, or on the server
        where = self._remote.describe(name)
        raise WrongFile(where, f"is not the index of the manifest's shard {number}")

    def _take_room(self, number: int, partial: Path, stop: threading.Event) -> None:
        """Make a shard's partial folder, which stands for its room, once there is room."""
        seen, since = None, time.monotonic()
        while True:
            with FileLock(self.path / ".room", poll_interval=TICK):
                whole, coming, _ = self.contents()
                room = bound = self.room(whole)
                if self.position is None and not self.bound:
                    bound = min(room, KEPT * max(self.shards.bytes))
                taken = self.size(whole | coming | {number})
                try:
                    taken -= self._shrink(taken - bound, whole, coming - {number})
                except Timeout:
                    bound = room  # a follower decides what goes
                if taken <= bound:
                    partial.mkdir(exist_ok=True)
                    return
            if (now := (whole, coming, self.position)) != seen:
                seen, since = now, time.monotonic()
            if self.size([number]) > bound or time.monotonic() - since > PATIENCE:
                raise self._too_small(taken, room)
            if stop.wait(TICK):
                raise Stopped

    def _shrink(self, excess: int, whole: set[int], coming: set[int]) -> int:
        """Bytes given back by transfers that broke off and the shards asked for longest ago.

        Timeout says that only a follower may remove shards now.
        """
        freed = 0
        if excess <= 0:
            return freed
        with FileLock(self.path / ".evict", blocking=False):
            for number in [*coming, *sorted(whole, key=self._asked_at)]:
                entry = self.entry(number)
                partial = entry.with_name(PARTIAL + entry.name)
                if self._remove_partial(partial) if number in coming else self.evict(number):
                    freed += self.shards.bytes[number]
                if freed >= excess:
                    break
        return freed

    def _too_small(self, taken: int, room: int) -> BadInput:
        if room == self.bound:
            problem = f"cache.gigabytes is {self._gigabytes:g}"
            remedy = f"give {2 * taken / 1e9:.3g}, or 0 for what the order needs"
        else:
            problem = f"{self.path} has room for {in_gigabytes(room)}"
            remedy = "make room there, or choose another cache.folder"
        return BadInput(f"{problem}, and {in_gigabytes(taken)} are read at once: {remedy}")

    def _parse(self, name: str) -> tuple[str, int | None]:
        """The prefix of a name, and the number of the manifest's shard that it is of, if any."""
        prefix = next((prefix for prefix in (PARTIAL, _LOCK) if name.startswith(prefix)), "")
        name = name.removeprefix(prefix)
        found = _ENTRY.fullmatch(name)
        number = int(found[1]) if found else len(self.shards.bytes)
        current = number < len(self.shards.bytes) and name == self.entry(number).name
        return prefix, number if current else None

    def _asked_at(self, number: int) -> float:
        try:
            return self.entry(number).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _remove_partial(self, partial: Path) -> bool:
        """Remove what a transfer left; False where it goes on."""
        lock = partial.with_name(partial.name.replace(PARTIAL, _LOCK, 1))
        try:
            with _hold(lock, blocking=False):
                _remove(partial)
        except Timeout:
            return False
        return True


@contextlib.contextmanager
def _hold(path: Path, blocking: bool = True, stop: threading.Event | None = None) -> Iterator[None]:
    """Hold a lock file and remove it in the end; Timeout where it is held, or `stop` was set."""
    lock = FileLock(path)
    cancelled = stop.is_set if stop else None
    with lock.acquire(poll_interval=TICK, blocking=blocking, cancel_check=cancelled):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Remove a folder, which disappears under its name at once."""
    gone = folder.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(gone)
        shutil.rmtree(gone)


def in_gigabytes(size: int) -> str:
    """A number of bytes as messages say it."""
    return f"{size / 1e9:.3g} GB"
