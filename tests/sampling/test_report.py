from __future__ import annotations

import base64
import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from matplotlib.text import Annotation, Text
from vidfill import jobs
from vidfill.sampling import figures, report, results
from vidfill.sampling.page import render_page

FRAMES, SIZE = 4, 16
BASELINES = ("fill", "classic", "mean", "autoencoder")
FAMILY = ("ddpm:5", "ddpm:5+resample(n=4)", "ddpm:5+resample(n=10)", "ddim:5")
MEASURES = results.measures_with([])
KEPT = ("a_00000_stationary", "b_00000_variable")
ABOUT = {
    "model": "runs/train",
    "shards": "runs/shards",
    "autoencoder": {"name": "shipped", "sha256": "0123456789abcdef"},
    "networks": [],
    "reference": "ddpm:5",
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
    **about: object,
) -> Path:
    """A finished sweep's folder, its numbers and pictures made up."""
    random = np.random.default_rng(0)
    slugs = {name: re.sub(r"[^\w.]+", "-", name).strip("-") for name in schedules}
    rows, clips = [], []
    for nfe, name in enumerate((*BASELINES, *schedules)):
        numbers = [f"{value:.6g}" for value in random.uniform(1, 40, len(MEASURES) - 2)]
        rows.append([name, str(5 * nfe), *numbers, "7"])
        clips += [[name, clip, str(5 * nfe), *numbers] for clip in kept]
    measures = [measure.column for measure in MEASURES]
    write_csv(folder / "results.csv", ["schedule", *measures], rows)
    write_csv(folder / "clips.csv", ["schedule", "clip", *measures[:-1]], clips)
    compared = [
        *("stationary", schedules[-1], schedules[0], "temporal_error", "7"),
        *("-1.5", "-2", "-1", "0.875", "0.25", "better"),
    ]
    write_csv(folder / "comparison.csv", list(results.COMPARED), [compared])
    for slug in ("truth", "masked", "mask", *BASELINES, *slugs.values()):
        for clip in kept:
            strip = random.integers(0, 256, (SIZE, FRAMES * SIZE, 3), np.uint8)
            if slug == "mask":
                strip[:, :] = 0
                strip[4:8, 4:8] = 255
            write_picture(folder / "frames" / slug / f"{clip}.png", strip)
    entries = [{"schedule": name, "slug": slug, "nfe": 5} for name, slug in slugs.items()]
    written = {**ABOUT, "kept": list(kept), "schedules": entries, **about}
    (folder / "sweep.json").write_text(json.dumps(written))
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
    sweep = results.read_sweep(folder)
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
    sweep = results.read_sweep(write_sweep(tmp_path, kept=kept))
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
    sweep = results.read_sweep(tmp_path)
    for drawing in report.plan_drawings(sweep)[2:]:
        assert clips[1] in drawing.caption
    for drawing in report.plan_drawings(sweep, asked=clips[2])[2:]:
        assert clips[2] in drawing.caption
    with pytest.raises(jobs.BadInput, match="clip is nonsense; the sweep kept a_00000_variable"):
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
    png = figures.draw_film([figures.Strip("row", "", frames)], whole, shown=[0, 1])
    printed = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    times = figures.WIDEST // 8
    last = printed[-figures.GAP - 6 * times : -figures.GAP, -figures.GAP - 8 * times : -figures.GAP]
    np.testing.assert_array_equal(last, frames[1].repeat(times, 0).repeat(times, 1))


def test_outline_separates_the_hole_from_the_visible_and_nothing_else() -> None:
    mask = np.random.default_rng(0).integers(0, 2, (5, 7)).astype(bool)
    unit_edges = set()
    for start, stop in figures.hole_outline(mask):
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
        figures.Point("DDPM", f"n={n}", 50.0 * (n + 1), (30 - 9 / (n + 1), 5.0 + n % 2))
        for n in range(9)
    ]
    points += [figures.Point("DDIM", str(nfe), float(nfe), (20.0, 6.0)) for nfe in (50, 51, 90)]
    references = (("fill", 20.0), ("classic", 20.1), ("mean", 20.1), ("autoencoder", 30.0))
    panels = [figures.Panel("first", references), figures.Panel("second", references)]
    figure = figures.quality_figure(points, [points[:9]], panels)
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
        results.Row(str(index), {"nfe": str(cost), "temporal_error": str(value)})
        for index, (cost, value) in enumerate(pairs)
    ]
    rows.append(results.Row("no value", {"nfe": "0", "temporal_error": "nan"}))
    front = {row.name for row in results.front_of(rows, "nfe", measure)}
    for index, (cost, value) in enumerate(pairs):
        beaten = any(c <= cost and v <= value and (c, v) != (cost, value) for c, v in pairs)
        assert (str(index) in front) == (not beaten)
    assert "no value" not in front


def test_schedules_on_the_front_are_marked_in_the_table(
    sweep: Path, page: ElementTree.Element
) -> None:
    found = results.read_sweep(sweep)
    assert found.lead.column == "temporal_error"  # there is no LPIPS
    wanted = {row.name for row in results.front_of(found.schedules, "nfe", found.lead)}
    rows = page.findall(".//table[@id='results']//tr[@class='front']")
    assert {text_of(row[0]) for row in rows} == wanted


def test_a_family_resamples_as_far_up_alike(tmp_path: Path) -> None:
    half = [f"ddim:5+resample(n={n},below=0.5)" for n in (1, 4, 10)]
    write_sweep(tmp_path, schedules=["ddim:5", "ddim:5+resample(n=4)", *half])
    page = undrawn_page(tmp_path)
    assert "ddim:5+resample(n=0,below=0.5) with n resamplings" in text_of(page)


def test_comparison_csv_is_in_the_page_as_a_reader_wants_it(page: ElementTree.Element) -> None:
    (row,) = page.findall(".//table[@id='comparison']/tbody/tr")
    assert [text_of(cell) for cell in row] == [
        *(FAMILY[-1], FAMILY[0], "stationary", "Temporal error", "7"),
        *("-1.50", "-2.00 … -1.00", "88%", "better"),
    ]
    selects = page.findall(".//p[@data-table='comparison']//select")
    assert [text_of(select[1]) for select in selects] == [
        *(FAMILY[-1], FAMILY[0], "stationary", "Temporal error", "better"),
    ]
    columns = [int(select.get("data-column", "")) for select in selects]
    assert [text_of(row[column]) for column in columns] == [text_of(s[1]) for s in selects]


def test_each_kept_clip_has_a_player_of_all_its_frames(
    sweep: Path, page: ElementTree.Element
) -> None:
    players = page.findall(".//details[@class='player']")
    assert [text_of(player[0]) for player in players] == list(KEPT)
    assert [player.get("open") is not None for player in players] == [True, False]
    found = results.read_sweep(sweep)
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
        figures.Point("DDPM", f"n={n}", float(cost), (float(value),))
        for n, (cost, value) in enumerate(random.uniform(1, 100, (12, 2)))
    ]
    front = [figures.Point("DDPM", "best", 0.5, (50.0,)), figures.Point("DDPM", "b", 90.0, (0.1,))]
    panel = figures.Panel("error", (("fill", 120.0),))
    figure = figures.front_figure([[*points, *front]], [panel], [(front, "seconds")])
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
    with pytest.raises(jobs.BadInput, match=r"results.csv has no row ddim:5"):
        results.read_sweep(tmp_path)


def test_folder_of_something_else_is_not_written_into(tmp_path: Path, sweep: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(jobs.BadInput, match="not empty"):
        report.report(report.ReportConfig(sweep, out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_same_command_writes_the_same_report_again(sweep: Path, page: ElementTree.Element) -> None:
    assert page is not None
    before = {path: path.read_bytes() for path in (sweep / "report").iterdir()}
    report.report(report.ReportConfig(sweep))
    assert before == {path: path.read_bytes() for path in (sweep / "report").iterdir()}
