"""What ends a job with one line in place of a traceback."""

from __future__ import annotations


class BadInput(Exception):
    """One clear line for the user: the field, the value and the remedy."""


class BadInputEverywhere(BadInput):
    """Raised by every process alike: the first one says it."""


def describe(error: Exception) -> str:
    """What is said of an error that ends a job: the text of a BadInput, a line of any other."""
    if isinstance(error, BadInput):
        return str(error)
    # A full disk comes without the file's name, and a library's own OSError without either.
    known = [error.filename, error.strerror] if isinstance(error, OSError) else []
    said = ": ".join(str(part) for part in known if part)
    return said or str(error).partition("\n")[0] or type(error).__name__
