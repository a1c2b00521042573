"""A report's tables: what schedules reached, and how they compare; sorted and filtered by hand."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from .results import Measure, Row, Sweep, best_of, front_of


def code(text: object) -> str:
    return f"<code>{html.escape(str(text))}</code>"


def render_results(sweep: Sweep) -> str:
    """HTML of results.csv, with what filters it."""
    heads = "".join(
        f'<th scope="col">{m.title}{f"&#160;{m.arrow}" if m.arrow else ""}'
        f'<span class="unit">{m.unit}</span></th>'
        for m in sweep.measures
    )
    bests = _best_texts(sweep)
    return (
        '<p class="filters" data-table="results"><label>Schedules with '
        '<input type="search" size="12" placeholder="all"/></label> '
        '<label><input type="checkbox"/> only the front</label></p>\n'
        '<div class="scroll wide"><table id="results" class="sortable">'
        f'<thead><tr><th scope="col">Schedule</th>{heads}</tr></thead>\n'
        f'<tbody class="baselines">{_group("Baselines", sweep)}'
        f"{_rows(sweep, sweep.baselines, {})}</tbody>\n"
        f'<tbody class="schedules">{_group("Schedules", sweep)}'
        f"{_rows(sweep, sweep.schedules, bests)}</tbody></table></div>\n"
        '<p class="key">Arrows point to better; bold is the best schedule of a column. ◆ is on '
        f"the front of {sweep.lead.title} against NFE. A tap on a column's name sorts by it.</p>"
    )


def _group(title: str, sweep: Sweep) -> str:
    columns = len(sweep.measures) + 1
    return f'<tr class="group"><th scope="rowgroup" colspan="{columns}">{title}</th></tr>\n'


def _rows(sweep: Sweep, rows: Sequence[Row], bests: Mapping[str, str]) -> str:
    front = front_of(sweep.schedules, "nfe", sweep.lead)
    return "".join(
        f'<tr class="{"front" if row in front else ""}"><th scope="row">{code(row.name)}</th>'
        + "".join(_cell(row, measure, bests.get(measure.column)) for measure in sweep.measures)
        + "</tr>\n"
        for row in rows
    )


def _cell(row: Row, measure: Measure, best: str | None) -> str:
    """A value as a reader wants it, and to a machine exactly as results.csv has it."""
    text = rounded(row, measure)
    value = f'<data value="{html.escape(row.texts[measure.column])}">{text}</data>'
    return f"<td>{f'<strong>{value}</strong>' if text == best else value}</td>"


def _best_texts(sweep: Sweep) -> dict[str, str]:
    """By column the best value, as it is shown: schedules that show the same are equally good."""
    if len(sweep.schedules) < 2:
        return {}
    bests = {m: best_of(sweep.schedules, m) for m in sweep.measures if m.better}
    return {m.column: rounded(row, m) for m, row in bests.items() if row}


def rounded(row: Row, measure: Measure) -> str:
    value = row[measure.column]
    return "–" if math.isnan(value) else f"{value:,.{measure.digits}f}"


COMPARED = {
    "schedule": "Schedule",
    "reference": "Against",
    "masks": "Masks",
    "measure": "Measure",
    "clips": "Clips",
    "difference": "Difference",
    "interval": "95 % interval",
    "improved": "Improved",
    "verdict": "Verdict",
}
CHOSEN = ("schedule", "reference", "masks", "measure", "verdict")  # what the rows are filtered by
TEXT = ' class="text"'


def render_comparison(sweep: Sweep) -> str:
    """HTML of comparison.csv, with what filters it; nothing where nothing was compared."""
    if not sweep.comparison:
        return "<p>One schedule has nothing to be compared with.</p>"
    measures = {measure.column: measure for measure in sweep.measures}
    lines = [_compared(line, measures[line["measure"]]) for line in sweep.comparison]
    heads = "".join(
        f'<th scope="col"{TEXT if column in CHOSEN else ""}>{title}</th>'
        for column, title in COMPARED.items()
    )
    rows = "".join(
        f'<tr class="{line["verdict"].replace(" ", "-")}">'
        + "".join(_compared_cell(column, line) for column in COMPARED)
        + "</tr>\n"
        for line in lines
    )
    chosen = "".join(_select(column, lines, sweep) for column in CHOSEN)
    return (
        f'<p class="filters" data-table="comparison">{chosen}</p>\n'
        '<div class="scroll wide"><table id="comparison" class="sortable">'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n"
        '<p class="key">The mean over the clips of schedule minus reference, its 95 % bootstrap '
        "interval, and the share of the clips that the schedule does strictly better, each family "
        "of masks for itself. “As good”: the interval lies within the margin that was named "
        "beforehand; “no worse”: its worse end does.</p>"
    )


def _compared(line: Mapping[str, str], measure: Measure) -> dict[str, str]:
    """What is shown of a line of comparison.csv."""
    difference, low, high = (
        f"{float(line[field]):+.{measure.digits}f}".replace("inf", "∞").replace("nan", "–")
        for field in ("difference", "low", "high")
    )
    improved = f"{float(line['improved']):.0%}" if line["improved"] else "–"
    return dict(line) | {
        "measure": measure.title,
        "difference": difference,
        "interval": f"{low} … {high}",
        "improved": improved.replace("nan%", "–"),
    }


def _compared_cell(column: str, line: Mapping[str, str]) -> str:
    text = html.escape(line[column])
    if column in ("difference", "improved", "clips"):
        value = text.rstrip("%").replace("∞", "Infinity").replace("–", "NaN")
        return f'<td><data value="{value}">{text}</data></td>'
    if column in ("schedule", "reference"):
        text = f"<code>{text}</code>"
    return f"<td{TEXT if column in CHOSEN else ''}>{text}</td>"


def _select(column: str, lines: Sequence[Mapping[str, str]], sweep: Sweep) -> str:
    selected = {sweep.lead.title: ' selected=""'}
    options = "".join(
        f"<option{selected.get(text, '')}>{html.escape(text)}</option>"
        for text in dict.fromkeys(line[column] for line in lines)
    )
    place = list(COMPARED).index(column)
    return (
        f'<label>{COMPARED[column]} <select data-column="{place}"><option value="">all</option>'
        f"{options}</select></label> "
    )


STYLE = """
.filters { display: flex; flex-wrap: wrap; gap: 0.4rem 1rem; margin: 0.5rem 0; font-size: 0.9rem; }
.filters select { max-width: 13rem; }
.wide { width: min(100vw - 2rem, 92rem); position: relative; left: 50%;
  transform: translateX(-50%); }
.wide > table { width: auto; min-width: min(100%, 60rem); margin: 0 auto; }
.wide th, .wide td { padding: 0.3rem 0.45rem; }
@media (max-width: 40rem) {
  .wide tr:not(.group) > :first-child { white-space: normal; min-width: 7.5rem;
    overflow-wrap: anywhere; }
}
.sortable thead th { cursor: pointer; }
[aria-sort="ascending"]::after { content: " ▴"; }
[aria-sort="descending"]::after { content: " ▾"; }
.front > th::after { content: " ◆"; font-size: 0.7em; }
.text { text-align: left; }
#comparison tbody tr > * { border-top: 1px solid var(--rule); }
#comparison .better > :last-child { color: var(--good); font-weight: 600; }
#comparison .worse > :last-child { color: var(--bad); font-weight: 600; }
"""

# Neither < nor an ampersand stands in it: the page is XML, too.
SCRIPT = """
const last = table => [...table.tBodies].at(-1);
const own = table => [...last(table).rows].filter(row => !row.classList.contains("group"));
const order = (a, b) => {
  if (Number.isNaN(a)) return Number.isNaN(b) ? 0 : 1;
  if (Number.isNaN(b)) return -1;
  return typeof a === "number" ? a - b : a.localeCompare(b);
};
for (const table of document.querySelectorAll(".sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const value = row => {
      const data = row.cells[column].querySelector("data");
      return data ? Number(data.value) : row.cells[column].textContent;
    };
    const sort = () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      last(table).append(...own(table).sort((a, b) => sign * order(value(a), value(b))));
    };
    head.tabIndex = 0;
    head.onclick = sort;
    head.onkeydown = event => { if (event.key === "Enter") sort(); };
  });
}
for (const box of document.querySelectorAll(".filters")) {
  const table = document.getElementById(box.dataset.table);
  const passes = (row, control) => {
    if (control.type === "checkbox")
      return !control.checked || row.classList.contains("front");
    if (control.type === "search")
      return row.cells[0].textContent.includes(control.value.trim());
    return !control.value || row.cells[control.dataset.column].textContent === control.value;
  };
  const show = () => {
    const controls = [...box.querySelectorAll("input, select")];
    own(table).forEach(row => { row.hidden = !controls.every(one => passes(row, one)); });
  };
  box.oninput = show;
  show();
}
"""
