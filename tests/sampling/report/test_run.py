from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from vidfill.errors import BadInput
from vidfill.sampling.report.run import main, report
from vidfill.sampling.report.settings import ReportConfig
from vidfill.sampling.sweep.results import read_sweep

MakeSweep = Callable[..., Path]


@pytest.mark.slow
def test_pictures_in_the_page_are_the_written_figures(
    sweep: Path, tmp_path: Path, read_page: Callable[[str], ElementTree.Element]
) -> None:
    out = tmp_path / "report"
    page = read_page(report(ReportConfig(sweep, out)).read_text())
    names = ["front.png", "figure2.png", "figure3.png", "figure4.png", "quality-nfe.png"]
    found = sorted(path.name for path in out.iterdir())
    assert found == sorted([*names, "index.html", "job.json"])
    written = {(out / name).read_bytes() for name in names}
    sources = [image.get("src", "") for image in page.findall(".//figure//img")]
    assert {base64.b64decode(source.partition("base64,")[2]) for source in sources} == written
    for picture in written:
        assert cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR) is not None


@pytest.mark.slow
def test_same_command_writes_the_same_report_again_also_of_another_clip_or_a_moved_sweep(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    clips = ["a_00000_box", "b_00000_box"]
    folder = make_sweep(tmp_path / "sweep", schedules=["ddim:5"], kept=clips)
    written = []
    for clip in (clips[0], clips[0], clips[1]):
        page = report(ReportConfig(folder, clip=clip))
        assert page == folder / "report" / "index.html"
        assert f"Example <code>{clip}</code>" in page.read_text()
        written.append({path.name: path.read_bytes() for path in (folder / "report").iterdir()})
        folder = folder.rename(tmp_path / f"moved {len(written)}")
    for name in written[0].keys() - {"job.json"}:
        assert written[0][name] == written[1][name]
    assert "figure4.png" in written[0]
    bare = make_sweep(tmp_path / "bare", schedules=["ddim:5"], kept=[])
    report(ReportConfig(bare, folder / "report"))
    left = {path.name for path in (folder / "report").iterdir()}
    assert left == {"job.json", "index.html", "front.png", "quality-nfe.png"}


@pytest.mark.parametrize(
    "missing",
    [
        *("sweep.json", "results.csv", "clips.csv", "comparison.csv"),
        "frames/ddim-5/b_00000_variable.png",
    ],
)
def test_unfinished_sweep_is_refused_by_name(
    make_sweep: MakeSweep, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    make_sweep(tmp_path / "sweep")
    (tmp_path / "sweep" / missing).unlink()
    assert main([str(tmp_path / "sweep"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{missing} is missing" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_sweep_without_a_schedules_row_is_refused(make_sweep: MakeSweep, tmp_path: Path) -> None:
    make_sweep(tmp_path)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    (tmp_path / "results.csv").write_text("\n".join(lines[:-1]))
    with pytest.raises(BadInput, match=r"results.csv has no row ddim:5"):
        read_sweep(tmp_path)


def test_folder_of_something_else_is_not_written_into(tmp_path: Path, sweep: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        report(ReportConfig(sweep, out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
