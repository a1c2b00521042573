"""How signals that end a process are answered: at once, and once its job runs as the job's end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal came that ends the job."""


def leave_at_once() -> None:
    """End the process at Ctrl-C, without an exception.

    For a process of vidfill's own, before it imports what is heavy: nothing has begun that would
    have to be ended, and an exception in the midst of an import may turn into another one.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it may be ignored
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"vidfill: interrupted\n")
    os._exit(status_of(signal.SIGINT))


def status_of(number: int) -> int:
    """The exit status of a process that a signal ends, as shells have it."""
    return 128 + number


class Interrupt:
    """The signal that came, if any."""

    number: signal.Signals | None = None

    def describe(self) -> str:
        return (
            "interrupted"
            if self.number in (None, signal.SIGINT)
            else f"ended by {self.number.name}"
        )


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Let a signal raise Interrupted, so that what is to be cleaned up is.

    It is remembered: a library may raise something else in its place. A signal that the process was
    told to ignore stays ignored.
    """
    interrupt = Interrupt()

    def end(number: int, frame: FrameType | None) -> None:
        interrupt.number = signal.Signals(number)
        raise Interrupted

    before = {number: signal.getsignal(number) for number in ENDING}
    ending = (_leave, signal.default_int_handler, signal.SIG_DFL)
    answered = [number for number, handler in before.items() if handler in ending]
    if threading.current_thread() is not threading.main_thread():
        answered = []
    for number in answered:
        signal.signal(number, end)
    try:
        yield interrupt
    finally:
        for number in answered:
            signal.signal(number, before[number])
