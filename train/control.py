"""How a run ends early, by a signal or a failure of one process, at the same step everywhere.

The processes communicate through torch's store: each reads it before each of its steps, which is
not a collective and waits for nobody. A process that wants to end announces, before its step s,
that all end before step s + 1. No other process can finish step s without that process's gradient,
which comes after the announcement. So all have seen it before they begin step s + 1, and all end
before the same step.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from torch import distributed
from torch.distributed import distributed_c10d

from ..errors import BadInputEverywhere, describe
from ..files import write_atomically
from ..interrupts import status_of
from .config import MARKER

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_KEY = "vidfill/stop"


class StoppedBySignal(SystemExit):
    """The run was told to end before its last step; its state is saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(status_of(signal_number))


class Control:
    """Ends a run early; every process has one, entered with `with` in its main thread.

    The first signal ends the run after the current step. A second SIGINT interrupts at once.
    """

    def __init__(self, out: Path, rank: int, size: int) -> None:
        self._marker = out / MARKER
        self._rank = rank
        self._size = size
        self._store: distributed.Store = (
            distributed_c10d._get_default_store() if size > 1 else distributed.HashStore()
        )
        self._caught: signal.Signals | None = None
        self._announced = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Control:
        if self._rank == 0:
            self._marker.unlink(missing_ok=True)
        for number in SIGNALS:
            # What the process was told to ignore stays ignored, as SIGHUP is under nohup.
            if (before := signal.getsignal(number)) != signal.SIG_IGN or number != signal.SIGHUP:
                self._handlers[number] = before
                signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop(self, step: int, failure: Exception | None = None) -> signal.Signals | None:
        """The signal, to any process, that ends the run before `step`; None if it goes on.

        Every process calls this before each of its steps; all get the same answer. A `failure` in
        this process since the last step ends the run too.

        Raises:
            BadInputEverywhere: A process had a failure.
        """
        if (failure or self._caught) and not self._announced:
            notice = {
                "before": step if self._size == 1 else step + 1,
                "failure": describe(failure) if failure else "",
                "signal": self._caught,
            }
            self._store.compare_set(_KEY, "", json.dumps(notice))
            self._announced = True
        if not self._store.check([_KEY]):
            return None
        notice = json.loads(self._store.get(_KEY))
        if step < notice["before"]:
            return None
        if notice["failure"]:
            raise BadInputEverywhere(notice["failure"])
        return signal.Signals(notice["signal"])

    def leave_marker(self, step: int, reason: signal.Signals) -> None:
        """Record in the run's folder that it ended early, so that a job script starts it again."""
        if self._rank == 0:
            said = {"step": step, "reason": reason.name, "time": time.time()}
            write_atomically(self._marker, json.dumps(said).encode())
