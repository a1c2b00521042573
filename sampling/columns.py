"""The tables of a sweep: each as CSV, and the same as Parquet with typed columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from .. import jobs

Row = dict[str, str]

TEXTS = ("schedule", "clip", "masks", "reference", "measure", "verdict")
COUNTS = ("completion", "nfe", "clips")


def write_table(folder: Path, name: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Write NAME.parquet, then NAME.csv: the same values, each file whole or not at all."""
    with jobs.aside(folder / f"{name}.parquet") as partial:
        parquet.write_table(as_arrow(columns, rows), partial)
    jobs.write_atomically(folder / f"{name}.csv", as_csv(columns, rows))


def as_csv(columns: Sequence[str], rows: Sequence[Row]) -> bytes:
    """A header, then a line for each row."""
    content = io.StringIO()
    writer = csv.DictWriter(content, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue().encode()


def as_arrow(columns: Sequence[str], rows: Sequence[Row]) -> pa.Table:
    """The same, `TEXTS` as strings, `COUNTS` as int64 and all else as float64; "" is null."""
    arrays = []
    for column in columns:
        texts = [row[column] or None for row in rows]
        if column in TEXTS:
            arrays.append(pa.array(texts, pa.string()))
        elif column in COUNTS:
            arrays.append(pa.array([text and int(text) for text in texts], pa.int64()))
        else:
            arrays.append(pa.array([text and float(text) for text in texts], pa.float64()))
    return pa.Table.from_arrays(arrays, names=list(columns))
