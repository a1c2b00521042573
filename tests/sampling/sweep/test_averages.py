from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from vidfill.sampling.metrics.frechet import frechet_distance
from vidfill.sampling.sweep.averages import (
    TRUTH,
    Finished,
    compare_all,
    group_by_clip,
    references_of,
)
from vidfill.sampling.sweep.kept import has_features, read_features, write_features
from vidfill.sampling.sweep.measures import COMPARED, clip_columns, measures_with
from vidfill.sampling.sweep.rows import Row, as_csv

CLIPS = [f"v{number}_{family}" for number in range(6) for family in ("stationary", "variable")]
PLAIN, MANY, OTHER = "ddpm:50", "ddpm:50+resample(n=4)", "ddim:10"
SCHEDULES = [PLAIN, MANY, OTHER]


def finished(out: Path, networks: tuple[str, ...] = ()) -> Finished:
    """Numbers made up: more resampling is 1 better than none under stationary masks, by all."""
    random = np.random.default_rng(0)
    measures = measures_with(networks)
    rows: dict[tuple[str, str], list[Row]] = {}
    for clip in CLIPS:
        base = random.uniform(10, 20)
        for name in SCHEDULES:
            row = {"schedule": name, "clip": clip, "completion": "0", "nfe": "50"}
            better = 1.0 if name == MANY and clip.endswith("stationary") else 0.0
            for measure in measures:
                if measure.column in clip_columns(measures) and measure.column != "nfe":
                    noise = random.normal(0, 0.1) if name == MANY else 0.0
                    sign = measure.better or 1
                    row[measure.column] = f"{base + sign * better + noise:.6g}"
            rows[name, clip] = [row]
    folders = {PLAIN: "plain", MANY: "many", OTHER: "other"}
    return Finished(out, rows, CLIPS, folders, measures, {})


def test_each_schedule_is_compared_with_its_own_without_detours_and_with_the_reference() -> None:
    assert references_of(MANY, SCHEDULES, OTHER) == [PLAIN, OTHER]
    assert references_of(MANY, SCHEDULES, PLAIN) == [PLAIN]
    assert references_of(OTHER, SCHEDULES, OTHER) == []
    assert references_of("ddim:9+jump(length=2,times=3)", SCHEDULES, OTHER) == [OTHER]
    injecting = ["ddim:9", "ddim:9+inject", "ddim:9+resample(n=4)+inject"]
    assert references_of(injecting[2], injecting, injecting[2]) == [injecting[1]]


def test_each_family_of_masks_is_compared_for_itself(tmp_path: Path) -> None:
    rows = compare_all(finished(tmp_path), SCHEDULES, PLAIN, seed=0)
    found = {(r["masks"], r["schedule"], r["reference"], r["measure"]): r for r in rows}
    assert len(found) == len(rows)
    for column, sign in (("temporal_error", -1), ("psnr", 1), ("ssim", 1)):
        row = found["stationary", MANY, PLAIN, column]
        assert row["clips"] == "6" and row["improved"] == "1" and row["verdict"] == "better"
        assert float(row["low"]) < float(row["difference"]) < float(row["high"])
        assert float(row["difference"]) == pytest.approx(sign, abs=0.2)
        assert abs(float(found["variable", MANY, PLAIN, column]["difference"])) < 0.2
    equal = found["variable", OTHER, PLAIN, "psnr"]
    assert equal["verdict"] == "as good" and float(equal["difference"]) == 0
    warped = found["stationary", MANY, PLAIN, "warping_error"]
    assert warped["improved"] == "" and warped["verdict"] == "undecided"
    header, *lines = as_csv(COMPARED, rows).decode().splitlines()
    assert header == ",".join(COMPARED) and len(lines) == len(rows)


def test_clips_without_a_value_are_left_out_and_counted(tmp_path: Path) -> None:
    done = finished(tmp_path)
    for name in SCHEDULES:
        done.rows[name, CLIPS[0]][0]["psnr_hole"] = "nan"
        for clip in CLIPS:
            done.rows[name, clip][0]["ssim_65"] = "nan"
    known = [float(done.rows[MANY, clip][0]["psnr_hole"]) for clip in CLIPS[1:]]
    row = done.average(MANY)
    assert float(row["psnr_hole"]) == pytest.approx(np.mean(known), rel=1e-5)
    assert math.isnan(float(row["ssim_65"]))
    assert done.left_out(SCHEDULES) == {"psnr_hole": 1, "ssim_65": len(CLIPS)}
    rows = compare_all(done, SCHEDULES, PLAIN, seed=0)
    clips = {r["clips"] for r in rows if r["measure"] == "psnr_hole" and r["schedule"] == MANY}
    assert clips == {"5", "6"}
    verdicts = {(r["clips"], r["verdict"]) for r in rows if r["measure"] == "ssim_65"}
    assert verdicts == {("0", "undecided")}


def test_completions_are_averaged_within_a_clip_and_the_best_is_each_measures_own(
    tmp_path: Path,
) -> None:
    one = finished(tmp_path)
    several: dict[tuple[str, str], list[Row]] = {}
    for (name, clip), (row,) in one.rows.items():
        shifts = (-3.0, 1.0, 2.0) if name == MANY else (0.0,)  # the others draw no noise
        several[name, clip] = [
            row | {c: f"{float(row[c]) + shift:.6g}" for c in ("psnr_hole", "colour_error")}
            for shift in shifts
        ]
    measures = measures_with([], completions=3)
    diversities = {(MANY, clip): 7.0 for clip in CLIPS}
    done = dataclasses.replace(one, rows=several, measures=measures, diversities=diversities)
    for name, low, high, spread in ((MANY, -3, 2, 7), (PLAIN, 0, 0, 0)):
        before, row = one.average(name), done.average(name)
        assert row["psnr_hole"] == before["psnr_hole"] and row["clips"] == str(len(CLIPS))
        for column, shift in (("psnr_hole", high), ("colour_error", low)):
            gain = float(row[f"best_{column}"]) - float(before[column])
            assert gain == pytest.approx(shift, abs=1e-3)
        assert float(row["diversity"]) == spread
    old, new = (
        {(r["masks"], r["schedule"], r["reference"], r["measure"]): r for r in compared}
        for compared in (compare_all(f, SCHEDULES, PLAIN, seed=0) for f in (one, done))
    )
    for who, row in old.items():  # pairs are of clips, as many as before
        assert new[who]["clips"] == row["clips"] and new[who]["verdict"] == row["verdict"]
        assert float(new[who]["difference"]) == pytest.approx(float(row["difference"]), abs=1e-4)
    best = new["variable", MANY, PLAIN, "best_psnr_hole"]
    assert best["margin"] == "0.25" and best["verdict"] == "better"
    assert new["variable", MANY, PLAIN, "diversity"]["verdict"] == "undecided"  # none is better


def test_rows_are_grouped_by_clip_in_the_order_of_completions() -> None:
    rows = {("s", clip, n): {"completion": str(n)} for n in (10, 2, 0) for clip in ("a", "b")}
    grouped = group_by_clip(rows)
    assert list(grouped) == [("s", "a"), ("s", "b")]
    assert [row["completion"] for row in grouped["s", "a"]] == ["0", "2", "10"]


def test_the_distances_of_sets_are_those_of_the_features_kept(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    features = {
        folder: random.normal(shift, 1, (len(CLIPS), 5)).astype(np.float32)
        for folder, shift in ((TRUTH, 0), ("plain", 3), ("many", 0.1), ("other", 3))
    }
    for folder, vectors in features.items():
        for clip, vector in zip(CLIPS, vectors, strict=True):
            assert not has_features(tmp_path, "fvd", folder, clip)
            write_features(tmp_path, folder, clip, {"fvd": vector, "vfid": vector})
            assert has_features(tmp_path, "fvd", folder, clip)
    done = finished(tmp_path, networks=("i3d",))
    np.testing.assert_array_equal(read_features(tmp_path, "fvd", "many", CLIPS), features["many"])
    for name, folder in done.folders.items():
        wanted = frechet_distance(features[folder], features[TRUTH])
        assert float(done.average(name)["fvd"]) == pytest.approx(wanted, rel=1e-5)
    rows = compare_all(done, SCHEDULES, PLAIN, seed=0)
    (row,) = (
        r
        for r in rows
        if (r["measure"], r["masks"]) == ("fvd", "variable") and r["schedule"] == MANY
    )
    assert row["margin"] == "" and row["improved"] == "" and row["verdict"] == "better"
