"""The processes of a job: what they agree on, who failed first, which device is whose."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TypeVar

import torch
from torch import distributed

from .errors import BadInput, BadInputEverywhere

Answer = TypeVar("Answer")

LINGER = 60.0  # seconds that a process which ends waits for the others to hear of it

_FAILURE = "failure"  # the first failure's message
_HEARD = "heard"  # there once the first process is about to say it
_LEFT = "left"  # counts the processes that need the store no more


class Crew:
    """The processes of one job; to be entered with `with`, by all of them.

    Each method raises `BadInputEverywhere` once any process has failed, so a process that
    calls one now and then does not outlive the others by much. Rank 0 says what happened.
    """

    def __init__(self, store: distributed.Store, rank: int, size: int, hosts: bool) -> None:
        """`hosts` says that the store ends with this process."""
        self._store = store
        self._hosts = hosts
        self.rank = rank
        self.size = size

    @classmethod
    def join(cls, job: str) -> Crew:
        """The crew of `job` that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

        Where WORLD_SIZE is 1 or not set, this process is all of it.

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
            return cls(distributed.HashStore(), 0, 1, hosts=False)
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
        return cls(
            distributed.PrefixStore(f"vidfill {job} {attempt}", store),
            rank,
            size,
            hosts=rank == 0 and not launcher_hosts,
        )

    def take(self, queue: str) -> int:
        """The next number of a queue: 0, 1, 2… each goes to one process."""
        return self.add(f"queue {queue}") - 1

    def add(self, counter: str, count: int = 1) -> int:
        """Add to a counter of all processes, which begins at 0; return its value."""
        self.check()
        return self._ask(lambda: self._store.add(f"count {counter}", count))

    def share(self, name: str, make: Callable[[], str]) -> str:
        """The text that rank 0 makes; the others wait for it however long that takes."""
        key = f"text {name}"
        self.check()
        if self.rank == 0:
            text = make()
            self._ask(lambda: self._store.set(key, text))
            return text
        self._wait(lambda: self._ask(lambda: self._store.check([key])))
        return self._ask(lambda: self._store.get(key)).decode()

    def wait_for(
        self, counter: str, value: int, while_waiting: Callable[[], object] = lambda: None
    ) -> None:
        """Wait until a counter has reached `value`, calling `while_waiting` now and then."""

        def reached() -> bool:
            while_waiting()
            return self.add(counter, 0) >= value

        self._wait(reached)

    def check(self) -> None:
        """Raise `BadInputEverywhere` if any process has failed."""
        if self._ask(lambda: self._store.check([_FAILURE])):
            raise BadInputEverywhere(self._ask(lambda: self._store.get(_FAILURE)).decode())

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        said = isinstance(error, Exception) and self._tell(error)
        self._leave(waits=error is None or isinstance(error, Exception))
        if said and isinstance(error, (BadInput, OSError)):
            raise BadInputEverywhere(said) from error

    def _tell(self, error: Exception) -> str:
        """End all with the first error; return what rank 0 says of it, "" where `error` says it."""
        message = self._describe(error)
        try:
            first = self._store.compare_set(_FAILURE, "", message).decode()
            if self.rank == 0:
                self._store.set(_HEARD, "")
                return "" if first == message else first
            return first if self._waits_until(lambda: self._store.check([_HEARD])) else ""
        except RuntimeError:  # the store is gone, and with it the others
            return ""

    def _describe(self, error: Exception) -> str:
        message = str(error)
        if not isinstance(error, BadInput):
            message = f"process {self.rank} ended with {type(error).__name__}: {_first_line(error)}"
        return message.encode(errors="backslashreplace").decode()  # a file's name may be no UTF-8

    def _leave(self, waits: bool) -> None:
        """Need the store no more; who hosts it waits until nobody does."""
        try:
            self._store.add(_LEFT, 1)
            if self._hosts and waits:
                self._waits_until(lambda: self._store.add(_LEFT, 0) >= self.size)
        except RuntimeError:  # the store is gone, and with it the others
            pass

    def _waits_until(self, happened: Callable[[], bool]) -> bool:
        ends = time.monotonic() + LINGER
        for pause in _pauses():
            if happened() or time.monotonic() > ends:
                break
            time.sleep(pause)
        return happened()

    def _wait(self, happened: Callable[[], bool]) -> None:
        for pause in _pauses():
            if happened():
                return
            self.check()
            time.sleep(pause)

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        try:
            return question()
        except RuntimeError as error:
            raise BadInput(
                f"the first process, or its launcher, is gone ({_first_line(error)}): "
                "the same command continues"
            ) from None


def choose_device(name: str) -> torch.device:
    """The device of this process: "auto" and "cuda" are a GPU of its own, as far as there are.

    Without a launcher's LOCAL_RANK, nodes are taken to hold equally many processes.

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


def _pauses() -> Iterator[float]:
    """Seconds between two looks: short at first, a second at last."""
    pause = 0.01
    while True:
        yield pause
        pause = min(pause * 1.5, 1.0)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
