"""What a job says in one line: its end in place of a traceback, and what strangers named."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Collection
from typing import TextIO


def printable(text: str) -> str:
    """One line that does nothing to a terminal: controls, line breaks and text turned right to left
    are escaped as Python writes them. Names and messages of strangers hold anything.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines, each of them `printable`, on stderr or `file`; the work goes on unheard."""
    stream = file or sys.stderr
    for line in lines:
        try:
            print(printable(line), file=stream, flush=True)
        except BrokenPipeError:  # as of `vidfill … | head`
            mute(stream)


def mute(stream: TextIO) -> None:
    """Let a stream that nobody reads any more lead nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class BadInput(Exception):
    """One clear line for the user: the field, the value and the remedy."""


class BadInputEverywhere(BadInput):
    """Raised by every process alike: the first one says it."""


def describe(error: Exception) -> str:
    """How an error that ends a job is reported: a BadInput's text, one line of any other."""
    if isinstance(error, BadInput):
        return str(error)
    if hasattr(error, "errors"):  # a pydantic.ValidationError: its first fault
        fault = error.errors(include_url=False)[0]
        kind, said = fault["type"], fault["msg"].removeprefix("Value error, ")
        field = ".".join(map(str, fault["loc"]))
        if "missing" in kind:
            return f"field {field} is missing"
        if kind in ("unexpected_keyword_argument", "extra_forbidden"):
            return f"field {field} is unknown"
        if kind == "json_invalid" or (kind == "value_error" and not field):
            return said  # the value is the whole record
        return f"{field or 'it'} is {fault['input']!r:.80}: {said}"
    # A full disk comes without the file's name, and a library's own OSError without either.
    known = [error.filename, error.strerror] if isinstance(error, OSError) else []
    said = ": ".join(str(part) for part in known if part)
    return said or str(error).partition("\n")[0] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python's or of a library's says that memory could not be had."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported here
    said = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or named or "DefaultCPUAllocator" in said


def suggest(unknown: str, known: Collection[str]) -> str:
    """The remedy for an unknown name: the nearest known one, or all of them."""
    near = difflib.get_close_matches(unknown, known, n=1)
    return f"did you mean {near[0]}?" if near else f"give one of {', '.join(known)}"


def say_error(verb: str, error: Exception) -> None:
    """Print the one line."""
    rank = int(os.environ.get("RANK", "0"))
    process = f"[rank {rank}] " if rank else ""
    say(f"{process}vidfill {verb}: error: {describe(error)}")
