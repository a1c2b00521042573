from __future__ import annotations

import base64
import csv
import html
import json
import math
import re
import shutil
import subprocess
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from matplotlib.text import Annotation, Text
from vidfill.errors import BadInput
from vidfill.sampling.report import run as report
from vidfill.sampling.report.film import GAP, WIDEST, Strip, draw_film, hole_outline
from vidfill.sampling.report.page import render_page
from vidfill.sampling.report.plots import Panel, Point, front_figure, quality_figure
from vidfill.sampling.sweep.kept import write_spread
from vidfill.sampling.sweep.measures import COMPARED, Row, clip_columns, front_of, measures_with
from vidfill.sampling.sweep.results import read_sweep

FRAMES, SIZE = 4, 16
BASELINES = ("fill", "classic", "mean", "autoencoder")
FAMILY = ("ddpm:5", "ddpm:5+resample(n=4)", "ddpm:5+resample(n=10)", "ddim:5")
MEASURES = measures_with([])
KEPT = ("a_00000_stationary", "b_00000_variable")
ABOUT = {
    "model": "runs/train",
    "shards": "runs/shards",
    "autoencoder": {"name": "shipped", "sha256": "0123456789abcdef"},
    "networks": [],
    "completions": 1,
    "without_value": {},
    "masks": ["stationary", "variable"],
    "clip": {"frames": FRAMES, "height": SIZE, "width": SIZE},
    "baselines": list(BASELINES),
    "timesteps": 1000,
    "seconds": 90.0,
    "device": "cpu",
}


def write_sweep(
    folder: Path,
    schedules: Sequence[str] = FAMILY,
    kept: Sequence[str] = KEPT,
    verdicts: Mapping[tuple[str, str], str] = types.MappingProxyType({}),
    **about: object,
) -> Path:
    """A finished sweep's folder, its numbers and pictures made up.

    Each schedule is better than the reference by each measure, where `verdicts` says no other.
    """
    random = np.random.default_rng(0)
    slugs = {name: re.sub(r"[^\w.]+", "-", name).strip("-") for name in schedules}
    written = {**ABOUT, "reference": schedules[0], "kept": list(kept), **about}
    reference, completions = str(written["reference"]), int(str(written["completions"]))
    measures = measures_with([], completions)
    columns = ["schedule", *(measure.column for measure in measures)]
    own = clip_columns(measures)
    rows, clips = [], []
    for nfe, name in enumerate((*BASELINES, *schedules)):
        numbers = [f"{value:.6g}" for value in random.uniform(1, 40, len(columns))]
        row = dict(zip(columns, numbers, strict=True))
        row |= {"schedule": name, "nfe": str(5 * nfe), "clips": "7"}
        rows.append([row[column] for column in columns])
        of_clips = [row | {"clip": clip, "completion": "0"} for clip in kept]
        clips += [[line[column] for column in own] for line in of_clips]
    write_csv(folder / "results.csv", columns, rows)
    write_csv(folder / "clips.csv", own, clips)
    compared = [
        [
            *(family, name, reference, measure, "7", "-1.5", "-2", "-1", "0.875", "0.25"),
            verdicts.get((name, measure), "better"),
        ]
        for family in ("stationary", "variable")
        for name in schedules
        for measure in ("temporal_error", "colour_error")
        if name != reference
    ]
    write_csv(folder / "comparison.csv", list(COMPARED), compared)
    for slug in ("truth", "masked", "mask", *BASELINES, *slugs.values()):
        for clip in kept:
            strip = random.integers(0, 256, (SIZE, FRAMES * SIZE, 3), np.uint8)
            if slug == "mask":
                strip[:, :] = 0
                strip[4:8, 4:8] = 255
            write_picture(folder / "frames" / slug / f"{clip}.png", strip)
            if completions > 1:
                smooth = cv2.blur(strip[..., 0].astype(float), (5, 5))
                spread = np.stack(np.split(smooth, FRAMES, axis=1))
                write_spread(folder / "spread" / slug / f"{clip}.png", spread)
    entries = [{"schedule": name, "slug": slug, "nfe": 5} for name, slug in slugs.items()]
    (folder / "sweep.json").write_text(json.dumps({**written, "schedules": entries}))
    return folder


def write_csv(path: Path, columns: list[str], rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def write_picture(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture)


def results_of(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return {row["schedule"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def page(sweep: Path) -> ElementTree.Element:
    return tree_of(report.report(report.ReportConfig(sweep)).read_text())


def tree_of(page: str) -> ElementTree.Element:
    """A page is well-formed XML, too."""
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))


def undrawn_page(folder: Path) -> ElementTree.Element:
    """A sweep's page with empty pictures."""
    sweep = read_sweep(folder)
    drawings = report.plan_drawings(sweep)
    return tree_of(render_page(sweep, drawings, [b""] * len(drawings)))


def text_of(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def rows_of(page: ElementTree.Element) -> dict[str, list[ElementTree.Element]]:
    """The cells of each row of the table, by the row's name."""
    rows = page.findall(".//table[@id='results']/tbody/tr")
    return {text_of(row[0]): row.findall("td") for row in rows if row.findall("td")}


def titles_of(page: ElementTree.Element) -> list[str]:
    return [text_of(title) for title in page.findall(".//figcaption/strong")]


def test_page_needs_nothing_beside_itself(page: ElementTree.Element) -> None:
    tags = {element.tag for element in page.iter()}
    assert not tags & {"link", "iframe", "object", "embed", "video", "audio", "base"}
    for element in page.iter():
        assert "href" not in element.attrib and "srcset" not in element.attrib
        assert element.get("src", "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?:", ElementTree.tostring(page, "unicode"))


def test_table_has_the_values_of_results_csv(sweep: Path, page: ElementTree.Element) -> None:
    expected = results_of(sweep)
    rows = rows_of(page)
    assert list(rows) == list(expected) == [*BASELINES, *FAMILY]
    for name, cells in rows.items():
        exact = [data.get("value") for cell in cells for data in cell.iter("data")]
        assert exact == [expected[name][measure.column] for measure in MEASURES]
        for cell, value, measure in zip(cells, exact, MEASURES, strict=True):
            assert text_of(cell) == f"{float(value or 'nan'):,.{measure.digits}f}"


def test_best_schedule_of_each_column_is_bold_and_no_baseline_is(
    sweep: Path, page: ElementTree.Element
) -> None:
    expected, rows = results_of(sweep), rows_of(page)
    for index, measure in enumerate(MEASURES):
        bold = {name for name, cells in rows.items() if cells[index].find("strong") is not None}
        ranked = sorted(FAMILY, key=lambda name: float(expected[name][measure.column]))
        best = {1: {ranked[-1]}, -1: {ranked[0]}, 0: set()}[measure.better]
        assert bold == best


def test_summary_states_the_best_schedule_and_its_gain_over_fill(
    sweep: Path, page: ElementTree.Element
) -> None:
    quality = {name: float(row["psnr_hole"]) for name, row in results_of(sweep).items()}
    best = max(FAMILY, key=lambda name: quality[name])
    gain = quality[best] - quality["fill"]
    summary = text_of(page.find(".//p[@class='summary']") or pytest.fail("no summary"))
    assert best in summary
    assert f"{abs(gain):.2f} dB {'above' if gain >= 0 else 'below'} fill" in summary


def test_pictures_in_the_page_are_the_written_figures(
    sweep: Path, page: ElementTree.Element
) -> None:
    names = ["front.png", "figure2.png", "figure3.png", "figure4.png", "quality-nfe.png"]
    found = sorted(path.name for path in (sweep / "report").iterdir())
    assert found == sorted([*names, "index.html", "job.json"])
    written = {(sweep / "report" / name).read_bytes() for name in names}
    sources = [image.get("src", "") for image in page.findall(".//figure//img")]
    assert {base64.b64decode(source.partition("base64,")[2]) for source in sources} == written
    for picture in written:
        assert cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR) is not None


def test_text_from_the_sweep_is_escaped(tmp_path: Path) -> None:
    wicked = "<script>alert('1')</script> & \"more\""
    page = undrawn_page(
        write_sweep(tmp_path, model=wicked, device=wicked, autoencoder={wicked: wicked})
    )
    assert len(page.findall(".//script")) == 1  # ours
    assert text_of(page).count(wicked) == 5  # the title, the model, the device, a key, its value


def test_figure_4_shows_the_largest_family_in_order_of_n(page: ElementTree.Element) -> None:
    assert titles_of(page)[-1] == "Figure 4. The number of resamplings."
    assert "ddpm:5 with n resamplings" in text_of(page.findall(".//figcaption")[-1])


def test_sweep_of_one_schedule_has_a_report(tmp_path: Path) -> None:
    write_sweep(tmp_path, schedules=["ddim:5"])
    page = tree_of(report.report(report.ReportConfig(tmp_path)).read_text())
    assert titles_of(page)[-1] == "Figure 4. The schedules."
    assert not page.findall(".//td/strong")


@pytest.mark.parametrize(
    ("kept", "shown"),
    [
        (["a_00000_stationary"], ["figure2.png", "figure4.png"]),
        (["a_00000_variable"], ["figure3.png", "figure4.png"]),
        ([], []),
    ],
)
def test_each_family_among_the_kept_clips_has_its_figure(
    tmp_path: Path, kept: list[str], shown: list[str]
) -> None:
    sweep = read_sweep(write_sweep(tmp_path, kept=kept))
    files = [drawing.file for drawing in report.plan_drawings(sweep)]
    assert files == ["front.png", "quality-nfe.png", *shown]


def test_clip_shown_is_the_one_whose_hole_hides_the_most_or_the_one_asked_for(
    tmp_path: Path,
) -> None:
    clips = ["a_00000_variable", "b_00000_variable", "c_00000_variable"]
    write_sweep(tmp_path, kept=clips)
    for clip in clips:
        truth = cv2.imread(str(tmp_path / "frames/truth" / f"{clip}.png"))
        off = 40 if clip == clips[1] else 0
        visible = np.full_like(truth, 128)
        write_picture(tmp_path / "frames/truth" / f"{clip}.png", visible)
        write_picture(tmp_path / "frames/fill" / f"{clip}.png", visible + np.uint8(off))
    sweep = read_sweep(tmp_path)
    for drawing in report.plan_drawings(sweep)[2:]:
        assert clips[1] in drawing.caption
    for drawing in report.plan_drawings(sweep, asked=clips[2])[2:]:
        assert clips[2] in drawing.caption
    with pytest.raises(BadInput, match="clip is nonsense; the sweep kept a_00000_variable"):
        report.plan_drawings(sweep, asked="nonsense")


def test_report_is_written_again_of_another_clip_or_of_a_moved_sweep(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep", schedules=["ddim:5"], kept=KEPT)
    first = report.ReportConfig(tmp_path / "sweep", clip=KEPT[0])
    assert KEPT[0] in report.report(first).read_text()
    (tmp_path / "sweep").rename(tmp_path / "moved")
    page = report.report(report.ReportConfig(tmp_path / "moved", clip=KEPT[1]))
    assert page == tmp_path / "moved" / "report" / "index.html"


def test_page_says_that_the_time_is_the_networks_without_decoding(
    page: ElementTree.Element,
) -> None:
    said = text_of(page)
    assert "the network's share of the wall time of sampling" in said
    assert "without decoding" in said


def test_printed_frames_are_the_frames_own_pixels() -> None:
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)
    whole = np.zeros(frames.shape[:3], np.uint8)
    png = draw_film([Strip("row", "", frames)], whole, shown=[0, 1])
    printed = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    times = WIDEST // 8
    last = printed[-GAP - 6 * times : -GAP, -GAP - 8 * times : -GAP]
    np.testing.assert_array_equal(last, frames[1].repeat(times, 0).repeat(times, 1))


def test_outline_separates_the_hole_from_the_visible_and_nothing_else() -> None:
    mask = np.random.default_rng(0).integers(0, 2, (5, 7)).astype(bool)
    unit_edges = set()
    for start, stop in hole_outline(mask):
        steps = int(abs(stop - start).sum())
        for step in range(steps):
            unit_edges.add((*(start + (stop - start) * step // steps), int(start[0] == stop[0])))
    padded = np.pad(mask, 1)
    for y in range(6):
        for x in range(8):
            assert ((x, y, 0) in unit_edges) == (padded[y, x + 1] != padded[y + 1, x + 1])
            assert ((x, y, 1) in unit_edges) == (padded[y + 1, x] != padded[y + 1, x + 1])


def test_names_in_the_plot_cover_neither_each_other_nor_a_point() -> None:
    points = [
        Point("DDPM", f"n={n}", 50.0 * (n + 1), (30 - 9 / (n + 1), 5.0 + n % 2)) for n in range(9)
    ]
    points += [Point("DDIM", str(nfe), float(nfe), (20.0, 6.0)) for nfe in (50, 51, 90)]
    references = (("fill", 20.0), ("classic", 20.1), ("mean", 20.1), ("autoencoder", 30.0))
    panels = [Panel("first", references), Panel("second", references)]
    figure = quality_figure(points, [points[:9]], panels)
    figure.draw_without_rendering()
    for index, axes in enumerate(figure.axes):
        names = [text for text in axes.texts if isinstance(text, Annotation)]
        assert len(names) == len(points) + len(references)
        boxes = [Text.get_window_extent(name) for name in names]  # without its leader
        dots = [axes.transData.transform((p.cost, p.values[index])) for p in points]
        for number, box in enumerate(boxes):
            assert not box.count_overlaps(boxes[:number])
            assert not box.count_contains(dots)


def test_the_front_is_what_nothing_else_beats() -> None:
    measure = next(measure for measure in MEASURES if measure.column == "temporal_error")
    random = np.random.default_rng(0)
    pairs = [(int(cost), round(value, 1)) for cost, value in random.uniform(1, 9, (60, 2))]
    rows = [
        Row(str(index), {"nfe": str(cost), "temporal_error": str(value)})
        for index, (cost, value) in enumerate(pairs)
    ]
    rows.append(Row("no value", {"nfe": "0", "temporal_error": "nan"}))
    front = {row.name for row in front_of(rows, "nfe", measure)}
    for index, (cost, value) in enumerate(pairs):
        beaten = any(c <= cost and v <= value and (c, v) != (cost, value) for c, v in pairs)
        assert (str(index) in front) == (not beaten)
    assert "no value" not in front


def test_schedules_on_the_front_are_marked_in_the_table(
    sweep: Path, page: ElementTree.Element
) -> None:
    found = read_sweep(sweep)
    assert found.lead.column == "temporal_error"  # there is no LPIPS
    wanted = {row.name for row in front_of(found.schedules, "nfe", found.lead)}
    rows = page.findall(".//table[@id='results']//tr[@class='front']")
    assert {text_of(row[0]) for row in rows} == wanted


def test_a_family_resamples_as_far_up_alike(tmp_path: Path) -> None:
    half = [f"ddim:5+resample(n={n},below=0.5)" for n in (1, 4, 10)]
    write_sweep(tmp_path, schedules=["ddim:5", "ddim:5+resample(n=4)", *half])
    page = undrawn_page(tmp_path)
    assert "ddim:5+resample(n=0,below=0.5) with n resamplings" in text_of(page)


def test_comparison_csv_is_in_the_page_as_a_reader_wants_it(page: ElementTree.Element) -> None:
    rows = page.findall(".//table[@id='comparison']/tbody/tr")
    row = next(row for row in rows if text_of(row[0]) == FAMILY[-1])
    assert [text_of(cell) for cell in row] == [
        *(FAMILY[-1], FAMILY[0], "stationary", "Temporal error", "7"),
        *("-1.50", "-2.00 … -1.00", "±0.25", "88%", "better"),
    ]
    selects = page.findall(".//p[@data-table='comparison']//select")
    for select in selects:
        column = int(select.get("data-column", ""))
        offered = [text_of(option) for option in select]
        assert offered == ["all", *dict.fromkeys(text_of(row[column]) for row in rows)]
    assert len(selects) == 5


def test_the_cheapest_schedule_that_no_leading_measure_finds_worse_is_named(
    tmp_path: Path,
) -> None:
    reference, answer = FAMILY[3], FAMILY[1]  # of 35 and of 25 evaluations
    verdicts = {
        (FAMILY[0], "colour_error"): "undecided",
        (answer, "colour_error"): "as good",
        (answer, "temporal_error"): "no worse",
    }
    page = undrawn_page(
        write_sweep(tmp_path / "some", reference=reference, verdicts=verdicts, kept=[])
    )
    rows = page.findall(".//table[@id='answer']/tbody/tr")
    assert [[text_of(cell) for cell in row[:4]] for row in rows[:3]] == [
        [FAMILY[0], "stationary", "20", "1/1.75"],
        [FAMILY[1], "stationary", "25", "1/1.4"],
        [FAMILY[2], "stationary", "30", "1/1.17"],
    ]
    assert [row.get("class") for row in rows] == ["", "holds", "holds"] * 2
    assert text_of(rows[1][4]) == "no worse-2.00 … -1.00"
    for family in ("stationary", "variable"):
        said = f"under {family} masks {answer} is the cheapest schedule shown to be no worse than "
        assert f"{said}{reference}, at 1/1.4 of its NFE" in text_of(page)
    verdicts = {(name, "temporal_error"): "worse" for name in FAMILY}
    page = undrawn_page(
        write_sweep(tmp_path / "none", reference=reference, verdicts=verdicts, kept=[])
    )
    assert "none of the 3 cheaper schedules is shown to be no worse" in text_of(page)
    page = undrawn_page(write_sweep(tmp_path / "dearer", kept=[]))
    assert f"no schedule is cheaper than {FAMILY[0]}" in text_of(page)


def test_each_kept_clip_has_a_player_of_all_its_frames(
    sweep: Path, page: ElementTree.Element
) -> None:
    players = page.findall(".//details[@class='player']")
    assert [text_of(player[0]) for player in players] == list(KEPT)
    assert [player.get("open") is not None for player in players] == [True, False]
    found = read_sweep(sweep)
    for player, clip in zip(players, KEPT, strict=True):
        (slider,) = player.iter("input")
        assert slider.get("max") == str(FRAMES - 1)
        films = player.findall(".//div[@class='films']/div")
        names = [text_of(film.find("span") or film[1]) for film in films]
        assert names == ["masked", "ground truth", *BASELINES[1:], *FAMILY]
        for film, name in zip(films[2:], names[2:], strict=True):
            assert f"{found.hole_psnr[name, clip]:.1f} dB" in text_of(film)
        source = films[1].findall(".//img")[0].get("src", "").partition("base64,")[2]
        shown = cv2.imdecode(np.frombuffer(base64.b64decode(source), np.uint8), 1)
        truth = cv2.imread(str(found.strip("truth", clip)))
        assert truth is not None and shown is not None and shown.shape == truth.shape
        smooth = [
            cv2.resize(strip, None, fx=1 / 8, fy=1 / 8, interpolation=cv2.INTER_AREA)
            for strip in (shown, truth)
        ]  # JPEG keeps blocks' means, not this noise
        assert np.abs(smooth[0].astype(float) - smooth[1]).mean() < 8


def test_each_kept_clip_shows_the_spread_of_its_completions(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, completions=3)
    page = undrawn_page(folder)
    found = read_sweep(folder)
    players = page.findall(".//details[@class='player']")
    for player, clip in zip(players, KEPT, strict=True):
        films = player.findall(".//div[@class='films spreads']/div")
        names = [text_of(film.find("span") or film[1]) for film in films]
        assert names == ["mean", *FAMILY]
        hole = np.concatenate(found.mask(clip), axis=1) == 1
        most = math.ceil(
            np.percentile(
                [found.spread(found.slug(n), clip)[found.mask(clip) == 1] for n in names], 99
            )
        )
        maps = [np.concatenate(found.spread(found.slug(n), clip), axis=1) for n in names]
        assert f"0  {most} and more; beside a name" in text_of(player)
        for film, spread in zip(films, maps, strict=True):
            source = film.findall(".//img")[0].get("src", "").partition("base64,")[2]
            shown = cv2.imdecode(np.frombuffer(base64.b64decode(source), np.uint8), 0)
            assert shown is not None and shown.shape == spread.shape
            # What is bright in the hole is where the completions differ; JPEG adds its own noise.
            assert np.corrcoef(shown[hole].astype(float), spread[hole])[0, 1] > 0.8
    assert "3 of each clip under each schedule, averaged within the clip first" in text_of(page)
    assert not undrawn_page(write_sweep(tmp_path / "one")).findall(".//div[@class='films spreads']")


def test_values_that_are_missing_are_shown_as_such_and_no_line_is_drawn(tmp_path: Path) -> None:
    write_sweep(tmp_path, without_value={"ssim_65": 7})
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["ssim_65"] = "nan"
    rows[-1]["temporal_error"] = "nan"
    write_csv(tmp_path / "results.csv", list(rows[0]), [list(row.values()) for row in rows])
    page = tree_of(report.report(report.ReportConfig(tmp_path)).read_text())
    column = [measure.column for measure in MEASURES].index("ssim_65")
    assert {text_of(cells[column]) for cells in rows_of(page).values()} == {"–"}
    assert "7 clips of SSIM 65" in text_of(page)


def test_names_on_the_front_cover_no_point() -> None:
    random = np.random.default_rng(1)
    points = [
        Point("DDPM", f"n={n}", float(cost), (float(value),))
        for n, (cost, value) in enumerate(random.uniform(1, 100, (12, 2)))
    ]
    front = [Point("DDPM", "best", 0.5, (50.0,)), Point("DDPM", "b", 90.0, (0.1,))]
    panel = Panel("error", (("fill", 120.0),))
    figure = front_figure([[*points, *front]], [panel], [(front, "seconds")])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    named = [text for text in axes.texts if isinstance(text, Annotation)]
    assert sorted(text.get_text() for text in named) == ["b", "best", "fill"]
    dots = [axes.transData.transform((p.cost, p.values[0])) for p in (*points, *front)]
    for name in named:
        assert not Text.get_window_extent(name).count_contains(dots)


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("sweep.json", "sweep.json is missing"),
        ("results.csv", "results.csv is missing"),
        ("clips.csv", "clips.csv is missing"),
        ("comparison.csv", "comparison.csv is missing"),
        ("frames/ddim-5/b_00000_variable.png", "frames/ddim-5/b_00000_variable.png is missing"),
    ],
)
def test_unfinished_sweep_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str, named: str
) -> None:
    write_sweep(tmp_path / "sweep")
    (tmp_path / "sweep" / missing).unlink()
    assert report.main([str(tmp_path / "sweep"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "is no finished sweep" in error and named in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_sweep_without_a_schedules_row_is_refused(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    (tmp_path / "results.csv").write_text("\n".join(lines[:-1]))
    with pytest.raises(BadInput, match=r"results.csv has no row ddim:5"):
        read_sweep(tmp_path)


# In a browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
in_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
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
    found = read_sweep(folder)
    drawings = [drawing for drawing in report.plan_drawings(found) if drawing.file == "front.png"]
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


@pytest.fixture(scope="module")
def browsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of several completions, in which one value is missing."""
    folder = write_sweep(
        tmp_path_factory.mktemp("browsed"),
        completions=3,
        verdicts={(FAMILY[1], "temporal_error"): "worse"},
    )
    lines = (folder / "results.csv").read_text().splitlines()
    cells = [line.split(",") for line in lines]
    cells[-2][cells[0].index("colour_error")] = "nan"
    write_csv(folder / "results.csv", cells[0], cells[1:])
    return folder


@in_chromium
def test_a_tap_on_a_column_sorts_the_schedules_by_it_and_another_turns_them(browsed: Path) -> None:
    rows = results_of(browsed)
    columns = list(rows[FAMILY[0]])
    orders = browse(
        browsed,
        """
        const names = () => texts(shown("results").map(row => row.cells[0]));
        return all("#results thead th").map(head => {
          head.click();
          const risen = names();
          head.dispatchEvent(new window.KeyboardEvent("keydown", { key: "Enter" }));
          return [risen, names(), head.getAttribute("aria-sort")];
        });
        """,
    )
    assert len(orders) == len(columns)
    for column, (risen, fallen, state) in zip(columns, orders, strict=True):
        assert state == "descending"
        if column == "schedule":
            assert set(risen) == set(FAMILY) and fallen == risen[::-1]
            continue
        values = {name: float(rows[name][column]) for name in FAMILY}
        known = [name for name in FAMILY if not np.isnan(values[name])]
        for order, sign in ((risen, 1), (fallen, -1)):
            found = [sign * values[name] for name in order[: len(known)]]
            assert found == sorted(found), column
            assert order[len(known) :] == [name for name in FAMILY if name not in known]


@in_chromium
def test_filters_leave_the_rows_that_pass_all_of_them(browsed: Path) -> None:
    found = read_sweep(browsed)
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
        const [schedule, against, masks, measure, verdict] = all("[data-table=comparison] select");
        set(verdict, "value", "worse");
        answers.push(cells());
        set(schedule, "value", "ddim:5");
        answers.push(cells());
        return answers;
        """,
    )
    assert first == list(FAMILY)
    assert named == [name for name in FAMILY if "resample" in name]
    assert both == [name for name in named if name in front]
    # At first the lead measure's comparisons are shown.
    assert {row[3] for row in compared} == {found.lead.title} and len(compared) == 6
    assert [row[0] for row in worse] == [FAMILY[1]] * 2
    assert again == []


@in_chromium
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
    assert films == 2 + len(BASELINES) - 1 + len(FAMILY) + 1 + len(FAMILY)
    frames = [0, 1, FRAMES - 1, 2, (2 + 5) % FRAMES, (2 + 5) % FRAMES]  # a frame each 0.125 s
    assert states == [[frame, f"frame {frame}", [frame]] for frame in frames]
    assert label == "Play"


@in_chromium
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


def test_folder_of_something_else_is_not_written_into(tmp_path: Path, sweep: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        report.report(report.ReportConfig(sweep, out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_same_command_writes_the_same_report_again(sweep: Path, page: ElementTree.Element) -> None:
    assert page is not None
    before = {path: path.read_bytes() for path in (sweep / "report").iterdir()}
    report.report(report.ReportConfig(sweep))
    assert before == {path: path.read_bytes() for path in (sweep / "report").iterdir()}
