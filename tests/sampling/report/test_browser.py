"""The page in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vidfill.sampling.report.drawings import plan_drawings
from vidfill.sampling.report.page import render_page
from vidfill.sampling.report.run import cheapest_first
from vidfill.sampling.sweep.measures import front_of
from vidfill.sampling.sweep.results import read_sweep

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine"),
]
WIDTHS = {"phone": 390, "desktop": 1280}

BROWSED = """<!DOCTYPE html><meta charset="utf-8"/>
<iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>
<script>
const frame = document.querySelector("iframe");
const pass = seconds => new Promise(done => setTimeout(done, 1000 * seconds));
frame.onload = async () => {{
  const {{ contentDocument: document, contentWindow: window }} = frame;
  const all = (what, within = document) => [...within.querySelectorAll(what)];
  const texts = elements => elements.map(element => element.textContent);
  const shown = table => all(`#${{table}} tbody:last-child tr:not(.group):not([hidden])`);
  const set = (control, property, value) => {{
    control[property] = value;
    control.dispatchEvent(new window.Event("input", {{ bubbles: true }}));
  }};
  const act = async () => {{ {script} }};
  const answer = await act().catch(error => "error: " + error);
  frame.parentNode.dataset.answer = JSON.stringify(answer);
}};
</script>
"""  # in a frame: a window of Chromium's is no narrower than 500 pixels


def browse(folder: Path, script: str, width: int = WIDTHS["desktop"]) -> Any:
    """What a script's `return` gives once it ran in a sweep's page; time passes in no time."""
    found = cheapest_first(read_sweep(folder))
    drawings = [drawing for drawing in plan_drawings(found) if drawing.file == "front.png"]
    page = render_page(found, drawings, [drawing.draw() for drawing in drawings])
    file = folder / "browsed.html"
    file.write_text(BROWSED.format(width=width, page=html.escape(page), script=script))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,950"]
    options += [f"--user-data-dir={folder / 'chromium'}", "--virtual-time-budget=60000"]
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    answer = re.search(r'data-answer="([^"]*)"', done.stdout)
    assert answer, done.stderr
    return json.loads(html.unescape(answer[1]))


WICKED = ("<script>alert(1)</script>", '"><img src="x" onerror="alert(1)">')
KEPT = [f"{text.replace('/', '')}_00000_box" for text in WICKED]  # a slash is refused on reading


@pytest.fixture(scope="module")
def browsed(
    make_sweep: Callable[..., Path],
    change_results: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A sweep of several completions, in which one value is missing, its texts wicked."""
    folder = make_sweep(
        tmp_path_factory.mktemp("browsed"),
        completions=3,
        verdicts={("ddpm:5+resample(n=4)", "temporal_error"): "worse"},
        kept=KEPT,
        model=WICKED[0],
        shards=WICKED[1],
        device="".join(WICKED),
        autoencoder=dict.fromkeys(WICKED, WICKED[0]),
        masks=WICKED,
        without_value=dict.fromkeys(WICKED, 1),
    )
    change_results(folder, lambda rows: [*rows[:-2], rows[-2] | {"colour_error": "nan"}, rows[-1]])
    return folder


def test_no_text_of_a_sweep_becomes_an_element(browsed: Path) -> None:
    script = """
    const handlers = all("*").flatMap(one => [...one.attributes])
      .filter(attribute => attribute.name.startsWith("on"));
    const images = all("img").filter(one => !one.src.startsWith("data:image/"));
    return [all("script").length, handlers.length, images.length, texts(all("summary")),
      document.title];
    """
    scripts, handlers, images, clips, title = browse(browsed, script)
    assert (scripts, handlers, images) == (1, 0, 0)  # the script is the page's own
    assert clips == KEPT
    assert title == f"Schedules compared: {WICKED[0]}"


def test_a_first_click_on_a_column_sorts_the_best_first_and_another_turns_the_order(
    browsed: Path,
) -> None:
    found = read_sweep(browsed)
    at_first, heads = browse(
        browsed,
        """
        const sorted = all("[aria-sort]").map(head => head.textContent + head.ariaSort);
        const names = () => texts(shown("results").map(row => row.cells[0]));
        all("#answer thead button")[0].click();  // another table's order is its own
        return [sorted, all("#results thead th").map(head => {
          const button = head.querySelector("button");
          const sign = () => [head.getAttribute("aria-sort"),
            window.getComputedStyle(button, "::after").content.at(-2)];
          const before = sign();
          button.click();
          const first = [names(), ...sign()];
          button.click();
          return [texts([button])[0], before, first, [names(), ...sign()]];
        })];
        """,
    )
    by_title = {measure.title: measure for measure in found.measures}
    arrows = {"ascending": "▲", "descending": "▼"}
    for title, before, (first, *state), (second, *turned) in heads[1:]:
        assert before == [None, "⇅"], title
        measure = by_title[title]
        order = ["ascending", "descending"][:: -1 if measure.better == 1 else 1]
        assert [state, turned] == [[name, arrows[name]] for name in order], title
        values = {row.name: row[measure.column] for row in found.schedules}
        missing = [name for name, value in values.items() if np.isnan(value)]
        for names, direction in ((first, order[0]), (second, order[1])):
            known = [values[name] for name in names if name not in missing]
            assert known == sorted(known, reverse=direction == "descending"), title
            assert names[len(known) :] == missing
    _, _, (first, *_), (second, *_) = heads[0]
    assert first == second[::-1] == sorted(row.name for row in found.schedules)
    assert at_first == ["NFE↓ evaluationsascending"]  # the page's own order


def test_filters_leave_the_rows_that_pass_all_of_them(browsed: Path) -> None:
    found = read_sweep(browsed)
    names = [row.name for row in found.schedules]
    front = {row.name for row in front_of(found.schedules, "nfe", found.lead)}
    first, named, both, compared, worse, again = browse(
        browsed,
        """
        const names = () => texts(shown("results").map(row => row.cells[0]));
        const [search, front] = all(".filters[data-table=results] input");
        const answers = [names()];
        set(search, "value", " resample ");
        answers.push(names());
        set(front, "checked", true);
        answers.push(names());
        const cells = () => shown("comparison").map(row => texts([...row.cells]));
        answers.push(cells());
        const [schedule, masks, measure, verdict] = all("[data-table=comparison] select");
        set(verdict, "value", "worse");
        answers.push(cells());
        set(schedule, "value", "ddim:5");
        answers.push(cells());
        return answers;
        """,
    )
    assert first == names
    assert named == [name for name in names if "resample" in name]
    assert both == [name for name in named if name in front]
    # At first the lead measure's comparisons are shown.
    assert {row[3] for row in compared} == {found.lead.title} and len(compared) == 6
    assert [row[0] for row in worse] == ["ddpm:5+resample(n=4)"] * 2
    assert again == []


def test_a_player_shows_one_frame_of_all_films_at_a_time(browsed: Path) -> None:
    script = """
    const player = all(".player")[0];
    const [range] = all("input", player), [play] = all(".play", player);
    const state = () => {
      const films = all(".film", player).map(film => {
        const [image] = all("img", film);
        const gone = film.getBoundingClientRect().left - image.getBoundingClientRect().left;
        return Math.round(100 * gone / film.getBoundingClientRect().width) / 100;
      });
      return [Number(range.value), all("output", player)[0].textContent, [...new Set(films)]];
    };
    const states = [state()];
    all(".on", player)[0].click(); states.push(state());
    all(".back", player)[0].click(); all(".back", player)[0].click(); states.push(state());
    set(range, "value", 2); states.push(state());
    play.click(); await pass(0.7); states.push(state());
    play.click(); await pass(0.7); states.push(state());
    return [states, play.textContent, all(".film", player).length];
    """
    states, label, films = browse(browsed, script)
    assert films == 2 + 3 + 4 + 1 + 4  # inputs, baselines, schedules; the spread of all but two
    frames = [0, 1, 3, 2, (2 + 5) % 4, (2 + 5) % 4]  # a frame each 0.125 s
    assert states == [[frame, f"frame {frame}", [frame]] for frame in frames]
    assert label == "Play"


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_the_page_is_as_wide_as_the_screen_and_its_tables_slide(browsed: Path, width: int) -> None:
    script = """
    all("details").forEach(one => { one.open = true; });
    const wide = document.documentElement;
    const beyond = all("main *").filter(one => !one.closest(".scroll, .film")).filter(one => {
      const box = one.getBoundingClientRect();
      return box.right > window.innerWidth + 1 || box.left < -1;
    });
    const names = all("#results tbody th[scope=row]").map(one => one.getBoundingClientRect().width);
    return [window.innerWidth, wide.scrollWidth, texts(beyond), Math.max(...names)];
    """
    inner, scrolled, beyond, name = browse(browsed, script, width)
    assert (inner, beyond) == (width, []) and scrolled <= width
    assert name < width / 2  # the name that stays while a table slides leaves room for it
