"""A report's tables: what the schedules reached, and how they compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from ..sweep.measures import LEADING, Measure, ResultRow, best_of, front_of
from ..sweep.results import Sweep
from .markup import code

ENOUGH = ("as good", "better", "no worse")  # verdicts of a schedule that may replace the reference


@dataclass(frozen=True)
class TableHead:
    """The head of a column."""

    title: str
    unit: str = ""
    is_text: bool = False
    best_first: str = "ascending"
    """The order that a first click gives: ascending or descending."""
    sorted: bool = False
    """Whether the rows are in ascending order by it at first."""


@dataclass(frozen=True)
class TableCell:
    """A cell, its text escaped."""

    text: str | Markup
    value: str | None = None
    """The exact number, by which a column is sorted; without it, the text is."""
    note: str = ""
    is_text: bool = False
    is_best: bool = False
    kind: str = ""
    """A class, for its colour."""


@dataclass(frozen=True)
class TableRow:
    """A row; the first cell is its head."""

    name: Markup
    cells: Sequence[TableCell]
    mark: str = ""
    """A class: what a sign behind the name says of the schedule."""


@dataclass(frozen=True)
class PageTable:
    """What the template `table.html.j2` shows."""

    id: str
    heads: Sequence[TableHead]
    groups: Mapping[str, Sequence[TableRow]]
    """By title; the last is the one that is sorted and filtered."""
    choices: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """By column, the texts by which a reader can filter."""
    chosen: str = ""
    """The one chosen at first."""


def rounded(row: ResultRow, measure: Measure) -> str:
    """A value as a reader wants it."""
    value = row[measure.column]
    return "–" if math.isnan(value) else f"{value:,.{measure.digits}f}"


def tabulate_results(sweep: Sweep) -> PageTable:
    """results.csv, without the columns that have no value."""
    rows = [*sweep.baselines, *sweep.schedules]
    measures = [m for m in sweep.measures if not all(math.isnan(row[m.column]) for row in rows)]
    front = front_of(sweep.schedules, "nfe", sweep.lead)
    bests = dict[str, str]()  # as shown: schedules that show the same are equally good
    for measure in measures:
        best = best_of(sweep.schedules, measure) if measure.better else None
        if best and len(sweep.schedules) > 1:
            bests[measure.column] = rounded(best, measure)

    def fill_row(row: ResultRow, bests: Mapping[str, str]) -> TableRow:
        texts = {m.column: rounded(row, m) for m in measures}
        cells = [
            TableCell(text, row.texts[column], is_best=text == bests.get(column))
            for column, text in texts.items()
        ]
        return TableRow(code(row.name), cells, "front" if row in front else "")

    return PageTable(
        "results",
        [TableHead("Schedule", is_text=True), *map(_head, measures)],
        {
            "Baselines": [fill_row(row, {}) for row in sweep.baselines],
            "Schedules": [fill_row(row, bests) for row in sweep.schedules],
        },
    )


def _head(measure: Measure) -> TableHead:
    return TableHead(
        measure.title,
        f"{measure.arrow} {measure.unit}".strip(),
        best_first="descending" if measure.better == 1 else "ascending",
        sorted=measure.column == "nfe",
    )


Line = Mapping[str, str]  # of comparison.csv


@dataclass(frozen=True)
class Contender:
    """A schedule against the sweep's reference, under one family of masks."""

    schedule: ResultRow
    masks: str
    cost: float
    """Its NFE over the reference's."""
    lines: Mapping[str, Line]
    """By leading measure."""

    @property
    def holds(self) -> bool:
        """Whether no leading measure leaves open that it is worse."""
        return all(line["verdict"] in ENOUGH for line in self.lines.values())


def find_contenders(sweep: Sweep) -> list[Contender]:
    """By families of masks, the cheapest first."""
    reference = next(row for row in sweep.schedules if row.name == sweep.about.reference)
    families = dict.fromkeys(line["masks"] for line in sweep.comparison)
    found = []
    for masks in families:
        for row in sweep.schedules:
            lines = {
                line["measure"]: line
                for line in sweep.comparison
                if (line["masks"], line["schedule"], line["reference"])
                == (masks, row.name, reference.name)
                and line["measure"] in LEADING
            }
            if lines:
                found.append(Contender(row, masks, row["nfe"] / reference["nfe"], lines))
    return found


def answer(sweep: Sweep, contenders: Sequence[Contender]) -> Markup:
    """A sentence for each family of masks: the cheapest schedule that holds."""
    said, reference = [], code(sweep.about.reference)
    for family in dict.fromkeys(one.masks for one in contenders):
        cheaper = [one for one in contenders if one.masks == family and one.cost < 1]
        found = next((one for one in cheaper if one.holds), None)
        if found:
            outcome = Markup(
                "{} is the cheapest schedule shown to be no worse than {}, at <strong>{}</strong> "
                "of its NFE"
            ).format(code(found.schedule.name), reference, _ratio(found.cost))
        elif len(cheaper) > 1:
            outcome = Markup("none of the {} cheaper schedules is shown to be no worse than {}")
            outcome = outcome.format(len(cheaper), reference)
        elif cheaper:
            outcome = Markup("{}, the only cheaper schedule, is not shown to be no worse than {}")
            outcome = outcome.format(code(cheaper[0].schedule.name), reference)
        else:
            outcome = Markup("no schedule is cheaper than {}").format(reference)
        said.append(Markup("under {} masks {}").format(family, outcome))
    titles = [measure.title for measure in sweep.measures if measure.column in LEADING]
    *others, last = (title if title.isupper() else title.lower() for title in titles)
    names = f"{', '.join(others)} and {last}"
    return Markup("By {}, each within its margin: {}.").format(names, Markup("; ").join(said))


def tabulate_answer(sweep: Sweep, contenders: Sequence[Contender]) -> PageTable:
    """Which schedules are as good as the reference by the leading measures, at what cost."""
    measures = [measure for measure in sweep.measures if measure.column in LEADING]
    rows = []
    for one in contenders:
        cells = [
            TableCell(one.masks, is_text=True),
            TableCell(f"{one.schedule['nfe']:,.0f}", one.schedule.texts["nfe"]),
            TableCell(_ratio(one.cost), f"{one.cost:.6g}"),
        ]
        for measure in measures:
            line = one.lines[measure.column]
            note, verdict = _interval(line, measure.digits), line["verdict"]
            cells.append(TableCell(verdict, note=note, is_text=True, kind=verdict))
        rows.append(TableRow(code(one.schedule.name), cells, "holds" if one.holds else ""))
    names = [TableHead(title, is_text=True) for title in ("Schedule", "Masks")]
    compared = [TableHead(m.title, f"±{m.margin:g}", is_text=True) for m in measures]
    heads = [*names, TableHead("NFE"), TableHead("Cost"), *compared]
    return PageTable("answer", heads, {"": rows})


def _ratio(cost: float) -> str:
    return f"1/{1 / cost:,.3g}" if cost < 1 else f"{cost:,.3g}"


def tabulate_comparison(sweep: Sweep) -> PageTable:
    """comparison.csv, with what filters it."""
    measures = {measure.column: measure for measure in sweep.measures}
    lines = [line for line in sweep.comparison if line["measure"] in measures]
    heads = [
        *(TableHead(title, is_text=True) for title in ("Schedule", "Against", "Masks", "Measure")),
        *map(TableHead, ("Examples", "Difference", "95 % interval", "Margin")),
        TableHead("Improved", best_first="descending"),
        TableHead("Verdict", is_text=True),
    ]
    rows = []
    for line in lines:
        measure, improved = measures[line["measure"]], float(line["improved"] or "nan")
        cells = [
            TableCell(code(line["reference"]), is_text=True),
            TableCell(line["masks"], is_text=True),
            TableCell(measure.title, is_text=True),
            TableCell(line["clips"], line["clips"]),
            TableCell(_signed(line["difference"], measure.digits), line["difference"]),
            TableCell(_interval(line, measure.digits), line["low"]),
            TableCell(f"±{float(line['margin']):g}" if line["margin"] else "–", line["margin"]),
            TableCell("–" if math.isnan(improved) else f"{improved:.0%}", str(improved)),
            TableCell(line["verdict"], is_text=True, kind=line["verdict"]),
        ]
        rows.append(TableRow(code(line["schedule"]), cells))
    texts = {
        0: [line["schedule"] for line in lines],
        1: [line["reference"] for line in lines],
        2: [line["masks"] for line in lines],
        3: [measures[line["measure"]].title for line in lines],
        len(heads) - 1: [line["verdict"] for line in lines],
    }
    choices = {column: list(dict.fromkeys(found)) for column, found in texts.items()}
    several = {column: found for column, found in choices.items() if len(found) > 1}
    return PageTable("comparison", heads, {"": rows}, several, chosen=sweep.lead.title)


def _interval(line: Line, digits: int) -> str:
    return f"{_signed(line['low'], digits)} … {_signed(line['high'], digits)}"


def _signed(text: str, digits: int) -> str:
    written = f"{float(text):+.{digits}f}"
    return written.replace("-", "−").replace("inf", "∞").replace("+nan", "–")
