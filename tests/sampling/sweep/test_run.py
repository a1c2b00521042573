from __future__ import annotations

import collections
import csv
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pyarrow import parquet
from vidfill.data.shards.format import Example
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import Autoencoder
from vidfill.modeling.denoiser import Denoiser
from vidfill.sampling.examples import decode_result, inpaint
from vidfill.sampling.metrics.clip import Judges, score_clip
from vidfill.sampling.metrics.pixels import psnr_hole
from vidfill.sampling.sampler import sample
from vidfill.sampling.sweep import run as sweep_module
from vidfill.sampling.sweep.inputs import make_requests, open_inputs
from vidfill.sampling.sweep.kept import CompletionKey, read_strip, slug
from vidfill.sampling.sweep.results import read_sweep
from vidfill.sampling.sweep.run import main, sweep
from vidfill.sampling.sweep.settings import SweepConfig
from vidfill.sampling.sweep.show import show_results

SHARED = Path(__file__).parents[4] / "shared" / "weights"
SCHEDULES = ["ddim:2", "ddpm:3+resample(n=1)"]
EXAMPLES = [f"video_{n}_00000_stationary" for n in range(3)]

Lines = list[dict[str, str]]


def read_csv(path: Path) -> Lines:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_rows(ours: Lines, theirs: Lines) -> None:
    """But for the times; to float32 rounding."""

    def ordered(rows: Lines) -> Lines:
        names = ("schedule", "clip", "completion")
        rows = [{k: v for k, v in row.items() if k != "seconds_per_clip"} for row in rows]
        return sorted(rows, key=lambda row: [row.get(name, "") for name in names])

    for row, other in zip(ordered(ours), ordered(theirs), strict=True):
        assert row.keys() == other.keys()
        for column, value in row.items():
            if column in ("schedule", "clip"):
                assert value == other[column]
            else:
                wanted = pytest.approx(float(other[column]), rel=1e-3, nan_ok=True)
                assert float(value) == wanted, (column, row)


def test_results_have_the_baselines_then_the_schedules_with_their_costs(
    swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_csv(swept / "results.csv")
    assert ",".join(rows[0]) == (
        "schedule,nfe,seconds_per_clip,temporal_error,colour_error,flicker,seam_error,"
        "warping_error,psnr,psnr_hole,ssim,ssim_65,clips"
    )
    costs = [(row["schedule"], row["nfe"], row["clips"]) for row in rows]
    assert costs == [
        ("fill", "0", "3"),
        ("classic", "0", "3"),
        ("flow", "0", "3"),
        ("mean", "1", "3"),
        ("autoencoder", "0", "3"),
        ("ddim:2", "2", "3"),
        ("ddpm:3+resample(n=1)", "6", "3"),
    ]
    assert all(float(row["seconds_per_clip"]) > 0 for row in rows)
    show_results(rows)
    shown = capsys.readouterr().out
    assert all(row["schedule"] in shown for row in rows)


def test_a_schedules_row_is_the_mean_of_its_examples_rows(swept: Path) -> None:
    rows = read_csv(swept / "clips.csv")
    for row in read_csv(swept / "results.csv"):
        own = [one for one in rows if one["schedule"] == row["schedule"]]
        assert sorted(one["clip"] for one in own) == EXAMPLES
        for column in ("seconds_per_clip", "psnr", "psnr_hole", "colour_error"):
            mean = np.mean([float(one[column]) for one in own])
            assert float(row[column]) == pytest.approx(mean, rel=1e-5)


@pytest.mark.slow
def test_a_row_measures_what_inpainting_gives(
    config: SweepConfig, denoiser: Denoiser, autoencoder: Autoencoder, examples: list[Example]
) -> None:
    schedules = ["ddim:2", "ddim:3+inject"]
    sweep(dataclasses.replace(config, schedules=" ".join(schedules)))
    rows = {(row["schedule"], row["clip"]): row for row in read_csv(config.out / "clips.csv")}
    for schedule in schedules:
        for example, frames in inpaint(
            denoiser, autoencoder, examples, schedule, seed=config.seed, capacity=1
        ):
            assert example.pixels is not None
            row = rows[schedule, example.key]
            scores = score_clip(frames, example.pixels, example.mask, Judges())
            for column, value in scores.items():
                assert float(row[column]) == pytest.approx(value, rel=1e-3, nan_ok=True)


def test_kept_strips_hold_the_frames_that_were_measured(
    swept: Path, examples: list[Example]
) -> None:
    about = json.loads((swept / "sweep.json").read_text())
    slugs = [entry["slug"] for entry in about["schedules"]]
    assert about["kept"] == EXAMPLES[:1]
    folders = {folder.name for folder in (swept / "frames").iterdir()}
    assert folders == {"truth", "masked", "mask", *about["baselines"], *slugs}

    def strip(folder: str) -> np.ndarray:
        file = swept / "frames" / folder / f"{EXAMPLES[0]}.png"
        return cv2.imread(str(file), cv2.IMREAD_COLOR_RGB)

    pixels, mask = examples[0].pixels, examples[0].mask
    assert pixels is not None
    assert (strip("truth") == np.concatenate(list(pixels), axis=1)).all()
    assert (strip("mask")[..., 0] == 255 * np.concatenate(list(mask), axis=1)).all()
    assert (strip("masked") == strip("fill")).all()
    rows = {(row["schedule"], row["clip"]): row for row in read_csv(swept / "clips.csv")}
    for schedule, folder in zip(SCHEDULES, slugs, strict=True):
        frames = np.stack(np.split(strip(folder), len(pixels), axis=1))
        psnr = float(rows[schedule, EXAMPLES[0]]["psnr_hole"])
        assert psnr_hole(frames, pixels, mask) == pytest.approx(psnr, rel=1e-5)


@pytest.mark.slow
def test_an_interrupted_sweep_continues_and_equals_the_uninterrupted_one(
    config: SweepConfig, swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = 0

    def interrupted(*args: Any) -> Any:
        nonlocal finished
        finished += 1
        if finished == 5:
            raise KeyboardInterrupt
        return decode_result(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "decode_result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(config)
    part = config.out / "clips-0.csv"
    done = part.read_text().splitlines()
    assert not (config.out / "results.csv").exists()
    with part.open("ab") as file:
        file.write(b"ddpm:3+resample(n=1),video_2_0000")  # what a kill amid a write leaves
    age(config.out)

    evaluations = []
    denoise = Denoiser.denoise
    monkeypatch.setattr(
        Denoiser,
        "denoise",
        lambda self, x, t, c: (evaluations.append(len(x)), denoise(self, x, t, c))[1],
    )
    sweep(config)
    assert set(done) <= set((config.out / "clips.csv").read_text().splitlines())
    assert not part.exists()
    for name in ("clips.csv", "results.csv"):
        assert_same_rows(read_csv(config.out / name), read_csv(swept / name))
    total = sum(int(row["nfe"]) for row in read_csv(config.out / "clips.csv"))
    assert sum(evaluations) == total - sum(int(line.split(",")[3]) for line in done)


def test_a_finished_sweep_started_again_evaluates_nothing_and_takes_another_reference(
    config: SweepConfig, swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def references() -> set[tuple[str, str]]:
        rows = read_csv(config.out / "comparison.csv")
        return {(row["schedule"], row["reference"]) for row in rows}

    shutil.copytree(swept, config.out)
    assert references() == {(SCHEDULES[1], SCHEDULES[0])}
    monkeypatch.delattr(Denoiser, "denoise")
    sweep(config)
    again = (config.out / "results.csv").read_bytes()
    assert again == (swept / "results.csv").read_bytes()
    sweep(dataclasses.replace(config, reference=SCHEDULES[1]))
    assert references() == {(SCHEDULES[0], SCHEDULES[1])}
    assert read_sweep(config.out).about.reference == SCHEDULES[1]


@pytest.mark.slow
def test_the_first_of_several_completions_is_the_only_one_of_one(
    swept: Path,
    swept_thrice: Path,
    config: SweepConfig,
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    examples: list[Example],
) -> None:
    rows, only = (read_csv(out / "clips.csv") for out in (swept_thrice, swept))
    counts = collections.Counter((row["schedule"], row["clip"]) for row in rows)
    drawn = [*SCHEDULES, "mean"]
    assert counts == {
        (row["schedule"], row["clip"]): 3 if row["schedule"] in drawn else 1 for row in only
    }
    assert_same_rows([row for row in rows if row["completion"] == "0"], only)
    example = examples[0]
    for name in SCHEDULES:  # every completion is another
        own = [r["psnr_hole"] for r in rows if (r["schedule"], r["clip"]) == (name, example.key)]
        assert len(set(own)) == 3
    # The noise of the first depends on the example's key alone; of the third on its number too.
    requests = make_requests(open_inputs(dataclasses.replace(config, completions=3)))
    keys = [CompletionKey(SCHEDULES[0], example.key, number) for number in range(3)]
    assert [requests[key].key for key in keys] == [
        example.key,
        f"{example.key}.1",
        f"{example.key}.2",
    ]
    (again,) = sample(denoiser, [requests[keys[2]]], capacity=1, seed=config.seed)
    frames = decode_result(autoencoder, example, again.latents)
    kept = swept_thrice / "completions" / slug(SCHEDULES[0]) / example.key / "2.png"
    assert (read_strip(kept, *example.mask.shape) == frames * example.mask[..., None]).mean() > 0.99


@pytest.mark.slow
def test_several_completions_have_a_best_one_and_a_spread_whose_map_is_kept(
    swept_thrice: Path, examples: list[Example]
) -> None:
    rows = read_csv(swept_thrice / "clips.csv")
    found = {row["schedule"]: row for row in read_csv(swept_thrice / "results.csv")}
    for name in SCHEDULES:
        values = [
            [float(r["psnr_hole"]) for r in rows if (r["schedule"], r["clip"]) == (name, key)]
            for key in EXAMPLES
        ]
        assert float(found[name]["psnr_hole"]) == pytest.approx(np.mean(values), rel=1e-5)
        best = np.max(values, axis=1).mean()
        assert float(found[name]["best_psnr_hole"]) == pytest.approx(best, rel=1e-5)
        spreads = []
        for example in examples:
            folder = swept_thrice / "completions" / slug(name) / example.key
            strips = [read_strip(folder / f"{n}.png", *example.mask.shape) for n in range(3)]
            drawn = np.stack(strips)[:, example.mask == 1].astype(float)
            spreads.append(np.sqrt(drawn.var(axis=0, ddof=1).mean()))
        assert float(found[name]["diversity"]) == pytest.approx(np.mean(spreads), rel=1e-5)
    assert {found[name]["diversity"] for name in ("fill", "classic", "autoencoder")} == {"0"}
    maps = {path.relative_to(swept_thrice).as_posix() for path in swept_thrice.glob("spread/*/*")}
    assert maps == {f"spread/{slug(name)}/{EXAMPLES[0]}.png" for name in (*SCHEDULES, "mean")}
    grey = read_sweep(swept_thrice).spread(slug(SCHEDULES[0]), EXAMPLES[0])
    assert (grey[examples[0].mask == 0] == 0).all() and grey.max() > 0
    compared = read_csv(swept_thrice / "comparison.csv")
    assert {"best_psnr_hole", "diversity"} <= {row["measure"] for row in compared}
    assert {row["clips"] for row in compared if row["measure"] == "best_psnr_hole"} == {"3"}


@pytest.mark.parametrize("name", ["clips", "results", "comparison"])
def test_tables_are_there_as_parquet_too(swept: Path, name: str) -> None:
    rows = read_csv(swept / f"{name}.csv")
    table = parquet.read_table(swept / f"{name}.parquet")
    assert table.column_names == list(rows[0])
    for row, typed in zip(rows, table.to_pylist(), strict=True):
        for column, text in row.items():
            value = typed[column]
            same = value == (type(value)(text) if text else None)
            assert same or math.isnan(value) == math.isnan(float(text)), (name, column)
            assert isinstance(value, int) == (column in ("completion", "nfe", "clips"))


def test_a_sweep_of_one_family_takes_its_examples_alone(
    config: SweepConfig, tmp_path: Path, make_example: Callable[[str], Example], write_shards: Any
) -> None:
    mixed = [make_example(key) for key in ("a_stationary", "a_variable", "b_variable")]
    shards = write_shards(tmp_path / "mixed", mixed)
    inputs = open_inputs(dataclasses.replace(config, shards=shards, masks="variable"))
    assert list(inputs.examples) == ["a_variable", "b_variable"]
    assert inputs.families == ["variable"]


def age(out: Path) -> None:
    """Make a sweep's records those that version 0.1 wrote."""
    mark, run = out / "job.json", out / "run.json"
    job, log = json.loads(mark.read_text()), json.loads(run.read_text())
    job["config"]["clips"] = job["config"].pop("examples")
    of = job["stands_on"]
    log["inputs"] = {
        "model": of["model"]["weights"],
        "shards' manifest": of["shards"]["manifest"],
        "autoencoder": of["autoencoder"]["weights"],
    }
    mark.write_text(json.dumps({"verb": job["verb"], "config": job["config"]}))
    run.write_text(json.dumps(log))


@pytest.mark.parametrize("is_old", [False, True])
def test_a_model_that_changed_since_is_refused(
    config: SweepConfig, swept: Path, tmp_path: Path, is_old: bool
) -> None:
    shutil.copytree(swept, config.out)
    if is_old:
        age(config.out)
    moved = dataclasses.replace(config, model=tmp_path / "model")
    shutil.copytree(config.model, moved.model)
    weights = Denoiser.load(config.model, "cpu", "float32")
    weights.network.conv_out.bias.data.add_(1)
    weights.save(moved.model)
    with pytest.raises(BadInput, match=r"begun with something else .*\(model\.weights\)"):
        sweep(moved)


def test_a_plan_tells_the_cost_and_writes_nothing(
    config: SweepConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(config.model), str(config.shards), str(config.out), "--plan", "true"]
    arguments += ["--examples", "3", "--completions", "2"]
    assert main([*arguments, "--schedules", config.schedules]) == 0
    table = capsys.readouterr().out.replace("│", " ").splitlines()
    costs = {line.split()[0]: line.split()[1:] for line in table if line.strip()}
    assert not config.out.exists()
    assert costs["ddpm:3+resample(n=1)"][:3] == ["6", "6", "36"]
    assert costs["all"][:2] == ["6", str(2 * 3 * (1 + 2 + 6))]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no networks in ../shared")
@pytest.mark.slow
def test_given_its_networks_a_sweep_has_lpips_and_the_distances_of_sets(
    config: SweepConfig, tmp_path: Path, write_shards: Any
) -> None:
    frames, side = 10, 32
    random = np.random.default_rng(0)
    mask = np.zeros((frames, side, side), np.uint8)
    mask[:, 8:24, 8:16] = 1
    latents = random.normal(size=(2, 2, frames, 4, 8, 8)).astype(np.float16)
    examples = [
        Example(
            key=key,
            latents=latents[number, 0],
            masked_latents=latents[number, 1],
            mask=mask,
            record={"fill": [90, 100, 110]},
            pixels=random.integers(0, 256, (frames, side, side, 3), dtype=np.uint8),
        )
        for number, key in enumerate(EXAMPLES[:2])
    ]
    denoiser = Denoiser.load(config.model, "cpu", "float32")
    space = dataclasses.replace(denoiser.space, shape=[frames, 4, 8, 8])
    (tmp_path / "model").mkdir()
    Denoiser(denoiser.network, denoiser.config, space).save(tmp_path / "model")
    rows = sweep(
        dataclasses.replace(
            config,
            model=tmp_path / "model",
            shards=write_shards(tmp_path / "shards", examples),
            schedules="ddim:1",
            lpips=str(SHARED / "lpips_alex.safetensors"),
            i3d=str(SHARED / "i3d_kinetics400.safetensors"),
        )
    )
    found = {row["schedule"]: row for row in rows}
    assert list(rows[0])[3] == "lpips" and list(rows[0])[-3:] == ["fvd", "vfid", "clips"]
    for row in rows:
        assert 0 < float(row["lpips"]) < 2
        assert float(row["fvd"]) > 0 and float(row["vfid"]) > 0
    # `mean` is ddim:1 under another name.
    for column in ("lpips", "fvd", "vfid"):
        ours, theirs = (float(found[name][column]) for name in ("mean", "ddim:1"))
        assert ours == pytest.approx(theirs, rel=1e-3)
    kept = {path.parent.name for path in (config.out / "features").rglob("*.npy")}
    assert kept == {"truth", "ddim-1", "mean", "fill", "classic", "flow", "autoencoder"}
