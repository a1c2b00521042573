"""What ends a job with one line in place of a traceback."""

from __future__ import annotations

import os
import sys


class BadInput(Exception):
    """One clear line for the user: the field, the value and the remedy."""


class BadInputEverywhere(BadInput):
    """Raised by every process alike: the first one says it."""


def describe(error: Exception) -> str:
    """How an error that ends a job is reported: a BadInput's text, one line of any other."""
    if isinstance(error, BadInput):
        return str(error)
    if hasattr(error, "errors"):  # pydantic's: the first fault in the record
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        told = fault["type"] in ("json_invalid", "missing")  # without the value, which is the whole
        found = "" if told else f" (found {fault['input']!r:.80})"
        return f"{place}: {fault['msg']}{found}" if place else f"{fault['msg']}{found}"
    # A full disk comes without the file's name, and a library's own OSError without either.
    known = [error.filename, error.strerror] if isinstance(error, OSError) else []
    said = ": ".join(str(part) for part in known if part)
    return said or str(error).partition("\n")[0] or type(error).__name__


def say_error(verb: str, error: Exception) -> None:
    """Print the one line."""
    rank = int(os.environ.get("RANK", "0"))
    process = f"[rank {rank}] " if rank else ""
    print(f"{process}vidfill {verb}: error: {describe(error)}", file=sys.stderr)
