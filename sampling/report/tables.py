"""A report's tables: what schedules reached, and how they compare; sorted and filtered by hand."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from ..sweep.comparison import MARGINS
from ..sweep.measures import LEADING, Measure, Row, best_of, front_of
from ..sweep.results import Sweep


def code(text: object) -> str:
    return f"<code>{breakable(text)}</code>"


def breakable(text: object) -> str:
    """HTML; a schedule's line breaks before a move rather than within one."""
    return html.escape(str(text)).replace("+", "<wbr/>+")


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
    "margin": "Margin",
    "improved": "Improved",
    "verdict": "Verdict",
}
CHOSEN = ("schedule", "reference", "masks", "measure", "verdict")  # what the rows are filtered by
TEXT = ' class="text"'
ENOUGH = ("as good", "better", "no worse")  # verdicts of a schedule that may take another's place


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


def render_answer(sweep: Sweep) -> str:
    """HTML: which schedules are as good as the reference by the leading measures, at what cost."""
    measures = [measure for measure in sweep.measures if measure.column in LEADING]
    found = _against_reference(sweep)
    if not found:
        return "<p>One schedule has nothing to be compared with.</p>"
    heads = "".join(
        f'<th scope="col" class="text">{measure.title}'
        f'<span class="unit">±{MARGINS[measure.column]:g}</span></th>'
        for measure in measures
    )
    rows = "".join(_answer_row(sweep, *who, lines, measures) for who, lines in found.items())
    return (
        f"{_answer(sweep, found, measures)}\n"
        '<div class="scroll wide"><table id="answer" class="sortable"><thead><tr>'
        '<th scope="col" class="text">Schedule</th><th scope="col" class="text">Masks</th>'
        f'<th scope="col">NFE</th><th scope="col">Cost</th>{heads}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>\n"
        f'<p class="key">Against {code(sweep.about["reference"])}, clip by clip: the verdict, and '
        "under it the 95 % interval of the difference; under a measure its margin. ✓ is a schedule "
        "that is as good, better or no worse by all of them. The cost is its NFE over the "
        "reference's. Another reference: the same sweep command with another "
        f"{code('--reference')}.</p>"
    )


Lines = Mapping[str, Mapping[str, str]]  # of comparison.csv, by their measures


def _against_reference(sweep: Sweep) -> dict[tuple[str, str], Lines]:
    """By schedule and family of masks; of each family the cheapest first."""
    families = list(dict.fromkeys(line["masks"] for line in sweep.comparison))
    found: dict[tuple[str, str], dict[str, Mapping[str, str]]] = {}
    for line in sorted(
        sweep.comparison,
        key=lambda line: (families.index(line["masks"]), _nfe(sweep, line["schedule"])),
    ):
        if line["reference"] == sweep.about["reference"] and line["measure"] in LEADING:
            found.setdefault((line["schedule"], line["masks"]), {})[line["measure"]] = line
    return dict(found)


def _holds(lines: Lines) -> bool:
    return all(line["verdict"] in ENOUGH for line in lines.values())


def _answer(
    sweep: Sweep, found: Mapping[tuple[str, str], Lines], measures: Sequence[Measure]
) -> str:
    """A sentence for each family of masks: the cheapest schedule that holds."""
    said, reference = [], code(sweep.about["reference"])
    for family in dict.fromkeys(masks for _, masks in found):
        cheaper = [name for name, masks in found if masks == family and _cost(sweep, name) < 1]
        name = next((name for name in cheaper if _holds(found[name, family])), "")
        if name:
            cost = f"<strong>{_ratio(_cost(sweep, name))}</strong> of its NFE"
            outcome = f"{code(name)} is the cheapest schedule shown to be no worse than {reference}"
            outcome += f", at {cost}"
        elif cheaper:
            outcome = f"none of the {len(cheaper)} cheaper schedules is shown to be no worse than "
            outcome += reference
        else:
            outcome = f"no schedule is cheaper than {reference}"
        said.append(f"under {html.escape(family)} masks {outcome}")
    titles = [m.title if m.title.isupper() else m.title.lower() for m in measures]
    return f"<p>By {', '.join(titles)}, each within its margin: {'; '.join(said)}.</p>"


def _cost(sweep: Sweep, name: str) -> float:
    """Over the reference's."""
    return _nfe(sweep, name) / _nfe(sweep, sweep.about["reference"])


def _nfe(sweep: Sweep, name: str) -> float:
    return next(row["nfe"] for row in sweep.schedules if row.name == name)


def _ratio(cost: float) -> str:
    return f"1/{1 / cost:,.3g}" if cost < 1 else f"{cost:,.3g}"


def _answer_row(
    sweep: Sweep, name: str, masks: str, lines: Lines, measures: Sequence[Measure]
) -> str:
    cost, nfe = _cost(sweep, name), _nfe(sweep, name)
    cells = "".join(_answer_cell(lines[m.column], m) for m in measures)
    return (
        f'<tr class="{"holds" if _holds(lines) else ""}"><th scope="row">{code(name)}</th>'
        f'<td class="text">{html.escape(masks)}</td>'
        f'<td><data value="{nfe:.0f}">{nfe:,.0f}</data></td>'
        f'<td><data value="{cost:.6g}">{_ratio(cost)}</data></td>{cells}</tr>\n'
    )


def _answer_cell(line: Mapping[str, str], measure: Measure) -> str:
    verdict = line["verdict"]
    kind = verdict.replace(" ", "-")
    interval = _compared(line, measure)["interval"]
    return f'<td class="text {kind}">{verdict}<span class="unit">{interval}</span></td>'


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
        "margin": f"±{float(line['margin']):g}" if line["margin"] else "–",
        "improved": improved.replace("nan%", "–"),
    }


def _compared_cell(column: str, line: Mapping[str, str]) -> str:
    text = html.escape(line[column])
    if column in ("difference", "margin", "improved", "clips"):
        value = text.strip("±%").replace("∞", "Infinity").replace("–", "NaN")
        return f'<td><data value="{value}">{text}</data></td>'
    if column in ("schedule", "reference"):
        text = code(line[column])
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
  .wide tr:not(.group) > :first-child { white-space: normal; min-width: 8.25rem;
    overflow-wrap: anywhere; }
}
.sortable thead th { cursor: pointer; }
[aria-sort="ascending"]::after { content: " ▴"; }
[aria-sort="descending"]::after { content: " ▾"; }
.front > th::after { content: " ◆"; font-size: 0.7em; }
.text { text-align: left; }
#comparison tbody tr > *, #answer tbody tr > * { border-top: 1px solid var(--rule); }
#comparison .better > :last-child, #answer .better { color: var(--good); font-weight: 600; }
#comparison .worse > :last-child, #answer .worse { color: var(--bad); font-weight: 600; }
.holds > th::after { content: " ✓"; color: var(--good); font-weight: 600; }
"""

# Neither < nor an ampersand stands in it: the page is XML, too.
SCRIPT = """
const last = table => [...table.tBodies].at(-1);
const own = table => [...last(table).rows].filter(row => !row.classList.contains("group"));
const order = (a, b, sign) => {
  if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
  return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
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
      last(table).append(...own(table).sort((a, b) => order(value(a), value(b), sign)));
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
