from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Annotation, Text
from vidfill.errors import BadInput
from vidfill.sampling.report.drawings import group_lines, plan_drawings
from vidfill.sampling.report.film import FRAME_GAP, WIDEST, Strip, draw_film, hole_outline
from vidfill.sampling.report.plots import Panel, plot_figure, short_name
from vidfill.sampling.sweep.measures import MEASURES, ResultRow, front_of
from vidfill.sampling.sweep.results import read_sweep

MakeSweep = Callable[..., Path]
BY_COLUMN = {measure.column: measure for measure in MEASURES}


def row_of(name: str, values: Mapping[str, float]) -> ResultRow:
    return ResultRow(name, {column: str(value) for column, value in values.items()})


@pytest.mark.parametrize(
    ("kept", "shown"),
    [
        (["a_00000_stationary"], ["figure2.png", "figure4.png"]),
        (["a_00000_variable"], ["figure3.png", "figure4.png"]),
        ([], []),
    ],
)
def test_each_family_among_the_kept_clips_has_its_figure(
    make_sweep: MakeSweep, tmp_path: Path, kept: list[str], shown: list[str]
) -> None:
    sweep = read_sweep(make_sweep(tmp_path, kept=kept))
    files = [drawing.file for drawing in plan_drawings(sweep)]
    assert files == ["front.png", "quality-nfe.png", *shown]


def test_clip_shown_is_the_one_whose_hole_hides_the_most_or_the_one_asked_for(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    clips = ["a_00000_variable", "b_00000_variable", "c_00000_variable"]
    make_sweep(tmp_path, kept=clips)
    for clip in clips:
        grey = np.full((16, 64, 3), 128, np.uint8)
        off = np.uint8(40 if clip == clips[1] else 0)
        cv2.imwrite(str(tmp_path / "frames/truth" / f"{clip}.png"), grey)
        cv2.imwrite(str(tmp_path / "frames/fill" / f"{clip}.png"), grey + off)
    sweep = read_sweep(tmp_path)
    for drawing in plan_drawings(sweep)[2:]:
        assert clips[1] in drawing.caption
    for drawing in plan_drawings(sweep, clips[2])[2:]:
        assert clips[2] in drawing.caption
    with pytest.raises(BadInput, match="clip is nonsense; the sweep kept a_00000_variable"):
        plan_drawings(sweep, "nonsense")


@pytest.mark.parametrize(
    ("schedules", "title", "caption"),
    [
        (
            ["ddpm:5+resample(n=10)", "ddpm:5", "ddpm:5+resample(n=4)", "ddim:5"],
            "The number of resamplings",
            "<code>ddpm:5</code> with n resamplings",
        ),
        (
            ["ddim:5", "ddim:5+resample(n=4)"]
            + [f"ddim:5+resample(n={n},below=0.5)" for n in (1, 4, 10)],
            "The number of resamplings",
            "+resample(n=0,<wbr/>below=0.5)</code> with n resamplings",
        ),
        (["ddim:5"], "The schedules", "a row for each schedule"),
    ],
)
def test_figure_4_shows_the_largest_family(
    make_sweep: MakeSweep, tmp_path: Path, schedules: list[str], title: str, caption: str
) -> None:
    drawing = plan_drawings(read_sweep(make_sweep(tmp_path, schedules=schedules)))[-1]
    assert drawing.title == f"Figure 4. {title}" and caption in drawing.caption


def test_lines_of_a_plot_join_what_differs_only_in_n_or_only_in_steps() -> None:
    names = [
        *("ddpm:50+resample(n=10)", "ddpm:50", "ddim:50", "ddim:10", "ddim:10(eta=1)"),
        *("ddpm:50+resample(n=4)", "ddpm:25+resample(n=1)", "dpmpp:5+inject"),
        *("ddpm:9+resample(n=2,below=0.5)", "ddpm:9+resample(n=3,below=0.5)"),
    ]
    rows = [row_of(name, {"nfe": number}) for number, name in enumerate(names)]
    rows.append(row_of("ddim:7", {"nfe": 2.5}))
    lines = {name: [row.name for row in rows] for name, rows in group_lines(rows).items()}
    assert lines == {
        "ddim:10(eta=1)": ["ddim:10(eta=1)"],
        "ddim, 50, 7, 10 steps": ["ddim:50", "ddim:7", "ddim:10"],
        "ddpm:50, n = 0, 4, 10": ["ddpm:50", "ddpm:50+resample(n=4)", "ddpm:50+resample(n=10)"],
        "ddpm:25+resample(n=1)": ["ddpm:25+resample(n=1)"],
        "ddpm:9+resample(below=0.5), n = 2, 3": [names[-2], names[-1]],
        "dpmpp:5+inject": ["dpmpp:5+inject"],
    }


POINTS = st.lists(
    st.tuples(st.integers(1, 300), st.integers(0, 30)), min_size=1, max_size=25, unique=True
)


@settings(max_examples=6, deadline=None)
@given(points=POINTS, column=st.sampled_from(["temporal_error", "psnr"]))
@pytest.mark.slow
def test_names_on_the_front_cover_neither_each_other_nor_a_point(
    points: list[tuple[int, int]], column: str
) -> None:
    panel = Panel(BY_COLUMN[column], "nfe", front=True)
    rows = [
        row_of(f"ddpm:{100 + number}", {"nfe": nfe, column: value})
        for number, (nfe, value) in enumerate(points)
    ]
    baseline = row_of("fill", {"nfe": 0, column: 31.0})
    figure = plot_figure([panel], {"ddpm": rows}, [baseline])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    names = {
        text.get_text(): Text.get_window_extent(text)  # without its leader
        for text in axes.texts
        if isinstance(text, Annotation) and text.get_text() != "fill"
    }
    front = front_of(rows, "nfe", panel.measure)
    assert list(names) == [short_name(row.name) for row in front]
    boxes = list(names.values())
    dots = [axes.transData.transform((row["nfe"], row[column])) for row in rows]
    for number, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:number])
        assert not box.count_contains(dots)


def test_baselines_are_drawn_where_they_are_near_and_their_names_do_not_touch() -> None:
    rows = [row_of(f"ddim:{n}", {"nfe": n, "psnr": value}) for n, value in ((5, 20.0), (9, 30.0))]
    values = {"fill": 20.0, "classic": 20.1, "mean": 20.1, "autoencoder": 34.0, "far": 36.0}
    baselines = [row_of(name, {"psnr": value}) for name, value in values.items()]
    figure = plot_figure([Panel(BY_COLUMN["psnr"], "nfe")], {"ddim": rows}, baselines)
    figure.draw_without_rendering()
    names = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    assert {name.get_text() for name in names} == values.keys() - {"far"}
    boxes = [Text.get_window_extent(name) for name in names]
    assert not any(box.count_overlaps(boxes[:number]) for number, box in enumerate(boxes))


def test_the_front_is_what_nothing_else_beats() -> None:
    measure = BY_COLUMN["temporal_error"]
    random = np.random.default_rng(0)
    pairs = [(int(cost), round(value, 1)) for cost, value in random.uniform(1, 9, (60, 2))]
    rows = [
        row_of(str(index), {"nfe": cost, "temporal_error": value})
        for index, (cost, value) in enumerate(pairs)
    ]
    rows.append(row_of("no value", {"nfe": 0, "temporal_error": float("nan")}))
    front = {row.name for row in front_of(rows, "nfe", measure)}
    for index, (cost, value) in enumerate(pairs):
        beaten = any(c <= cost and v <= value and (c, v) != (cost, value) for c, v in pairs)
        assert (str(index) in front) == (not beaten)
    assert "no value" not in front


def test_printed_frames_are_the_frames_own_pixels() -> None:
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)
    no_hole = np.zeros(frames.shape[:3], np.uint8)
    png = draw_film([Strip("row", "", frames)], no_hole, shown=[0, 1])
    printed = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    times = WIDEST // 8
    last = printed[-FRAME_GAP - 6 * times : -FRAME_GAP, -FRAME_GAP - 8 * times : -FRAME_GAP]
    np.testing.assert_array_equal(last, frames[1].repeat(times, 0).repeat(times, 1))


def test_outline_separates_the_hole_from_the_visible_and_nothing_else() -> None:
    times = 12
    mask = np.random.default_rng(0).integers(0, 2, (5, 7)).astype(np.uint8)
    outline = hole_outline(mask.repeat(times, 0).repeat(times, 1))
    padded = np.pad(mask, 1)
    for y in range(5):
        for x in range(7):
            own = outline[y * times : (y + 1) * times, x * times : (x + 1) * times]
            middle = times // 2
            assert not own[3:-3, 3:-3].any()
            edges = {(-1, 0): own[0, middle], (1, 0): own[-1, middle]}
            edges |= {(0, -1): own[middle, 0], (0, 1): own[middle, -1]}
            for (down, right), drawn in edges.items():
                neighbour = padded[1 + y + down, 1 + x + right]
                assert drawn == (neighbour != mask[y, x])
