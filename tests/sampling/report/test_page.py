from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from vidfill.errors import BadInput
from vidfill.sampling.report.drawings import plan_drawings
from vidfill.sampling.sweep.measures import front_of, measures_with
from vidfill.sampling.sweep.results import Sweep, read_sweep

Element = ElementTree.Element
MakeSweep = Callable[..., Path]
PageOf = Callable[[Path], Element]
Rows = list[dict[str, str]]
ChangeResults = Callable[[Path, Callable[[Rows], Rows]], None]

MEASURES = measures_with([])


@pytest.fixture(scope="module")
def found(sweep: Path) -> Sweep:
    return read_sweep(sweep)


def names_of(found: Sweep) -> list[str]:
    return [row.name for row in found.schedules]


def text_of(element: Element) -> str:
    return "".join(element.itertext())


def rows_of(page: Element, table: str = "results") -> list[Element]:
    rows = page.findall(f".//table[@id='{table}']/tbody/tr")
    return [row for row in rows if row.get("class") != "group"]


def films_of(player: Element, kind: str = "") -> dict[str, Element]:
    films = player.findall(f".//div[@class='films {kind}']/div")
    return {text_of(film.findall("span")[0]): film for film in films}


def picture_in(film: Element, flags: int) -> np.ndarray:
    source = film.findall(".//img")[0].get("src", "").partition("base64,")[2]
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(source), np.uint8), flags)
    assert picture is not None
    return picture


def test_page_needs_nothing_beside_itself(page: Element) -> None:
    tags = {element.tag for element in page.iter()}
    assert not tags & {"link", "iframe", "object", "embed", "video", "audio", "base"}
    for element in page.iter():
        assert "href" not in element.attrib and "srcset" not in element.attrib
        assert element.get("src", "data:").startswith("data:")
    templates = Path(__file__).parents[3] / "sampling/report/templates"
    for file in templates.iterdir():
        assert not re.search(r"url\(|@import|https?:|\|\s*safe", file.read_text()), file


WICKED = ["<script>alert(1)</script>", '"><img src="x" onerror="alert(1)">', "'{{ 7 * 7 }}&lt;"]


@pytest.mark.parametrize("wicked", WICKED)
def test_text_from_a_sweep_is_text_in_its_page(
    make_sweep: MakeSweep, page_of: PageOf, tmp_path: Path, wicked: str
) -> None:
    def page_with(name: str, text: str) -> Element:
        about: dict[str, Any] = dict.fromkeys(("model", "shards", "device"), text)
        about |= {"autoencoder": {text: text}, "masks": [text, "variable"]}
        about |= {"completions": 2, "without_value": {text: 1}}
        about |= {"clip": {"frames": 4, "height": 16, "width": 16}}
        folder = make_sweep(
            tmp_path / name,
            kept=["a_00000_stationary", "b_00000_variable"],
            **about,
        )
        return page_of(folder)

    def shape_of(page: Element) -> list[tuple[str, list[str]]]:
        return [(element.tag, sorted(element.attrib)) for element in page.iter()]

    harmless, page = page_with("harmless", "TEXT"), page_with("wicked", wicked)
    assert len(shape_of(page)) == len(shape_of(harmless))
    assert all(
        ours == theirs for ours, theirs in zip(shape_of(page), shape_of(harmless), strict=True)
    )
    counts = text_of(harmless).count("TEXT"), text_of(page).count(wicked)
    assert counts[0] == counts[1] > 15


def test_a_schedule_that_is_none_is_refused(
    make_sweep: MakeSweep, change_results: ChangeResults, tmp_path: Path
) -> None:
    make_sweep(tmp_path, kept=[], schedules=["ddim:5", WICKED[0]])
    with pytest.raises(BadInput, match="cannot read this schedule"):
        plan_drawings(read_sweep(tmp_path))
    change_results(tmp_path, lambda rows: [*rows, rows[-1] | {"schedule": "ddim:9"}])
    with pytest.raises(BadInput, match=r"results.csv has a row ddim:9, of which sweep.json knows"):
        read_sweep(tmp_path)


def test_table_has_the_values_of_results_csv(found: Sweep, page: Element) -> None:
    expected = [*found.baselines, *found.schedules]
    rows = rows_of(page)
    assert [text_of(row[0]) for row in rows] == [row.name for row in expected]
    for cells, row in zip(rows, expected, strict=True):
        for cell, measure in zip(cells[1:], MEASURES, strict=True):
            (data,) = cell.iter("data")
            assert data.get("value") == row.texts[measure.column]
            assert text_of(cell) == f"{row[measure.column]:,.{measure.digits}f}"


def test_rows_are_in_one_order_everywhere_the_cheapest_first(
    make_sweep: MakeSweep, page_of: PageOf, tmp_path: Path
) -> None:
    folder = make_sweep(tmp_path, completions=2)
    about = json.loads((folder / "sweep.json").read_text())
    about["schedules"].reverse()
    (folder / "sweep.json").write_text(json.dumps(about))
    page, names = page_of(folder), names_of(read_sweep(folder))[::-1]
    assert [text_of(row[0]) for row in rows_of(page)][4:] == names
    assert [text_of(row[0]) for row in rows_of(page, "answer")] == names[1:] * 2
    compared = [text_of(row[0]) for row in rows_of(page, "comparison")]
    assert compared == [name for name in names[1:] for _ in range(2)] * 2
    for player in page.findall(".//details"):
        assert list(films_of(player))[-4:] == list(films_of(player, "spreads"))[-4:] == names


def test_best_schedule_of_each_column_is_bold_and_no_baseline_is(
    found: Sweep, page: Element
) -> None:
    rows = {text_of(row[0]): row[1:] for row in rows_of(page)}
    for index, measure in enumerate(MEASURES):
        bold = {name for name, cells in rows.items() if cells[index].find("strong") is not None}
        ranked = sorted(found.schedules, key=lambda row: row[measure.column])
        assert bold == {1: {ranked[-1].name}, -1: {ranked[0].name}, 0: set()}[measure.better]


def test_sweep_of_one_schedule_is_compared_with_nothing(
    make_sweep: MakeSweep, page_of: PageOf, tmp_path: Path
) -> None:
    page = page_of(make_sweep(tmp_path, schedules=["ddim:5"]))
    assert not page.findall(".//td/strong")
    assert text_of(page).count("One schedule has nothing to be compared with.") == 2
    assert "The only schedule, ddim:5, reaches" in text_of(page)


def test_summary_states_the_best_schedule_and_its_gain_over_fill(
    found: Sweep, page: Element
) -> None:
    best = max(found.schedules, key=lambda row: row["psnr_hole"])
    gain = best["psnr_hole"] - found.baselines[0]["psnr_hole"]
    summary = text_of(page.findall(".//p[@class='summary']")[0])
    assert best.name in summary
    assert f"{abs(gain):.2f} dB {'above' if gain >= 0 else 'below'} fill" in summary


def test_page_says_that_the_time_is_the_networks_without_decoding(page: Element) -> None:
    assert "the network's share of the wall time of sampling" in text_of(page)
    assert "without decoding" in text_of(page)


def test_schedules_on_the_front_are_marked_in_the_table(found: Sweep, page: Element) -> None:
    assert found.lead.column == "temporal_error"  # there is no LPIPS
    wanted = {row.name for row in front_of(found.schedules, "nfe", found.lead)}
    rows = page.findall(".//table[@id='results']//tr[@class='front']")
    assert {text_of(row[0]) for row in rows} == wanted


def test_column_without_a_value_is_left_out_and_a_single_one_shown_as_missing(
    make_sweep: MakeSweep, change_results: ChangeResults, page_of: PageOf, tmp_path: Path
) -> None:
    make_sweep(tmp_path, without_value={"ssim_65": 7})

    def lose(rows: Rows) -> Rows:
        lost = [row | {"ssim_65": "nan"} for row in rows]
        return [*lost[:-1], lost[-1] | {"temporal_error": "nan"}]

    change_results(tmp_path, lose)
    page = page_of(tmp_path)
    heads = [text_of(button) for button in page.findall(".//table[@id='results']//button")]
    assert heads == ["Schedule", *(m.title for m in MEASURES if m.column != "ssim_65")]
    missing = [cell for row in rows_of(page) for cell in row if text_of(cell) == "–"]
    assert len(missing) == 1
    assert "7 examples of SSIM 65" in text_of(page)
    for drawing in plan_drawings(read_sweep(tmp_path))[:2]:
        assert drawing.draw()


def test_comparison_csv_is_in_the_page_as_a_reader_wants_it(found: Sweep, page: Element) -> None:
    first, *_, last = names_of(found)
    rows = rows_of(page, "comparison")
    row = next(row for row in rows if text_of(row[0]) == last)
    assert [text_of(cell) for cell in row] == [
        *(last, first, "stationary", "Temporal error", "7"),
        *("−1.50", "−2.00 … −1.00", "±0.25", "88%", "better"),
    ]
    selects = page.findall(".//p[@data-table='comparison']//select")
    offered = {
        int(select.get("data-column", "")): [text_of(option) for option in select]
        for select in selects
    }
    texts = {column: dict.fromkeys(text_of(row[column]) for row in rows) for column in (0, 2, 3)}
    assert offered == {column: ["all", *several] for column, several in texts.items()}


def test_the_cheapest_schedule_that_no_leading_measure_finds_worse_is_named(
    make_sweep: MakeSweep, page_of: PageOf, found: Sweep, tmp_path: Path
) -> None:
    names = names_of(found)
    wrong, answer, _, reference = names  # of 20, 25, 30 and 35 evaluations
    verdicts = {
        (wrong, "colour_error"): "undecided",
        (answer, "colour_error"): "as good",
        (answer, "temporal_error"): "no worse",
    }
    folder = make_sweep(tmp_path / "some", reference=reference, verdicts=verdicts, kept=[])
    page = page_of(folder)
    rows = rows_of(page, "answer")
    assert [[text_of(cell) for cell in row[:4]] for row in rows[:3]] == [
        [names[0], "stationary", "20", "1/1.75"],
        [names[1], "stationary", "25", "1/1.4"],
        [names[2], "stationary", "30", "1/1.17"],
    ]
    assert [row.get("class") for row in rows] == ["", "holds", "holds"] * 2
    assert text_of(rows[1][4]) == "no worse−2.00 … −1.00"
    for family in ("stationary", "variable"):
        said = f"under {family} masks {answer} is the cheapest schedule shown to be no worse than "
        assert f"{said}{reference}, at 1/1.4 of its NFE" in text_of(page)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        (0, "no schedule is cheaper than ddpm:5"),
        (1, "ddpm:5, the only cheaper schedule, is not shown to be no worse"),
        (3, "none of the 3 cheaper schedules is shown to be no worse"),
    ],
)
def test_no_schedule_is_named_where_none_is_cheaper_and_no_worse(
    make_sweep: MakeSweep,
    page_of: PageOf,
    found: Sweep,
    tmp_path: Path,
    reference: int,
    said: str,
) -> None:
    names = names_of(found)
    verdicts = {(name, "temporal_error"): "worse" for name in names}
    folder = make_sweep(tmp_path, reference=names[reference], verdicts=verdicts, kept=[])
    assert said in text_of(page_of(folder))


def test_each_kept_clip_has_a_player_of_all_its_frames(found: Sweep, page: Element) -> None:
    players = page.findall(".//details[@class='player']")
    assert [text_of(player[0]) for player in players] == list(found.about.kept)
    assert [player.get("open") is not None for player in players] == [True, False]
    for player, clip in zip(players, found.about.kept, strict=True):
        (slider,) = player.iter("input")
        assert slider.get("max") == "3"
        films = films_of(player)
        results = ["classic", "mean", "autoencoder", *names_of(found)]
        assert list(films) == ["masked", "ground truth", *results]
        for name in results:
            assert f"{found.hole_psnr[name, clip]:.1f} dB" in text_of(films[name])
        shown = picture_in(films["ground truth"], cv2.IMREAD_COLOR)
        truth = cv2.imread(str(found.folder / "frames" / "truth" / f"{clip}.png"))
        assert truth is not None and shown.shape == truth.shape
        smooth = [
            cv2.resize(strip, None, fx=1 / 8, fy=1 / 8, interpolation=cv2.INTER_AREA)
            for strip in (shown, truth)
        ]  # JPEG keeps blocks' means, not this noise
        assert np.abs(smooth[0].astype(float) - smooth[1]).mean() < 8


def test_each_kept_clip_shows_the_spread_of_its_completions(
    make_sweep: MakeSweep, page_of: PageOf, page: Element, tmp_path: Path
) -> None:
    folder = make_sweep(tmp_path, completions=3)
    several, found = page_of(folder), read_sweep(folder)
    for player, clip in zip(several.findall(".//details"), found.about.kept, strict=True):
        films = films_of(player, "spreads")
        assert list(films) == ["mean", *names_of(found)]
        hole = np.concatenate(found.mask(clip), axis=1) == 1
        maps = {
            name: np.concatenate(found.spread(found.slug(name), clip), axis=1) for name in films
        }
        most = math.ceil(np.percentile([spread[hole] for spread in maps.values()], 99))
        assert f"0  {most} and more; beside a name" in text_of(player)
        for name, spread in maps.items():
            shown = picture_in(films[name], cv2.IMREAD_GRAYSCALE)
            assert shown.shape == spread.shape
            # What is bright in the hole is where the completions differ; JPEG adds its own noise.
            assert np.corrcoef(shown[hole].astype(float), spread[hole])[0, 1] > 0.8
    said = "3 of each example under each schedule, averaged within the example first"
    assert said in text_of(several)
    assert not films_of(page, "spreads")
