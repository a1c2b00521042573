"""What anybody may have written, read within bounds: records of JSON, arrays of NumPy.

Nothing is allocated that its reader does not expect, and whatever is wrong is said in one line.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import threading
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.lib import format as npy
from pydantic import TypeAdapter, ValidationError

from .errors import BadInput, describe

Record = TypeVar("Record")
Text = str | bytes
Lengths = Sequence[int | None]  # None is any length

LARGEST = 2**27  # bytes of a record; a manifest has about a hundred for each of its shards
_HEADER = 2**14  # bytes that may precede an array's values

# NumPy parses headers as Python, which Python 3.11 cannot do in two threads at once: SystemError.
_HEADERS = threading.Lock()


class Malformed(BadInput, ValueError):
    """What was read is not what its reader expects."""


def read_small(path: Path) -> bytes:
    """The content of a record's file.

    Raises:
        Malformed: It has more than `LARGEST` bytes, or is no file.
        OSError: It cannot be read; FileNotFoundError where it is missing.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise Malformed(f"{path} is no file")
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise Malformed(f"{path} has more than {LARGEST >> 20} MiB, which no record has")
    return content


def parse_json(kind: type[Record], text: Text) -> Record:
    """A record from JSON; Malformed names the field that is missing or wrong, in one line."""
    # Not by pydantic's own reader, which refuses names that are no UTF-8.
    with _naming_fields():
        return TypeAdapter(kind).validate_python(load_json(text))


def parse_strictly(kind: type[Record], text: Text) -> Record:
    """As `parse_json`, but nothing is converted: a number in quotes is refused."""
    with _naming_fields():
        return TypeAdapter(kind).validate_json(text, strict=True)


def load_json(text: Text) -> object:
    """JSON of any kind; Malformed where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"it is no JSON ({error})") from None


def parse_table(
    lines: Iterable[str], columns: Sequence[str], kind: type[Record]
) -> Iterator[tuple[dict[str, str], Record]]:
    """The lines of a CSV behind its header, as texts and as records.

    Raises:
        Malformed: It names the line and the field.
    """
    rows = csv.DictReader(lines, columns, strict=True)
    checked, number = TypeAdapter(kind), 1
    try:
        for number, texts in enumerate(rows, 2):  # noqa: B007
            yield texts, checked.validate_python(texts)
    except (ValidationError, csv.Error, UnicodeDecodeError) as error:
        raise Malformed(f"line {number}: {describe(error)}") from None


@contextlib.contextmanager
def _naming_fields() -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise Malformed(describe(error)) from None


def read_array(content: bytes, dtype: type[np.generic], shape: Lengths) -> np.ndarray:
    """The array of a .npy.

    Raises:
        Malformed: It is of another type or shape, or has more or fewer values.
    """
    with _refusing("an array"):
        file = io.BytesIO(content)
        with _HEADERS:
            version = npy.read_magic(file)
            found, by_columns, kind = npy.read_array_header_1_0(file)
    start = file.tell()
    fits = len(found) == len(shape) and all(
        wanted in (None, length) for length, wanted in zip(found, shape, strict=True)
    )
    if by_columns or version != (1, 0):
        raise Malformed("it lies by columns, or is of another version than NumPy writes")
    if not fits or kind != dtype:
        wanted = ["any" if length is None else length for length in shape]
        raise Malformed(f"it is {kind} {list(found)}, and {np.dtype(dtype)} {wanted} is expected")
    if len(content) - start != math.prod(found) * kind.itemsize:
        raise Malformed(f"it does not hold the {math.prod(found)} values that it names")
    return np.frombuffer(content, kind, offset=start).reshape(found).copy()


def read_archived(
    content: bytes, name: str, dtype: type[np.generic], shape: Lengths, most: int | None = None
) -> np.ndarray:
    """The array `name` of a .npz; where a length may be any, it has `most` values at most.

    Raises:
        Malformed: There is none, or as in `read_array`.
    """
    values = math.prod(length or 0 for length in shape) if most is None else most
    with _refusing("an archive of arrays"), zipfile.ZipFile(io.BytesIO(content)) as archive:
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Malformed(f"{name} is compressed as NumPy does not")  # and reads without bounds
        with archive.open(member) as file:
            read = file.read(values * np.dtype(dtype).itemsize + _HEADER)
    return read_array(read, dtype, shape)


@contextlib.contextmanager
def _refusing(kind: str) -> Iterator[None]:
    try:
        yield
    except Malformed:
        raise
    except Exception as error:  # of damaged bytes numpy and zipfile raise a dozen kinds
        raise Malformed(f"it is not {kind} ({describe(error)})") from error
