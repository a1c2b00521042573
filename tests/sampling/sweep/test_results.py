from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from vidfill.errors import BadInput
from vidfill.sampling.sweep.measures import measures_with
from vidfill.sampling.sweep.results import (
    COMPARISON_COLUMNS,
    ComparisonRow,
    as_csv,
    read_sweep,
    write_table,
)

OLD = Path(__file__).parent / "sweep_of_0.1"  # two completions of a clip under two masks

COLUMNS = ["schedule", "clip", "completion", "nfe", "psnr", "improved", "verdict"]
TEXTS = ("schedule", "clip", "verdict")
COUNTS = ("completion", "nfe")
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
    with (tmp_path / "clips.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == ROWS
    for typed, row in zip(
        parquet.read_table(tmp_path / "clips.parquet").to_pylist(), ROWS, strict=True
    ):
        for column, text in row.items():
            value = typed[column]
            if text == "nan":
                assert math.isnan(value)
            else:
                kind = str if column in TEXTS else int if column in COUNTS else float
                assert value == (kind(text) if text else None)


@pytest.mark.parametrize("rows", [ROWS, []])
def test_each_column_has_its_type_with_and_without_rows(
    tmp_path: Path, rows: list[dict[str, str]]
) -> None:
    write_table(tmp_path, "clips", COLUMNS, rows)
    for field in parquet.read_schema(tmp_path / "clips.parquet"):
        wanted = pa.string() if field.name in TEXTS else pa.float64()
        assert field.type == (pa.int64() if field.name in COUNTS else wanted)


@pytest.mark.parametrize("improved", [0.0, 0.5, None])
def test_a_comparison_is_read_as_it_was_written(improved: float | None) -> None:
    row = ComparisonRow(
        masks="box",
        schedule="ddim:2",
        reference="ddim:1",
        measure="psnr",
        clips=3,
        difference=-1.5,
        low=-math.inf,
        high=2.0,
        improved=improved,
        margin=None,
        verdict="no worse",
    )
    text = as_csv(COMPARISON_COLUMNS, [row.texts()]).decode()
    (line,) = csv.DictReader(io.StringIO(text))
    assert ComparisonRow.model_validate(line) == row


def test_a_sweep_of_version_0_1_is_read() -> None:
    sweep = read_sweep(OLD)
    assert [row.name for row in sweep.baselines] == ["fill", "classic", "mean", "autoencoder"]
    assert [row.name for row in sweep.schedules] == ["ddim:2", "ddim:2+resample(n=1)"]
    assert list(sweep.measures) == measures_with([], completions=2)
    assert sweep.best.name == "ddim:2" and sweep.best["nfe"] == 2 and sweep.best["clips"] == 2
    assert sweep.hole_psnr["mean", "video_0_00000_variable"] == pytest.approx(5.2, abs=0.2)
    (kept,) = sweep.about.kept
    assert sweep.frames(sweep.slug("ddim:2+resample(n=1)"), kept).shape == (3, 16, 16, 3)
    assert sweep.spread("mean", kept)[sweep.mask(kept) == 1].any()
    verdicts = {line["verdict"] for line in sweep.comparison}
    assert sweep.about.reference == "ddim:2" and "undecided" in verdicts


def drop(field: str) -> Callable[[dict[str, Any]], object]:
    return lambda about: about.pop(field)


def put(**fields: object) -> Callable[[dict[str, Any]], object]:
    return lambda about: about.update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("reference"), "sweep.json: field reference is missing"),
        (put(completions="2"), "sweep.json: completions is '2': .* integer"),
        (put(kept=[1]), "sweep.json: kept.0 is 1: .* string"),
        (put(clip={"frames": 3, "height": 16}), "sweep.json: field clip.width is missing"),
        (put(schedules=[]), "sweep.json: schedules is .*at least 1"),
        (put(without_value={"psnr": 0.5}), "sweep.json: without_value.psnr is 0.5"),
        (put(kept=["../../mine"]), "sweep.json: kept.0 is '../../mine'"),
        (put(reference="ddim:9"), "sweep.json: reference is 'ddim:9', which is no schedule"),
    ],
)
def test_a_record_with_a_field_that_is_missing_or_wrong_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    shutil.copytree(OLD, tmp_path / "sweep")
    about = json.loads((OLD / "sweep.json").read_text())
    change(about)
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(about))
    with pytest.raises(BadInput, match=f"is no finished sweep .{message}"):
        read_sweep(tmp_path / "sweep")


@pytest.mark.parametrize(
    ("name", "before", "after", "message"),
    [
        ("clips.csv", ",0,", ",none,", "clips.csv: line 2: completion is 'none'"),
        ("clips.csv", "psnr_hole", "psnr", "the columns of clips.csv are not schedule,clip"),
        ("results.csv", "mean,1,", "mean,much,", "results.csv: line 4: nfe is 'much'"),
        ("comparison.csv", "undecided", "unsure", "comparison.csv: line 2: verdict is 'unsure'"),
        ("sweep.json", "{", "", "sweep.json: Invalid JSON"),
    ],
)
def test_a_table_with_a_wrong_value_is_refused(
    tmp_path: Path, name: str, before: str, after: str, message: str
) -> None:
    shutil.copytree(OLD, tmp_path / "sweep")
    content = (OLD / name).read_text()
    assert before in content
    (tmp_path / "sweep" / name).write_text(content.replace(before, after, 1))
    with pytest.raises(BadInput, match=message):
        read_sweep(tmp_path / "sweep")
