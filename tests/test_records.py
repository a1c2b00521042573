"""A file of anybody's makes nobody read or allocate more than its reader expects."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vidfill.errors import BadInput
from vidfill.records import (
    LARGEST,
    Malformed,
    parse_json,
    read_archived,
    read_array,
    read_small,
)
from vidfill.sampling.sweep.kept import read_strip

SHAPE = (3, 4)
VALUES = np.arange(12, dtype=np.uint8).reshape(SHAPE)
HUGE = (2**20, 2**12)  # 4 GB of bytes, which deflate writes in 4 MB


def npy(array: np.ndarray, **header: object) -> bytes:
    """A .npy, whose header may say something else."""
    content = io.BytesIO()
    fields = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | header
    np.lib.format.write_array_header_1_0(content, fields)
    return content.getvalue() + array.tobytes()


def npz(content: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("mask.npy", content)
    return file.getvalue()


def read_mask(content: bytes) -> np.ndarray:
    return read_archived(content, "mask", np.uint8, SHAPE)


def read_plain(content: bytes) -> np.ndarray:
    return read_array(content, np.uint8, SHAPE)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([np.uint8, np.float16, np.float64, np.int64]),
    shape=st.lists(st.integers(0, 4), max_size=4).map(tuple),
    free=st.integers(0, 3),
)
def test_what_numpy_wrote_is_read(
    dtype: type[np.generic], shape: tuple[int, ...], free: int
) -> None:
    array = np.arange(np.prod(shape), dtype=int).astype(dtype).reshape(shape)
    wanted = tuple(None if axis == free else length for axis, length in enumerate(shape))
    plain, archive = io.BytesIO(), io.BytesIO()
    np.save(plain, array)
    np.savez_compressed(archive, mask=array)
    for read in (
        read_array(plain.getvalue(), dtype, wanted),
        read_archived(archive.getvalue(), "mask", dtype, wanted, most=array.size),
    ):
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        assert (read == array).all()


BOMBS: dict[str, tuple[Callable[[bytes], np.ndarray], Callable[[], bytes]]] = {
    "a mask of 16 MB": (read_mask, lambda: npz(npy(np.zeros((2**12, 2**12), np.uint8)))),
    "the values of another mask": (read_mask, lambda: npz(npy(np.zeros(2**24, np.uint8)))),
    "a header of 4 GB": (read_mask, lambda: npz(npy(VALUES, shape=HUGE))),
    "a header of 4 GB, plain": (read_plain, lambda: npy(VALUES, shape=HUGE)),
    "a header that is a program": (read_plain, lambda: npy(VALUES, shape=("1" * 9000,))),
    "a method without bounds": (
        read_mask,
        lambda: npz(npy(np.zeros(2**24, np.uint8)), zipfile.ZIP_LZMA),
    ),
    "an object": (read_plain, lambda: npy(VALUES, descr="|O")),
    "columns": (read_plain, lambda: npy(VALUES, fortran_order=True)),
    "another type": (read_plain, lambda: npy(VALUES.astype(np.int8))),
    "too few values": (read_plain, lambda: npy(VALUES)[:-1]),
    "too many values": (read_plain, lambda: npy(VALUES) + b"\0"),
    "no archive": (read_mask, lambda: npy(VALUES)),
    "no array": (read_plain, lambda: b"{}"),
    "nothing": (read_mask, lambda: b""),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_before_it_takes_memory(bomb: str) -> None:
    read, make = BOMBS[bomb]
    content = make()
    tracemalloc.start()
    with pytest.raises(Malformed) as caught:
        read(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20 + 2 * len(content)
    assert "\n" not in str(caught.value)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize(
    "make", [sparse, os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")]
)
def test_a_record_that_never_ends_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "record.json"
    make(path)
    with pytest.raises(Malformed, match=r"record\.json (is no file|has more than 128 MiB)"):
        read_small(path)


def test_the_largest_record_is_read(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes(b" " * LARGEST)
    assert len(read_small(tmp_path / "record.json")) == LARGEST


@pytest.mark.parametrize(
    "text",
    ["[" * 10**6, '{"a":' * 10**5, "1" * 10**5, "[1", "", "\ud800", b"\xff\xfe\x00", "nul", "[1]"],
)
def test_what_is_no_object_is_one_line(text: str | bytes) -> None:
    with pytest.raises(Malformed) as caught:
        parse_json(dict[str, int], text)
    assert "\n" not in str(caught.value)


def test_numbers_beyond_64_bits_are_read_as_they_are() -> None:
    assert parse_json(dict[str, int], json.dumps({"a": 2**63})) == {"a": 2**63}


def test_a_picture_of_another_size_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "strip.png"
    cv2.imwrite(str(path), np.zeros((2**13, 2**13, 3), np.uint8))
    tracemalloc.start()
    with pytest.raises(BadInput, match="is no strip of 16x8 pixels"):
        read_strip(path, 2, 8, 8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
