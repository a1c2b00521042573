"""Where the files of a split are: in a folder of this machine, or behind a URL and then in a cache.

The cache is a folder of the node, shared by its processes:

    000012-0123456789abcdef/           shard 12 and its index; the digits are of its SHA-256
    .partial-000012-0123456789abcdef/  the same while it comes
    .failed-000012-0123456789abcdef    why it did not come
    follower                           locked by the process that fetches ahead of need
    board                              where each process is in the order, and what it waits for

A shard's folder appears by a rename, so it is whole, and its name says which content it is of: a
data set that was encoded anew never mixes with the one before it.

Two ways to read. Along an order (`follow`, `passed`) the node's first process fetches ahead of
need, and the others wait for what it brings. Without one a shard is fetched by who asks for it,
under a lock, so that it is fetched once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import BadInput
from ...files import PARTIAL, _try_lock, write_atomically
from .folder import (
    _FAILED,
    _FULL,
    _KINDS,
    TICK,
    Table,
    _gigabytes,
    _lock_folder,
    _number_of,
    remove,
)
from .follower import LOOK, RETRY_AFTER, SEEN, TRANSFERS, Plan, Visit, make_plan
from .job_folder import _claim, _make_private, _remove_abandoned
from .names import MANIFEST, index_name, shard_name
from .positions import _Board
from .transfer import GaveUp, Remote, Stopped, WrongFile

KEPT = 64  # of the largest shards: the bound of a cache without a size that follows no order
GRACE = 2.0  # seconds in which who asked for a shard opens it; it is not removed before
PATIENCE = 60.0  # seconds without any progress until a cache is called too small
LONELY = 10.0  # seconds without a follower until a process fetches by itself

_FOLLOWER = "follower"


class NodeCache:
    """A split behind a URL, whose shards are kept in a folder of the node while they are in use."""

    def __init__(
        self,
        remote: Remote,
        split: str,
        folder: Path,
        gigabytes: float = 0.0,
        process: int = 0,
        processes: int = 1,
        *,
        temporary: bool = False,
        patience: float = PATIENCE,
        grace: float = GRACE,
        lonely: float = LONELY,
    ) -> None:
        """Nothing is made or fetched yet.

        Args:
            remote: The folder of splits.
            split: The one to keep.
            folder: Of the cache, for this split alone.
            gigabytes: As in `CacheConfig`; 1 is 10^9 bytes.
            process: Which of the node's processes this is.
            processes: Of the node.
            temporary: The folder above is of this job, and goes when the job is over.
            patience: Seconds, as `PATIENCE`.
            grace: Seconds, as `GRACE`.
            lonely: Seconds, as `LONELY`.
        """
        self.folder, self.gigabytes = folder, gigabytes
        self.process, self.processes = process, processes
        self.patience = patience
        self._remote, self._split, self._temporary = remote, split, temporary
        self._grace, self._lonely = grace, lonely
        self._turn = threading.Lock()  # one thread waits: the board has one place for a process
        self._closing, self._stop = threading.Lock(), threading.Event()
        self._board: _Board | None = None  # while this process reads along an order
        self._follower: _Follower | None = None
        self._table: Table | None = None

    def read(self, name: str) -> bytes:
        """The content of a small file; FileNotFoundError where there is none."""
        return self._remote.read(f"{self._split}/{name}")

    def describe(self, name: str) -> str:
        """A file as messages name it."""
        return self._remote.describe(f"{self._split}/{name}")

    def splits(self) -> list[str]:
        """The splits beside this one, where the server lists its folders."""
        names = self._remote.folders()
        return [name for name in names if self._remote.has(f"{name}/{MANIFEST}")]

    def expect(self, table: Table) -> None:
        """Say what the manifest says of the shards, and make the folder.

        Raises:
            BadInput: others could write into the folder.
        """
        self._table = table
        if self._temporary:
            _claim(self, self.folder.parent)
            if self.process == 0:
                _remove_abandoned(self.folder.parent)
        _make_private(self.folder)

    def path(self, number: int) -> Path:
        """A shard's tar, once it is in the cache; its index lies beside it.

        A process that has it open may go on reading when the cache gives its place to another.

        Raises:
            WrongFile: the server has no such file, or another than the manifest says.
            BadInput: it cannot be had, or the cache cannot hold it.
            Stopped: the cache was closed meanwhile.
        """
        stop = self._stop
        while not self.is_whole(number):
            if self._board:
                self._wait_for(number, self._board, stop)
            else:
                self._fetch(number, stop)
        entry = self.entry(number)
        with contextlib.suppress(FileNotFoundError):
            os.utime(entry)
        return entry / shard_name(number)

    def discard(self, number: int) -> bool:
        """Remove a shard that was damaged here, so that it is fetched again."""
        remove(self.entry(number))
        return True

    def follow(self, visits: Iterator[Visit]) -> None:
        """Fetch ahead of need, for all processes of the node, what `visits` will read.

        The first process of the node calls this; the others call `passed` alone, and wait. Where
        another process calls it, it reads a stream of its own, and gets a cache of its own.

        A shard stays until all processes have passed its last position of the visits seen so far.
        With a bound of `gigabytes` the follower sees as far ahead as fits. Without one it sees as
        far as the longest visit is long, which is about one block, and what nobody needs is
        removed: so what is there is what two blocks of each lane read.

        Args:
            visits: Sorted by `first`; read by another thread, as far as needed.

        Raises:
            BadInput: another job follows in the same folder.
        """
        self.close()
        if self.process:
            self.folder = self.folder / f"process-{self.process}"
            self.process, self.processes = 0, 1
            _make_private(self.folder)
        lock = _lock_follower(self.folder)
        for path in self.folder.iterdir():
            if not self._is_wanted(path):
                remove(path)
        self._board = _Board(self.folder / "board", self.process, self.processes)
        self._board.clear()
        self._follower = _Follower(self, self._board, visits, lock)

    def passed(self, position: int) -> None:
        """Say that this process reads nothing before `position` any more."""
        if self._board is None and self.process:
            self._board = _Board(self.folder / "board", self.process, self.processes)
        if self._board:
            self._board.move(position)

    def close(self) -> None:
        """Stop what is under way; what was fetched stays, and reading may begin anew."""
        with self._closing:
            self._stop.set()
            self._stop = threading.Event()
            if self._board:
                self._board.leave()
            if self._follower:
                self._follower.close()
            self._follower, self._board = None, None

    # What the follower uses too

    @property
    def table(self) -> Table:
        assert self._table, "expect() comes first"
        return self._table

    def entry(self, number: int) -> Path:
        """The folder that holds a shard when it is here."""
        return self.folder / self._name(number)

    def is_whole(self, number: int) -> bool:
        """Whether a shard is here; what lost its end in a crash of the machine is removed."""
        entry = self.entry(number)
        try:
            size = (entry / shard_name(number)).stat().st_size
        except FileNotFoundError:
            return False
        if size != self.table.bytes[number]:
            remove(entry)
            return False
        return True

    def is_fresh(self, number: int) -> bool:
        """Whether somebody who asked for a shard may not have opened it yet."""
        try:
            return time.time() - self.entry(number).stat().st_mtime < self._grace
        except FileNotFoundError:
            return False

    def held(self) -> set[int]:
        """The shards that are here."""
        return {
            number
            for name in os.listdir(self.folder)
            if (number := _number_of(name)) is not None and self._is_current(number, name)
        }

    def bring(self, number: int, stop: threading.Event) -> None:
        """Fetch a shard and its index, unless another process just did.

        Raises:
            WrongFile, GaveUp, BadInput, Stopped: as `Remote.fetch`.
        """
        entry, name = self.entry(number), f"{self._split}/{shard_name(number)}"
        size, sha256 = self.table.bytes[number], self.table.sha256[number]
        partial = entry.with_name(PARTIAL + entry.name)
        with _lock_folder(partial, stop):
            if self.is_whole(number):
                shutil.rmtree(partial)
                return
            shard = partial / shard_name(number)
            try:
                if not shard.exists() or shard.stat().st_size != size:
                    self._remote.fetch(name, shard, size, sha256, stop)
                (partial / index_name(number)).write_bytes(self._read_index(number, stop))
            except WrongFile:
                shutil.rmtree(partial)
                raise
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                shutil.rmtree(partial)
                raise GaveUp(
                    f"{self.folder} is full: {shard_name(number)} of {_gigabytes(size)} does not "
                    "fit; make room there, or choose another cache.folder"
                ) from None
            os.replace(partial, entry)

    def fail(self, number: int, error: BadInput) -> None:
        """Tell the node's processes why a shard does not come."""
        parts = [error.where, error.reason] if isinstance(error, WrongFile) else [str(error)]
        record = json.dumps([type(error).__name__, *parts])
        write_atomically(self._failure(number), record.encode())

    def _failure(self, number: int) -> Path:
        return self.folder / (_FAILED + self.entry(number).name)

    def _read_failure(self, number: int) -> BadInput | None:
        try:
            kind, *parts = json.loads(self._failure(number).read_bytes())
        except FileNotFoundError:
            return None
        return _KINDS[kind](*parts)

    def _read_index(self, number: int, stop: threading.Event) -> bytes:
        name = index_name(number)
        for _ in range(2):
            try:
                content = self._remote.read(f"{self._split}/{name}", stop)
                if json.loads(content)["sha256"] == self.table.sha256[number]:
                    return content
            except FileNotFoundError:
                raise WrongFile(self.describe(name), "is not there") from None
            except (ValueError, KeyError, TypeError):
                continue  # damaged on its way, or there
        raise WrongFile(self.describe(name), f"is not the index of the manifest's shard {number}")

    def _is_wanted(self, path: Path) -> bool:
        """Whether a follower may leave what an earlier one left."""
        name = path.name.removeprefix(PARTIAL)
        number = _number_of(name)
        if number is None:
            return not path.name.startswith((PARTIAL, _FAILED))
        return self._is_current(number, name)

    def _is_current(self, number: int, name: str) -> bool:
        """Whether a name is that of the manifest's shard, not of another that it had before."""
        return number < len(self.table.bytes) and name == self._name(number)

    def _name(self, number: int) -> str:
        return f"{number:06}-{self.table.sha256[number][:16]}"

    def _wait_for(self, number: int, board: _Board, stop: threading.Event) -> None:
        """Return when the follower has brought a shard, or when this process did without one."""
        with self._turn:
            board.ask(number)
            try:
                attended, failures = time.monotonic(), 0
                while not self.is_whole(number):
                    if stop.wait(TICK):
                        raise Stopped
                    board.say()
                    if board.is_refused(number):
                        raise GaveUp(f"{self.folder} is full: make room there")
                    if self._is_followed():
                        attended = time.monotonic()
                        # Twice: a follower that just began may not have removed an old one yet.
                        failure = self._read_failure(number)
                        failures = failures + 1 if failure else 0
                        if failure and failures > 1:
                            raise failure
                    elif time.monotonic() - attended > self._lonely:
                        self.bring(number, stop)
            finally:
                board.ask(None)

    def _is_followed(self) -> bool:
        if self._follower:
            return True
        try:
            lock = os.open(self.folder / _FOLLOWER, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            return not _try_lock(lock, fcntl.LOCK_SH)
        finally:
            os.close(lock)

    def _fetch(self, number: int, stop: threading.Event) -> None:
        """Bring a shard without an order, in the place of what was asked for longest ago."""
        sizes = self.table.bytes
        bound = round(self.gigabytes * 1e9) or KEPT * max(sizes)
        if sizes[number] > bound:
            raise BadInput(
                f"cache.gigabytes is {self.gigabytes:g}: shard {number} alone has "
                f"{_gigabytes(sizes[number])}; give more, or 0"
            )
        while not self._is_followed():  # a follower sees to the room
            held = sorted(self.held() - {number}, key=self._asked_at)
            excess = sum(sizes[other] for other in held) + sizes[number] - bound
            if excess <= 0:
                break
            oldest = held[0]
            if not self.is_fresh(oldest):
                remove(self.entry(oldest))
            elif stop.wait(TICK):
                raise Stopped
        self.bring(number, stop)

    def _asked_at(self, number: int) -> float:
        try:
            return self.entry(number).stat().st_mtime
        except FileNotFoundError:
            return 0.0


def _lock_follower(folder: Path) -> int:
    """Become the one process that fetches ahead in a folder, until the descriptor is closed."""
    lock = os.open(folder / _FOLLOWER, os.O_RDWR | os.O_CREAT, 0o600)
    for _ in range(50):  # the other processes look whether it is locked, and hold it for that
        if _try_lock(lock, fcntl.LOCK_EX):
            return lock
        time.sleep(TICK)
    os.close(lock)
    raise BadInput(
        f"{folder}: another job of this node reads the same shards through this cache: "
        "give each its own cache.folder"
    )


class _Follower:
    """The threads of the node's first process that fetch ahead of need."""

    def __init__(self, cache: NodeCache, board: _Board, visits: Iterator[Visit], lock: int) -> None:
        self._cache, self._board, self._visits, self._lock = cache, board, visits, lock
        self._sizes = cache.table.bytes
        self._bound = round(cache.gigabytes * 1e9)  # 0 is none
        self._next = next(visits, None)  # the first visit that is not in `_seen`
        self._start = self._next.first if self._next else 0
        self._longest = 0  # positions of a visit
        self._seen: list[Visit] = []  # not yet passed by all
        self._coming: set[int] = set()
        self._failed: set[int] = set()
        self._not_before: dict[int, float] = {}  # time.monotonic() of another attempt
        self._changed: tuple[object, float] = (None, 0.0)  # the last state, and since when
        self._stop, self._wake = threading.Event(), threading.Event()
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._begun = False
        # Threads that end with the process: what they leave half done is gone on with later.
        self._leader, *workers = (
            threading.Thread(target=work, name="vidfill cache", daemon=True)
            for work in [self._lead, *[self._work] * TRANSFERS]
        )
        for thread in [self._leader, *workers]:
            thread.start()

    def close(self) -> None:
        """Let the threads end, and others follow."""
        self._stop.set()
        self._wake.set()
        for _ in range(TRANSFERS):
            self._queue.put(None)
        self._leader.join()
        os.close(self._lock)

    def _work(self) -> None:
        while (number := self._queue.get()) is not None:
            try:
                self._cache.bring(number, self._stop)
            except Stopped:
                return
            except GaveUp as error:
                # Who reads may have enough for as long as the server is away.
                if number in self._board.requests():
                    self._fail(number, error)
                self._not_before[number] = time.monotonic() + RETRY_AFTER
            except Exception as error:
                self._fail(number, error)
            finally:
                self._coming.discard(number)
                self._wake.set()

    def _fail(self, number: int, error: Exception) -> None:
        if not isinstance(error, BadInput):
            error = BadInput(f"shard {number}: {type(error).__name__}: {error}")
        self._failed.add(number)
        try:
            self._cache.fail(number, error)
        except OSError:  # a full disk takes no reason either
            self._board.refuse(number)

    def _lead(self) -> None:
        seen, looked = b"", 0.0
        while not self._stop.is_set():
            woken = self._wake.wait(TICK)
            self._wake.clear()
            now, state = time.monotonic(), self._board.state()
            # Each look lists the folder: a few a second do where nobody waits.
            hurry = woken or (state != seen and self._board.requests())
            if not (hurry or now - looked > (LOOK if state != seen else 1.0)):
                continue
            seen, looked = state, now
            try:
                self._look(now)
            except Exception as error:
                for number in self._board.requests():
                    self._fail(number, error)

    def _look(self, now: float) -> None:
        cache, board = self._cache, self._board
        floor = max(self._start, board.floor())
        requests, here = board.requests(), cache.held()
        coming = set(self._coming)
        self._look_ahead(floor)
        order = {visit.shard: None for visit in self._seen}
        asked = {number: None for number in requests if number not in order}
        need = [number for number in {**asked, **order} if number not in self._failed]
        free = sum(self._sizes[n] for n in here) + shutil.disk_usage(cache.folder).free
        room = min(self._bound or free, free)
        if not self._begun:
            self._begin(need, free)
        plan = self._plan(need, here, coming, room)
        for number in plan.evict:
            remove(cache.entry(number))
        for number in plan.fetch:
            pause = number not in requests and self._not_before.get(number, 0.0) > now
            if len(self._coming) < TRANSFERS and not pause:
                self._coming.add(number)
                self._queue.put(number)
        lacking = set(requests) - here - coming - plan.keep - self._failed
        self._complain(now, (floor, here, coming, requests), lacking, need, room)

    def _plan(self, need: Sequence[int], here: set[int], coming: set[int], room: int) -> Plan:
        fixed = set(coming)
        while True:
            plan = make_plan(need, here - fixed, fixed, self._sizes, room, tidy=not self._bound)
            fresh = {number for number in plan.evict if self._cache.is_fresh(number)}
            if not fresh:
                return plan
            fixed |= fresh

    def _look_ahead(self, floor: int) -> None:
        """Drop the visits that all have passed, and see as many new ones as there is room for."""
        self._seen = [visit for visit in self._seen if visit.last >= floor]
        shards = {visit.shard for visit in self._seen}
        total = sum(self._sizes[number] for number in shards)
        while self._next and len(self._seen) < SEEN and not self._stop.is_set():
            visit = self._next
            self._longest = max(self._longest, visit.last - visit.first + 1)
            if total >= self._bound if self._bound else visit.first > floor + self._longest:
                break
            self._next = next(self._visits, None)
            if visit.last >= floor:
                total += 0 if visit.shard in shards else self._sizes[visit.shard]
                shards.add(visit.shard)
                self._seen.append(visit)

    def _begin(self, need: Sequence[int], free: int) -> None:
        """Remove what an earlier follower began in vain, and warn where the disk is small."""
        self._begun = True
        folder = self._cache.folder
        for path in folder.glob(f"{PARTIAL}*"):
            if _number_of(path.name.removeprefix(PARTIAL)) not in need:
                remove(path)
        wanted = self._bound or sum(self._sizes[number] for number in need)
        if wanted > free:
            print(
                f"{folder}: the cache may need {_gigabytes(wanted)}, and the disk has room for "
                f"{_gigabytes(free)}: less will be read ahead",
                file=sys.stderr,
                flush=True,
            )

    def _complain(
        self, now: float, state: object, lacking: set[int], need: Sequence[int], room: int
    ) -> None:
        """Fail the shards that somebody waits for in vain, once nothing changes any more."""
        if state != self._changed[0]:
            self._changed = (state, now)
        if not lacking or now - self._changed[1] < self._cache.patience:
            return
        number = next(number for number in need if number in lacking)
        at_once = sum(self._sizes[n] for n in need[: need.index(number) + 1])
        folder = self._cache.folder
        if room == self._bound:
            problem = f"cache.gigabytes is {self._cache.gigabytes:g}"
            remedy = f"give {2 * at_once / 1e9:.3g}, or 0 for what the order needs"
        else:
            problem = f"{folder} has room for {_gigabytes(room)}"
            remedy = "make room there, or choose another cache.folder"
        error = BadInput(f"{problem}, and {_gigabytes(at_once)} are read at once: {remedy}")
        for number in lacking:
            self._fail(number, error)
