from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from vidfill.sampling.metrics.frechet import frechet_distance
from vidfill.sampling.sweep.averages import TRUTH, Measurements, compare_all, references_of
from vidfill.sampling.sweep.kept import CompletionKey, SweepFolder, slug
from vidfill.sampling.sweep.measures import clip_columns, measures_with
from vidfill.sampling.sweep.results import CompletionRow

EXAMPLES = [f"v{number}_{family}" for number in range(6) for family in ("stationary", "variable")]
PLAIN, MANY, OTHER = "ddpm:50", "ddpm:50+resample(n=4)", "ddim:10"
SCHEDULES = [PLAIN, MANY, OTHER]


def measured(out: Path, networks: tuple[str, ...] = ()) -> Measurements:
    """Numbers made up: more resampling is 1 better than none under stationary masks, by all."""
    random = np.random.default_rng(0)
    measures = measures_with(networks)
    rows: dict[CompletionKey, CompletionRow] = {}
    for example in EXAMPLES:
        base = random.uniform(10, 20)
        for name in SCHEDULES:
            values: dict[str, object] = {"schedule": name, "clip": example, "completion": 0}
            better = 1.0 if name == MANY and example.endswith("stationary") else 0.0
            for measure in measures:
                if measure.column in clip_columns(measures):
                    noise = random.normal(0, 0.1) if name == MANY else 0.0
                    sign = measure.better or 1
                    values[measure.column] = base + sign * better + noise
            row = CompletionRow.model_validate(values | {"nfe": 50})
            rows[row.key] = row
    return Measurements(SweepFolder(out), rows, EXAMPLES, measures, 1, {})


def change(done: Measurements, name: str, example: str, number: int = 0, **values: float) -> None:
    """Replace a completion's values, or put another completion beside the first."""
    first = done.rows[CompletionKey(name, example)].model_dump(by_alias=True)
    row = CompletionRow.model_validate({**first, "completion": number, **values})
    dict.__setitem__(done.rows, row.key, row)  # type: ignore[arg-type]


Who = tuple[str, str, str, str]


def by_what(done: Measurements) -> dict[Who, dict[str, str]]:
    rows = [row.texts() for row in compare_all(done, SCHEDULES, PLAIN, seed=0)]
    found = {(r["masks"], r["schedule"], r["reference"], r["measure"]): r for r in rows}
    assert len(found) == len(rows)
    return found


def test_each_schedule_is_compared_with_its_own_without_detours_and_with_the_reference() -> None:
    assert references_of(MANY, SCHEDULES, OTHER) == [PLAIN, OTHER]
    assert references_of(MANY, SCHEDULES, PLAIN) == [PLAIN]
    assert references_of(OTHER, SCHEDULES, OTHER) == []
    assert references_of("ddim:9+jump(length=2,times=3)", SCHEDULES, OTHER) == [OTHER]
    injecting = ["ddim:9", "ddim:9+inject", "ddim:9+resample(n=4)+inject"]
    assert references_of(injecting[2], injecting, injecting[2]) == [injecting[1]]


def test_each_family_of_masks_is_compared_by_itself(tmp_path: Path) -> None:
    found = by_what(measured(tmp_path))
    for column, sign in (("temporal_error", -1), ("psnr", 1), ("ssim", 1)):
        row = found["stationary", MANY, PLAIN, column]
        assert row["clips"] == "6" and row["improved"] == "1" and row["verdict"] == "better"
        assert float(row["low"]) < float(row["difference"]) < float(row["high"])
        assert float(row["difference"]) == pytest.approx(sign, abs=0.2)
        assert abs(float(found["variable", MANY, PLAIN, column]["difference"])) < 0.2
    equal = found["variable", OTHER, PLAIN, "psnr"]
    assert equal["verdict"] == "as good" and float(equal["difference"]) == 0
    assert equal["improved"] == "0"
    warped = found["stationary", MANY, PLAIN, "warping_error"]
    assert warped["improved"] == "" and warped["verdict"] == "undecided"


def test_examples_without_a_value_are_left_out_and_counted(tmp_path: Path) -> None:
    done = measured(tmp_path)
    for name in SCHEDULES:
        change(done, name, EXAMPLES[0], psnr_hole=math.nan)
        for example in EXAMPLES:
            change(done, name, example, ssim_65=math.nan)
    known = [done.rows[CompletionKey(MANY, example)]["psnr_hole"] for example in EXAMPLES[1:]]
    row = done.average(MANY)
    assert float(row["psnr_hole"]) == pytest.approx(np.mean(known), rel=1e-5)
    assert math.isnan(float(row["ssim_65"]))
    assert done.count_without_value(SCHEDULES) == {"psnr_hole": 1, "ssim_65": len(EXAMPLES)}
    rows = by_what(done).values()
    counts = {r["clips"] for r in rows if r["measure"] == "psnr_hole" and r["schedule"] == MANY}
    assert counts == {"5", "6"}
    verdicts = {(r["clips"], r["verdict"]) for r in rows if r["measure"] == "ssim_65"}
    assert verdicts == {("0", "undecided")}


def test_completions_are_averaged_within_an_example_and_the_best_is_each_measures_own(
    tmp_path: Path,
) -> None:
    one, three = measured(tmp_path), measured(tmp_path)
    for example in EXAMPLES:  # the others draw no noise
        first = one.rows[CompletionKey(MANY, example)]
        for number, shift in enumerate((-3.0, 1.0, 2.0)):
            shifted = {c: first[c] + shift for c in ("psnr_hole", "colour_error")}
            change(three, MANY, example, number, **shifted)
    measures = measures_with([], completions=3)
    diversities = {(MANY, example): 7.0 for example in EXAMPLES}
    three = dataclasses.replace(three, measures=measures, completions=3, diversities=diversities)
    for name, low, high, spread in ((MANY, -3, 2, 7), (PLAIN, 0, 0, 0)):
        before, row = one.average(name), three.average(name)
        assert row["psnr_hole"] == before["psnr_hole"] and row["clips"] == str(len(EXAMPLES))
        for column, shift in (("psnr_hole", high), ("colour_error", low)):
            gain = float(row[f"best_{column}"]) - float(before[column])
            assert gain == pytest.approx(shift, abs=1e-3)
        assert float(row["diversity"]) == spread
    new = by_what(three)
    for who, row in by_what(one).items():  # pairs are of examples, as many as before
        assert new[who]["clips"] == row["clips"] and new[who]["verdict"] == row["verdict"]
        assert float(new[who]["difference"]) == pytest.approx(float(row["difference"]), abs=1e-4)
    best = new["variable", MANY, PLAIN, "best_psnr_hole"]
    assert best["margin"] == "0.25" and best["verdict"] == "better"
    assert new["variable", MANY, PLAIN, "diversity"]["verdict"] == "undecided"  # none is better


@pytest.mark.slow
def test_the_distances_of_sets_are_those_of_the_features_kept(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    done = measured(tmp_path, networks=("i3d",))
    features = {
        name: random.normal(shift, 1, (len(EXAMPLES), 5)).astype(np.float32)
        for name, shift in ((TRUTH, 0), (PLAIN, 3), (MANY, 0.1), (OTHER, 3))
    }
    for name, vectors in features.items():
        for example, vector in zip(EXAMPLES, vectors, strict=True):
            done.folder.write_features(slug(name), example, {"fvd": vector, "vfid": vector})
    for name in SCHEDULES:
        wanted = frechet_distance(features[name], features[TRUTH])
        assert float(done.average(name)["fvd"]) == pytest.approx(wanted, rel=1e-5)
    row = by_what(done)["variable", MANY, PLAIN, "fvd"]
    assert row["margin"] == "" and row["improved"] == "" and row["verdict"] == "better"
