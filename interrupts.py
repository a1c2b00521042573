"""How a process answers Ctrl-C: at once until its job begins, then by an end of the job."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

STATUS = 128 + signal.SIGINT


def leave_at_once() -> None:
    """End the process at Ctrl-C, without an exception.

    For a process of vidfill's own, before it imports what is heavy: nothing has begun that would
    have to be ended, and an exception in the midst of an import may turn into another one.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it may be ignored
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"vidfill: interrupted\n")
    os._exit(STATUS)


class Interrupt:
    """Whether there was one."""

    came = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Let Ctrl-C raise KeyboardInterrupt, and remember that it did: libraries may raise another."""
    interrupt = Interrupt()

    def raise_it(number: int, frame: FrameType | None) -> None:
        interrupt.came = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    answers = threading.current_thread() is threading.main_thread() and before in (
        *(_leave, signal.default_int_handler),
    )
    if answers:
        signal.signal(signal.SIGINT, raise_it)
    try:
        yield interrupt
    finally:
        if answers:
            signal.signal(signal.SIGINT, before)
