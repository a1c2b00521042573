"""The tables and records of a sweep's folder: written, read and checked."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from annotated_types import Interval
from pyarrow import csv as arrow_csv
from pyarrow import float64, int64, parquet, string
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ...data.videos import Frames, Masks
from ...errors import BadInput, describe
from ...files import PLAIN, aside, write_atomically
from ...records import parse_strictly, parse_table, read_small
from ..metrics.comparison import Verdict
from .kept import CompletionKey, Spread, SweepFolder, read_spread, read_strip
from .measures import (
    BY_COLUMN,
    LEADING,
    Measure,
    ResultRow,
    best_of,
    clip_columns,
    measures_with,
)

_TEXTS = ("schedule", "clip", "masks", "reference", "measure", "verdict")
_COUNTS = ("completion", "nfe", "clips")

OF_COST = ("nfe", "seconds_per_clip")
FARTHEST = 1e12  # from zero that anything measured lies

Line = TypeVar("Line", bound=BaseModel)


def format_value(value: str | int | float | None) -> str:
    """A value as the tables have it: a number of six digits, "" for None."""
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def _refuse_absurd(value: float) -> float:
    if abs(value) > FARTHEST:
        raise ValueError("no measure gives such a number")
    return value


_Measured = Annotated[float, AfterValidator(_refuse_absurd)]


class _MeasuredRow(BaseModel):
    """A line of a table with a column for each measure: these are the extra fields."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)
    __pydantic_extra__: dict[str, _Measured] = Field(init=False)

    schedule: str
    """Or a baseline."""


class CompletionRow(_MeasuredRow):
    """A line of clips.csv."""

    example: str = Field(alias="clip")
    completion: Annotated[int, Interval(ge=0, le=2**31)]
    nfe: Annotated[int, Interval(ge=0, le=2**31)]

    @property
    def key(self) -> CompletionKey:
        return CompletionKey(self.schedule, self.example, self.completion)

    def __getitem__(self, column: str) -> float:
        return self.__pydantic_extra__[column]

    def texts(self) -> dict[str, str]:
        values = self.model_dump(by_alias=True)
        return {column: format_value(value) for column, value in values.items()}


_NumberOrNone = Annotated[
    float | None, BeforeValidator(lambda value: None if value == "" else value)
]


class ComparisonRow(BaseModel):
    """A line of comparison.csv: a schedule compared with a reference by one measure."""

    masks: str
    """The family of masks."""
    schedule: str
    reference: str
    measure: str
    """Its column."""
    clips: int
    """Examples where both have a value."""
    difference: float
    low: float
    high: float
    improved: _NumberOrNone
    margin: _NumberOrNone
    verdict: Verdict

    def texts(self) -> dict[str, str]:
        return {column: format_value(value) for column, value in self.model_dump().items()}


LONGEST_LINE = 2**16  # characters of a table's line, at most
COMPARISON_COLUMNS = list(ComparisonRow.model_fields)


FileName = Annotated[str, PLAIN]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


FrameSide = Annotated[int, Interval(ge=1, le=2**16)]


class ClipSize(_Record):
    """Of each example."""

    frames: FrameSide
    height: FrameSide
    width: FrameSide


class ScheduleRecord(_Record):
    """A schedule in sweep.json."""

    schedule: str
    slug: FileName
    """Of its folders."""
    nfe: int


class SweepRecord(_Record):
    """sweep.json: what was swept, with what, and where its frames are."""

    model: str
    shards: str
    autoencoder: dict[str, Any]
    """Its identity: name, kind, hash, downsampling."""
    networks: list[str]
    """Of lpips and i3d, those that were there."""
    masks: list[str]
    """The families of masks."""
    clip: ClipSize
    kept: list[FileName]
    """The examples whose frames were kept."""
    completions: int
    """Of each example under each schedule."""
    schedules: list[ScheduleRecord] = Field(min_length=1)
    baselines: list[FileName]
    timesteps: int
    seconds: float
    processes: int = 1
    batch_size: int = 0
    device: str
    reference: str
    without_value: dict[str, int]
    """By column the examples without a value, the most that a schedule has."""


@dataclass(frozen=True)
class Sweep:
    """A finished sweep's folder."""

    folder: Path
    about: SweepRecord
    baselines: Sequence[ResultRow]
    schedules: Sequence[ResultRow]
    measures: Sequence[Measure]
    """Those that it has columns for."""
    hole_psnr: Mapping[tuple[str, str], float]
    """Decibels by (schedule, example), of the first completion, whose frames are kept."""
    comparison: Sequence[Mapping[str, str]]
    """The lines of comparison.csv, checked as `ComparisonRow`."""

    @functools.cached_property
    def best(self) -> ResultRow:
        """The schedule with the highest PSNR of the hole; of equals the cheapest."""
        return best_of(self.schedules, BY_COLUMN["psnr_hole"]) or self.schedules[0]

    @functools.cached_property
    def lead(self) -> Measure:
        """What schedules are judged by first."""
        by_column = {measure.column: measure for measure in self.measures}
        there = [by_column[column] for column in (*LEADING, "psnr") if column in by_column]
        return next((m for m in there if best_of(self.schedules, m)), there[-1])

    def slug(self, name: str) -> str:
        """The folder of a baseline's or a schedule's frames."""
        return next((own.slug for own in self.about.schedules if own.schedule == name), name)

    def frames(self, slug: str, example: str) -> Frames:
        path, size = SweepFolder(self.folder).strip(slug, example), self.about.clip
        return read_strip(path, size.frames, size.height, size.width)

    def spread(self, slug: str, example: str) -> Spread:
        """The map of the completions' standard deviation, in 8-bit units."""
        path, size = SweepFolder(self.folder).spread(slug, example), self.about.clip
        return read_spread(path, size.frames, size.height, size.width)

    def mask(self, example: str) -> Masks:
        return np.any(self.frames("mask", example) > 0, axis=-1).astype(np.uint8)


def read_sweep(folder: Path) -> Sweep:
    """Read a finished sweep's folder.

    Raises:
        BadInput: something that a finished sweep has is missing or malformed.
    """
    if not folder.is_dir():
        raise BadInput(f"sweep is {folder}, which is no folder: give `vidfill sweep`'s output")
    try:
        return _read(folder)
    except BadInput as error:
        raise BadInput(
            f"{folder} is no finished sweep ({error}): give the output folder of `vidfill sweep`; "
            "the same sweep command continues one that was interrupted"
        ) from error


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Names the file in an error."""
    try:
        yield
    except FileNotFoundError as error:
        raise BadInput(f"{name} is missing") from error
    except ValueError as error:
        raise BadInput(f"{name}: {describe(error)}") from error


def _read(folder: Path) -> Sweep:
    with _reading("sweep.json"):
        about = parse_strictly(SweepRecord, read_small(folder / "sweep.json"))
    schedules = [own.schedule for own in about.schedules]
    for names in ((*about.baselines, *schedules), about.kept, about.masks, about.networks):
        if len(set(names)) != len(names):
            raise BadInput("sweep.json names something twice")
    if about.reference not in schedules:
        raise BadInput(f"sweep.json: reference is {about.reference!r}, which is no schedule of it")
    measures = measures_with(about.networks, about.completions)
    columns = ["schedule", *(measure.column for measure in measures)]
    lines, _ = _read_csv(folder / "results.csv", columns, _MeasuredRow)
    results = {line["schedule"]: ResultRow(line["schedule"], line) for line in lines}
    for name in (*about.baselines, *schedules):
        if name not in results:
            raise BadInput(f"results.csv has no row {name}")
    for name in schedules:
        if not all(results[name][column] > 0 for column in OF_COST):
            raise BadInput(f"results.csv: {name} costs nothing")
    if more := results.keys() - {*about.baselines, *schedules}:
        raise BadInput(f"results.csv has a row {min(more)}, of which sweep.json knows nothing")
    _, clips = _read_csv(folder / "clips.csv", clip_columns(measures), CompletionRow)
    comparison, _ = _read_csv(folder / "comparison.csv", COMPARISON_COLUMNS, ComparisonRow)
    _check_comparison(comparison, about, measures)
    sweep = Sweep(
        folder,
        about,
        baselines=[results[name] for name in about.baselines],
        schedules=[results[name] for name in schedules],
        measures=measures,
        hole_psnr={
            (row.schedule, row.example): row["psnr_hole"] for row in clips if not row.completion
        },
        comparison=comparison,
    )
    slugs = (own.slug for own in about.schedules)
    for slug in ["truth", "masked", "mask", *about.baselines, *slugs]:
        for example in about.kept:
            if not SweepFolder(folder).strip(slug, example).is_file():
                raise BadInput(f"frames/{slug}/{example}.png is missing")
    return sweep


def _check_comparison(
    lines: Sequence[Mapping[str, str]], about: SweepRecord, measures: Sequence[Measure]
) -> None:
    """Refuse a table that lacks a row, or has one of which sweep.json knows nothing."""
    pairs = {(line["schedule"], line["reference"]) for line in lines}
    known = {own.schedule for own in about.schedules}
    columns = {line["measure"] for line in lines}
    families = {line["masks"] for line in lines}  # of the examples that were filled
    wanted = set(itertools.product(families, pairs, columns))
    found = {
        (line["masks"], (line["schedule"], line["reference"]), line["measure"]) for line in lines
    }
    there = {measure.column for measure in measures}
    lacks = lines and there.intersection(LEADING) - columns
    if (
        found != wanted
        or families.difference(about.masks)
        or lacks
        or columns - there
        or not known.issuperset(itertools.chain(*pairs))
    ):
        raise BadInput("comparison.csv has other rows than sweep.json's schedules and masks")


def _read_csv(
    path: Path, columns: Sequence[str], model: type[Line]
) -> tuple[list[dict[str, str]], list[Line]]:
    """The lines of a table, as texts and as records."""
    with _reading(path.name), path.open(newline="") as file:
        if file.readline(LONGEST_LINE).rstrip("\r\n") != ",".join(columns):
            raise BadInput(f"the columns of {path.name} are not {','.join(columns)}")
        rows = iter(lambda: file.readline(LONGEST_LINE), "")
        read = list(parse_table(rows, columns, model))
        return [texts for texts, _ in read], [record for _, record in read]


def write_table(
    folder: Path, name: str, columns: Sequence[str], rows: Sequence[Mapping[str, str]]
) -> None:
    """Write NAME.parquet, then NAME.csv, with the same values; "" is null."""
    content = as_csv(columns, rows)
    types = {
        column: string() if column in _TEXTS else int64() if column in _COUNTS else float64()
        for column in columns
    }
    options = arrow_csv.ConvertOptions(
        column_types=types, null_values=[""], strings_can_be_null=True
    )
    table = arrow_csv.read_csv(io.BytesIO(content), convert_options=options)
    with aside(folder / f"{name}.parquet") as partial:
        parquet.write_table(table, partial)
    write_atomically(folder / f"{name}.csv", content)


def as_csv(columns: Sequence[str], rows: Sequence[Mapping[str, str]], header: bool = True) -> bytes:
    content = io.StringIO()
    writer = csv.DictWriter(content, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return content.getvalue().encode()
