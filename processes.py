"""The processes of a job: how they share its work, and end together."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import distributed

from .errors import BadInput, say_error
from .progress import Progress, show_progress

Answer = TypeVar("Answer")
Item = TypeVar("Item")

LINGER = 60.0  # seconds for which the process that hosts the store waits for the others to leave
LOOK_EVERY = 0.1  # seconds between two looks at what a process waits for
TELL_EVERY = 1.0  # seconds between a process's counts to the others
VISIBLE = 60.0  # seconds in which a file on a shared file system shows on every node

_FAILURES = "failures"  # processes that have failed
_SAID = "said"  # exists once the first failure has been printed
_LEFT = "left"  # processes that no longer need the store


class Crew:
    """The processes of one job, for use with `with` in each of them.

    They talk through a store of keys and counters, never in a collective. When one fails, it prints
    its error, and each of the others ends at its next call of a method here, with status 2 and
    without a word. A launcher may well be faster.
    """

    def __init__(
        self, job: str, store: distributed.Store, rank: int, size: int, hosts: bool
    ) -> None:
        """`hosts` says that the store ends with this process."""
        self._job, self._store, self._hosts = job, store, hosts
        self.rank, self.size = rank, size

    @classmethod
    def join(cls, job: str) -> Crew:
        """The crew of `job` that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

        Where WORLD_SIZE is 1 or not set, this process is the whole crew.

        Raises:
            BadInput: the environment is not a launcher's, or the others cannot be reached.
        """
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        if "WORLD_SIZE" not in os.environ and tasks != "1":
            raise BadInput(
                f"srun started {tasks} tasks, and WORLD_SIZE is not set: start one task a node, "
                "and in it `accelerate launch`"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(job, distributed.HashStore(), 0, 1, hosts=False)
        try:
            store, rank, size = next(distributed.rendezvous("env://"))
        except ValueError as error:
            raise BadInput(
                f"{error}: start several processes with `accelerate launch` or torchrun"
            ) from None
        except RuntimeError as error:
            raise BadInput(f"the processes cannot meet: {_first_line(error)}") from None
        # A launcher that starts its processes again may keep the store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        launcher_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        prefixed = distributed.PrefixStore(f"vidfill {job} {attempt}", store)
        return cls(job, prefixed, rank, size, hosts=rank == 0 and not launcher_hosts)

    def take(self, queue: str, items: Sequence[Item]) -> Iterator[Item]:
        """This process's part of `items`, one at a time: each goes to whoever asks first."""
        while (turn := self.add(f"queue {queue}") - 1) < len(items):
            yield items[turn]

    def add(self, counter: str, count: int = 1) -> int:
        """Add to a counter that all processes share and that starts at 0; return its value."""
        self.check()
        return self._ask(lambda: self._store.add(f"count {counter}", count))

    @contextlib.contextmanager
    def tally(self, description: str, total: int, unit: str, done: int = 0) -> Iterator[Tally]:
        """Count what all processes do; the first one shows it."""
        shows = self.rank == 0 and done < total
        shown = show_progress(description, total, unit, done)
        with shown if shows else contextlib.nullcontext(Progress()) as progress:
            tally = Tally(self, description, unit, progress)
            yield tally
            tally.tell()

    def share(self, name: str, make: Callable[[], Any]) -> Any:
        """What the first process makes, as JSON returns it; the others wait for it."""
        key = f"value {name}"
        self.check()
        if self.rank == 0:
            text = json.dumps(make())
            self._ask(lambda: self._store.set(key, text))
        else:
            while not self._ask(lambda: self._store.check([key])):
                self.check()
                time.sleep(LOOK_EVERY)
            text = self._ask(lambda: self._store.get(key)).decode()
        return json.loads(text)

    def finish(self, while_waiting: Callable[[], object] = lambda: None) -> None:
        """Say that this process has done its part; the first one waits for all the others."""
        self.add("finished")
        if self.rank == 0:
            while self.add("finished", 0) < self.size:
                while_waiting()
                time.sleep(LOOK_EVERY)

    def check(self) -> None:
        """End this process if another one has failed."""
        if self._ask(lambda: self._store.check([_SAID])):
            raise SystemExit(2)

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        said = False
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it the others
            said = self.size > 1 and isinstance(error, Exception) and self._say_once(error)
            self._store.add(_LEFT, 1)
            if self._hosts and not isinstance(error, KeyboardInterrupt):
                self._linger(lambda: self._store.add(_LEFT, 0) >= self.size)
        if said:
            raise SystemExit(2) from error

    def _say_once(self, error: Exception) -> bool:
        """Print the first error of all, then end the others; whether there is nothing more to say.

        A fault of the program is left to Python, which prints its trace.
        """
        is_input = isinstance(error, BadInput | OSError)
        if self._store.add(_FAILURES, 1) > 1:
            self._linger(lambda: self._store.check([_SAID]))
            return is_input
        if is_input:
            say_error(self._job, error)
        self._store.set(_SAID, "")
        return is_input

    def _linger(self, happened: Callable[[], bool]) -> None:
        ends = time.monotonic() + LINGER
        while not happened() and time.monotonic() < ends:
            time.sleep(LOOK_EVERY)

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        try:
            return question()
        except RuntimeError as error:
            raise BadInput(
                f"the first process, or its launcher, is gone ({_first_line(error)}): "
                "the same command continues"
            ) from None


class Tally:
    """Counts what this process does, and tells the others now and then."""

    def __init__(self, crew: Crew, counter: str, unit: str, progress: Progress) -> None:
        self._crew, self._counter, self._unit = crew, f"tally {counter}", unit
        self._progress = progress
        self._began = self._told = time.monotonic()
        self._untold = self._shown = 0

    def add(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self._untold += count
        if time.monotonic() - self._told > TELL_EVERY:
            self.tell()

    def tell(self) -> None:
        """Tell the others, and show what all have done."""
        reached = self._crew.add(self._counter, self._untold)
        self._untold, self._told = 0, time.monotonic()
        if reached != self._shown:
            rate = reached / max(self._told - self._began, 1e-9)
            self._progress.advance(reached - self._shown, f"({rate:.1f} {self._unit}/s)")
            self._shown = reached


def wait_until_visible(find_missing: Callable[[], str]) -> None:
    """Wait until this node sees what another process wrote to a shared file system.

    `find_missing` names what is not there yet; "" once all is.

    Raises:
        BadInput: something does not appear.
    """
    ends = time.monotonic() + VISIBLE
    while missing := find_missing():
        if time.monotonic() > ends:
            raise BadInput(
                f"{missing}: give a folder that all nodes share; the same command continues"
            )
        time.sleep(LOOK_EVERY)


def choose_device(name: str) -> torch.device:
    """The device of this process: "auto" and "cuda" give each its own GPU while there are enough.

    Where no launcher sets LOCAL_RANK, all nodes are taken to hold equally many processes.

    Raises:
        BadInput: the device does not work here.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("RANK", "0"))
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    if name == "auto":
        return torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device is {name!r}, which does not work: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
