from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import parquet
from vidfill.sampling.sweep.rows import COUNTS, TEXTS, as_arrow, as_csv, write_table

COLUMNS = ["schedule", "clip", "completion", "nfe", "psnr", "improved", "verdict"]
ROWS = [
    dict(zip(COLUMNS, row, strict=True))
    for row in (
        ("ddpm:50(variance=large)+resample(n=4,below=0.5)", "a,b", "0", "11000", "21.5", "", "no"),
        ('dpmpp:20 "x"', "é", "3", "0", "nan", "0.875", ""),
        ("ddim:1", "c", "12", "1", "-inf", "1e-05", "as good"),
    )
]


def test_parquet_and_csv_hold_the_same_values(tmp_path: Path) -> None:
    write_table(tmp_path, "clips", COLUMNS, ROWS)
    table = parquet.read_table(tmp_path / "clips.parquet")
    again = arrow_csv.read_csv(
        tmp_path / "clips.csv",
        convert_options=arrow_csv.ConvertOptions(
            column_types=table.schema, null_values=[""], strings_can_be_null=True
        ),
    )
    assert again.schema == table.schema
    for ours, theirs in zip(table.to_pylist(), again.to_pylist(), strict=True):
        for column, value in ours.items():
            same_nan = value != value and theirs[column] != theirs[column]
            assert same_nan or value == theirs[column], column


def test_each_column_has_its_type() -> None:
    table = as_arrow(COLUMNS, ROWS)
    for field in table.schema:
        wanted = pa.string() if field.name in TEXTS else pa.float64()
        assert field.type == (pa.int64() if field.name in COUNTS else wanted)
    (first, second, third) = table.to_pylist()
    assert first["nfe"] == 11000 and first["improved"] is None
    assert math.isnan(second["psnr"]) and second["verdict"] is None
    assert third["psnr"] == -math.inf and third["improved"] == 1e-5


def test_a_csv_is_read_back_as_it_was() -> None:
    content = as_csv(COLUMNS, ROWS).decode()
    assert list(csv.DictReader(io.StringIO(content))) == ROWS


def test_a_table_without_rows_keeps_its_columns_and_types(tmp_path: Path) -> None:
    write_table(tmp_path, "comparison", COLUMNS, [])
    schema = parquet.read_schema(tmp_path / "comparison.parquet")
    assert schema == as_arrow(COLUMNS, ROWS).schema
