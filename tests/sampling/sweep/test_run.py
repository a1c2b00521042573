from __future__ import annotations

import collections
import csv
import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pyarrow import parquet
from vidfill.data.shards.format import Example, Manifest, ShardTable, family_of
from vidfill.data.shards.writing import latent_moments, write_shard
from vidfill.data.storage.names import MANIFEST
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import Autoencoder
from vidfill.modeling.denoiser import Denoiser
from vidfill.sampling.examples import decode_result, inpaint
from vidfill.sampling.metrics.pixels import measure
from vidfill.sampling.sampler import sample
from vidfill.sampling.sweep import run as sweep_module
from vidfill.sampling.sweep.inputs import (
    DEFAULT_SCHEDULES,
    SweepConfig,
    open_inputs,
    read_schedules,
)
from vidfill.sampling.sweep.kept import read_strip, slug
from vidfill.sampling.sweep.requests import make_requests, noise_key, task_of
from vidfill.sampling.sweep.results import read_sweep
from vidfill.sampling.sweep.rows import Account, Ledger
from vidfill.sampling.sweep.run import main, sweep
from vidfill.sampling.sweep.show import show_results
from vidfill.seeding import derive_seed

Row = dict[str, str]
SHARED = Path(__file__).parents[4] / "shared" / "weights"
SCHEDULES = ["ddim:2", "ddpm:3+resample(n=1)"]
CLIPS = [f"video_{n}_00000_stationary" for n in range(3)]


def write_split(
    root: Path, autoencoder: dict[str, object], examples: list[Example], split: str = "validation"
) -> None:
    index = write_shard(root / split, 0, [], examples)
    mean, std = latent_moments([index])
    families = dict.fromkeys((family_of(example.key) for example in examples), 1.0)
    frames, height, width = examples[0].mask.shape
    manifest = Manifest(
        split=split,
        autoencoder=autoencoder,
        clip={"frames": frames, "height": height, "width": width},
        latent_shape=examples[0].latents.shape,  # type: ignore[arg-type]
        posterior="mean",
        pixels=examples[0].pixels is not None,
        masks={"families": families, "per_clip": 1, "seed": 0},
        fill="median",
        latents_mean=tuple(mean),
        latents_std=tuple(std),
        examples=len(examples),
        shards=ShardTable.of([index]),
        lanes=1,
        block=len(examples),
        skipped=0,
    )
    (root / split / MANIFEST).write_text(manifest.to_json())


@pytest.fixture
def examples(make_example: Callable[[str], Example]) -> list[Example]:
    return [make_example(key) for key in CLIPS]


@pytest.fixture
def config(
    tmp_path: Path, denoiser: Denoiser, autoencoder: Autoencoder, examples: list[Example]
) -> SweepConfig:
    """A model, its autoencoder and shards on disk, and a sweep of them."""
    autoencoder.network.save_pretrained(tmp_path / "autoencoder")
    denoiser.autoencoder["name"] = str(tmp_path / "autoencoder")
    (tmp_path / "model").mkdir()
    denoiser.save(tmp_path / "model")
    write_split(tmp_path / "shards", denoiser.autoencoder, examples)
    return SweepConfig(
        tmp_path / "model",
        str(tmp_path / "shards"),
        tmp_path / "out",
        schedules=" ".join(SCHEDULES),
        clips=0,
        batch_size=2,
        keep=1,
        device="cpu",
    )


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def untimed(rows: list[Row]) -> list[Row]:
    rows = [{k: v for k, v in row.items() if k != "seconds_per_clip"} for row in rows]
    return sorted(
        rows, key=lambda row: [row.get(k, "") for k in ("schedule", "clip", "completion")]
    )


def test_results_have_the_baselines_then_the_schedules_with_their_costs(
    config: SweepConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    show_results(sweep(config))
    rows = read_csv(config.out / "results.csv")
    assert ",".join(rows[0]) == (
        "schedule,nfe,seconds_per_clip,temporal_error,colour_error,flicker,seam_error,"
        "warping_error,psnr,psnr_hole,ssim,ssim_65,clips"
    )
    costs = [(row["schedule"], row["nfe"], row["clips"]) for row in rows]
    assert costs == [
        ("fill", "0", "3"),
        ("classic", "0", "3"),
        ("mean", "1", "3"),
        ("autoencoder", "0", "3"),
        ("ddim:2", "2", "3"),
        ("ddpm:3+resample(n=1)", "6", "3"),
    ]
    assert all(float(row["seconds_per_clip"]) > 0 for row in rows)
    assert all(row["schedule"] in capsys.readouterr().out for row in rows[:1])


def test_a_schedules_row_is_the_mean_of_its_clips_rows(config: SweepConfig) -> None:
    sweep(config)
    clips = read_csv(config.out / "clips.csv")
    for row in read_csv(config.out / "results.csv"):
        of_schedule = [clip for clip in clips if clip["schedule"] == row["schedule"]]
        assert sorted(clip["clip"] for clip in of_schedule) == CLIPS
        for column in ("seconds_per_clip", "psnr", "psnr_hole", "colour_error"):
            mean = np.mean([float(clip[column]) for clip in of_schedule])
            assert float(row[column]) == pytest.approx(mean, rel=1e-5)


def test_a_clips_row_measures_what_inpainting_gives(
    config: SweepConfig, denoiser: Denoiser, autoencoder: Autoencoder, examples: list[Example]
) -> None:
    schedules = [*SCHEDULES, "ddim:3+inject"]
    sweep(dataclasses.replace(config, schedules=" ".join(schedules)))
    rows = {(row["schedule"], row["clip"]): row for row in read_csv(config.out / "clips.csv")}
    for schedule in schedules:
        for example, frames in inpaint(
            denoiser, autoencoder, examples, schedule, seed=config.seed, capacity=1
        ):
            assert example.pixels is not None
            row = rows[schedule, example.key]
            for column, value in measure(frames, example.pixels, example.mask).items():
                assert float(row[column]) == pytest.approx(value, rel=1e-3)


def test_kept_strips_hold_the_frames_that_were_measured(
    config: SweepConfig, examples: list[Example]
) -> None:
    sweep(config)
    about = json.loads((config.out / "sweep.json").read_text())
    slugs = [entry["slug"] for entry in about["schedules"]]
    assert about["kept"] == CLIPS[:1]
    folders = {folder.name for folder in (config.out / "frames").iterdir()}
    assert folders == {"truth", "masked", "mask", *about["baselines"], *slugs}

    def strip(folder: str) -> np.ndarray:
        file = config.out / "frames" / folder / f"{CLIPS[0]}.png"
        return cv2.imread(str(file), cv2.IMREAD_COLOR_RGB)

    pixels, mask = examples[0].pixels, examples[0].mask
    assert pixels is not None
    assert (strip("truth") == np.concatenate(list(pixels), axis=1)).all()
    assert (strip("mask")[..., 0] == 255 * np.concatenate(list(mask), axis=1)).all()
    assert (strip("masked") == strip("fill")).all()
    rows = {(row["schedule"], row["clip"]): row for row in read_csv(config.out / "clips.csv")}
    for schedule, folder in zip(SCHEDULES, slugs, strict=True):
        frames = np.stack(np.split(strip(folder), len(pixels), axis=1))
        psnr = float(rows[schedule, CLIPS[0]]["psnr_hole"])
        assert measure(frames, pixels, mask)["psnr_hole"] == pytest.approx(psnr, rel=1e-5)


def test_an_interrupted_sweep_continues_and_equals_the_uninterrupted_one(
    config: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dataclasses.replace(config, out=config.out.with_name("whole"))
    sweep(whole)
    finished = 0
    decode = decode_result

    def interrupted(*args: Any) -> Any:
        nonlocal finished
        finished += 1
        if finished == 5:
            raise KeyboardInterrupt
        return decode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "decode_result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(config)
    part = config.out / "clips-0.csv"
    before = part.read_bytes()
    assert not (config.out / "results.csv").exists()
    with part.open("ab") as file:
        file.write(b"ddpm:3+resample(n=1),video_2_0000")  # what a kill amid a write leaves

    evaluations = []
    with monkeypatch.context() as patch:
        denoise = Denoiser.denoise
        patch.setattr(
            Denoiser,
            "denoise",
            lambda self, x, t, c: (evaluations.append(len(x)), denoise(self, x, t, c))[1],
        )
        sweep(config)
    done = before.decode().splitlines()
    assert set(done) <= set((config.out / "clips.csv").read_text().splitlines())
    assert not part.exists()
    assert_same_results(config.out, whole.out)
    total = sum(int(row["nfe"]) for row in read_csv(config.out / "clips.csv"))
    assert sum(evaluations) == total - sum(int(line.split(",")[3]) for line in done)


def assert_same_results(ours: Path, theirs: Path) -> None:
    """But for the times; to float32 rounding."""
    for name in ("clips.csv", "results.csv"):
        assert_same_rows(*(read_csv(out / name) for out in (ours, theirs)))


def assert_same_rows(ours: list[Row], theirs: list[Row]) -> None:
    for row, other in zip(untimed(ours), untimed(theirs), strict=True):
        assert row.keys() == other.keys()
        for column, value in row.items():
            if column in ("schedule", "clip"):
                assert value == other[column]
            else:
                wanted = pytest.approx(float(other[column]), rel=1e-3, nan_ok=True)
                assert float(value) == wanted, (column, row)


def test_a_finished_sweep_started_again_evaluates_nothing(
    config: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(config)
    before = (config.out / "results.csv").read_bytes()
    monkeypatch.delattr(Denoiser, "denoise")
    sweep(config)
    assert (config.out / "results.csv").read_bytes() == before


def test_the_first_of_several_completions_is_the_only_one_of_one(
    config: SweepConfig, denoiser: Denoiser, autoencoder: Autoencoder, examples: list[Example]
) -> None:
    one = dataclasses.replace(config, out=config.out.with_name("one"))
    sweep(one)
    sweep(dataclasses.replace(config, completions=3))
    rows, only = (read_csv(out / "clips.csv") for out in (config.out, one.out))
    counts = collections.Counter((row["schedule"], row["clip"]) for row in rows)
    drawn = [*SCHEDULES, "mean"]
    assert counts == {
        (row["schedule"], row["clip"]): 3 if row["schedule"] in drawn else 1 for row in only
    }
    assert_same_rows([row for row in rows if row["completion"] == "0"], only)
    for name in SCHEDULES:  # every completion is another
        of_clip = [r["psnr_hole"] for r in rows if (r["schedule"], r["clip"]) == (name, CLIPS[0])]
        assert len(set(of_clip)) == 3
    # The noise of the first is what it was; of the third it depends on the number too.
    requests = {
        task_of(r).completion: r
        for r in make_requests(open_inputs(dataclasses.replace(config, completions=3)))
        if task_of(r)[:2] == (SCHEDULES[0], CLIPS[0])
    }
    assert [requests[number].clip for number in range(3)] == [
        noise_key(CLIPS[0], number) for number in range(3)
    ]
    assert requests[0].clip == CLIPS[0]
    (example,) = examples[:1]
    (again,) = sample(denoiser, [requests[2]], capacity=1, seed=config.seed)
    frames = decode_result(autoencoder, example, again.latents)
    kept = config.out / "completions" / slug(SCHEDULES[0]) / CLIPS[0] / "2.png"
    assert (read_strip(kept, *example.mask.shape) == frames * example.mask[..., None]).mean() > 0.99


def test_several_completions_have_a_best_one_and_a_spread_whose_map_is_kept(
    config: SweepConfig, examples: list[Example]
) -> None:
    config = dataclasses.replace(config, completions=3)
    sweep(config)
    rows = read_csv(config.out / "clips.csv")
    found = {row["schedule"]: row for row in read_csv(config.out / "results.csv")}
    for name in SCHEDULES:
        by_clip = [
            [float(r["psnr_hole"]) for r in rows if (r["schedule"], r["clip"]) == (name, clip)]
            for clip in CLIPS
        ]
        assert float(found[name]["psnr_hole"]) == pytest.approx(np.mean(by_clip), rel=1e-5)
        best = np.max(by_clip, axis=1).mean()
        assert float(found[name]["best_psnr_hole"]) == pytest.approx(best, rel=1e-5)
        squares = []
        for example in examples:
            folder = config.out / "completions" / slug(name) / example.key
            strips = [read_strip(folder / f"{n}.png", *example.mask.shape) for n in range(3)]
            drawn = np.stack(strips)[:, example.mask == 1].astype(float)
            squares.append(np.sqrt(drawn.var(axis=0, ddof=1).mean()))
        assert float(found[name]["diversity"]) == pytest.approx(np.mean(squares), rel=1e-5)
    assert {found[name]["diversity"] for name in ("fill", "classic", "autoencoder")} == {"0"}
    maps = {path.relative_to(config.out).as_posix() for path in config.out.glob("spread/*/*")}
    assert maps == {f"spread/{slug(name)}/{CLIPS[0]}.png" for name in (*SCHEDULES, "mean")}
    grey = read_sweep(config.out).spread(slug(SCHEDULES[0]), CLIPS[0])
    assert (grey[examples[0].mask == 0] == 0).all() and grey.max() > 0
    compared = read_csv(config.out / "comparison.csv")
    assert {"best_psnr_hole", "diversity"} <= {row["measure"] for row in compared}
    assert {row["clips"] for row in compared if row["measure"] == "best_psnr_hole"} == {"3"}


def test_tables_are_there_as_parquet_too(config: SweepConfig) -> None:
    sweep(config)
    for name, columns in (("clips", ()), ("results", ("nfe", "clips")), ("comparison", ())):
        rows = read_csv(config.out / f"{name}.csv")
        table = parquet.read_table(config.out / f"{name}.parquet")
        assert table.column_names == list(rows[0])
        for row, typed in zip(rows, table.to_pylist(), strict=True):
            for column, text in row.items():
                value = typed[column]
                same = value == (type(value)(text) if text else None)
                assert same or math.isnan(value) == math.isnan(float(text)), (name, column)
        assert all(isinstance(table[column][0].as_py(), int) for column in columns)


def test_a_finished_sweep_is_compared_with_another_reference_without_evaluating(
    config: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def references() -> set[tuple[str, str]]:
        rows = read_csv(config.out / "comparison.csv")
        return {(row["schedule"], row["reference"]) for row in rows}

    sweep(config)
    assert references() == {(SCHEDULES[1], SCHEDULES[0])}
    monkeypatch.delattr(Denoiser, "denoise")
    sweep(dataclasses.replace(config, reference=SCHEDULES[1]))
    assert references() == {(SCHEDULES[0], SCHEDULES[1])}
    assert read_sweep(config.out).about["reference"] == SCHEDULES[1]


def test_a_sweep_of_one_family_takes_its_clips_alone(
    config: SweepConfig, denoiser: Denoiser, make_example: Callable[[str], Example]
) -> None:
    mixed = [make_example(key) for key in ("a_stationary", "a_variable", "b_variable")]
    shutil.rmtree(config.shards)
    write_split(Path(config.shards), denoiser.autoencoder, mixed)
    sweep(dataclasses.replace(config, masks="variable", schedules="ddim:2"))
    clips = {row["clip"] for row in read_csv(config.out / "clips.csv")}
    assert clips == {"a_variable", "b_variable"}
    assert json.loads((config.out / "sweep.json").read_text())["masks"] == ["variable"]


def test_a_model_that_changed_since_is_refused(config: SweepConfig, denoiser: Denoiser) -> None:
    sweep(config)
    denoiser.network.conv_out.bias.data.add_(1)
    denoiser.save(config.model)
    with pytest.raises(BadInput, match="the model has changed since the sweep in"):
        sweep(config)


def test_seconds_add_up_over_the_runs_of_a_sweep_and_the_batch_stays(tmp_path: Path) -> None:
    first = Account(tmp_path, {"model": "a"}, lambda: 7)
    time.sleep(0.02)
    first.save()
    again = Account(tmp_path, {"model": "a"}, lambda: 9)
    assert again.seconds > 0.02
    assert again.capacity == 7


def test_a_ledger_reads_the_rows_of_all_processes_but_no_part_of_one(tmp_path: Path) -> None:
    columns = ["schedule", "clip", "completion", "psnr"]
    rows = [dict(zip(columns, ("ddim:2", clip, "0", "1"), strict=True)) for clip in "aab"]
    rows[1]["completion"] = "1"
    for process, row in enumerate(rows[:2]):
        Ledger(tmp_path, columns, process).add(row)
    with (tmp_path / "clips-1.csv").open("ab") as file:
        file.write(b"ddim:2,torn")
    ledger = Ledger(tmp_path, columns)
    ledger.read()
    ledger.gather()
    ledger.add(rows[2])
    again = Ledger(tmp_path, columns)
    again.read()
    assert list(again.rows.values()) == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("clips-0.csv", "clips.csv", "clips.parquet"),
    ]


def test_a_plan_tells_the_cost_and_writes_nothing(
    config: SweepConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(config.model), str(config.shards), str(config.out), "--plan", "true"]
    arguments += ["--clips", "3", "--completions", "2"]
    assert main([*arguments, "--schedules", config.schedules]) == 0
    said = capsys.readouterr().out
    assert not config.out.exists()
    costs = {name: numbers for name, *numbers in map(str.split, rows_of(said))}
    assert costs["ddpm:3+resample(n=1)"][:3] == ["6", "6", "36"]
    assert costs["all"][:2] == ["6", str(2 * 3 * (1 + 2 + 6))]


def rows_of(table: str) -> list[str]:
    lines = [line.replace("│", " ").strip() for line in table.splitlines() if "│" in line]
    return [line for line in lines if line]


BadMake = Callable[[SweepConfig, Path, list[Example], dict[str, object]], SweepConfig]


def other_autoencoder(
    config: SweepConfig, tmp: Path, examples: list[Example], identity: dict[str, object]
) -> SweepConfig:
    write_split(tmp / "other", {**identity, "name": "theirs", "sha256": "f" * 64}, examples)
    return dataclasses.replace(config, shards=str(tmp / "other"))


def other_channels(
    config: SweepConfig, tmp: Path, examples: list[Example], identity: dict[str, object]
) -> SweepConfig:
    wide = [
        dataclasses.replace(
            example,
            latents=np.concatenate([example.latents] * 2, axis=1),
            masked_latents=np.concatenate([example.masked_latents] * 2, axis=1),
        )
        for example in examples
    ]
    write_split(tmp / "other", identity, wide)
    return dataclasses.replace(config, shards=str(tmp / "other"))


def no_pixels(
    config: SweepConfig, tmp: Path, examples: list[Example], identity: dict[str, object]
) -> SweepConfig:
    write_split(tmp / "other", identity, [dataclasses.replace(e, pixels=None) for e in examples])
    return dataclasses.replace(config, shards=str(tmp / "other"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_autoencoder, "were encoded with theirs .*the model in .* was trained on "),
        (
            other_channels,
            r"hold latents of the shape \[.*, 8, .*the model in .* was trained on \[.*, 4, ",
        ),
        (no_pixels, "shard without pixels: encode again with --pixels all"),
        ({"schedules": "ddim:2 ddin:3"}, "did you mean ddim"),
        ({"schedules": ""}, "schedules is empty: give some"),
        ({"schedules": "ddpm:3 ddpm:3(variance=small)"}, "schedules has ddpm:3 twice"),
        ({"schedules": "ddim:41"}, "trained with 40 timesteps: give at most 40"),
        ({"clips": 4}, "clips is 4; .* holds 3: give at most that, or 0 for all"),
        ({"clips": -1}, "clips is -1: give 0 or more"),
        ({"completions": 0}, "completions is 0: give 1 or more"),
        ({"batch_size": -1}, "batch_size is -1: give 0 or more"),
        ({"reference": "ddim:9"}, "reference is ddim:9; the schedules are ddim:2 ddpm:3.*choose"),
        ({"i3d": "i3d.safetensors"}, "the clips have 3 frames, and FVD wants at least 10: leave"),
        ({"lpips": "no.safetensors"}, "cannot load Lpips from no.safetensors"),
        ({"split": "test"}, "no encoded split 'test': it has validation"),
        ({"device": "abacus"}, "device is 'abacus', which does not work"),
    ],
)
def test_bad_input_is_one_clear_message_and_nothing_is_written(
    config: SweepConfig,
    tmp_path: Path,
    examples: list[Example],
    denoiser: Denoiser,
    make: BadMake | dict[str, object],
    message: str,
) -> None:
    if isinstance(make, dict):
        bad = dataclasses.replace(config, **make)  # type: ignore[arg-type]
    else:
        bad = make(config, tmp_path, examples, denoiser.autoencoder)
    with pytest.raises(BadInput, match=message):
        sweep(bad)
    assert not config.out.exists()


def test_an_autoencoder_other_than_the_models_is_refused(
    config: SweepConfig, autoencoder: Autoencoder, tmp_path: Path
) -> None:
    next(autoencoder.network.parameters()).data.add_(1)
    autoencoder.network.save_pretrained(tmp_path / "another")
    with pytest.raises(BadInput, match=r"autoencoder is .*another .*the model was trained on"):
        sweep(dataclasses.replace(config, autoencoder=str(tmp_path / "another")))


@pytest.mark.skipif(not SHARED.is_dir(), reason="no networks in ../shared")
def test_given_its_networks_a_sweep_has_lpips_and_the_distances_of_sets(
    config: SweepConfig, denoiser: Denoiser
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
        for number, key in enumerate(CLIPS[:2])
    ]
    shutil.rmtree(config.shards)
    write_split(Path(config.shards), denoiser.autoencoder, examples)
    space = dataclasses.replace(denoiser.space, shape=[frames, 4, 8, 8])
    Denoiser(denoiser.network, denoiser.config, space).save(config.model)
    rows = sweep(
        dataclasses.replace(
            config,
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
        assert float(found["mean"][column]) == pytest.approx(
            float(found["ddim:1"][column]), rel=1e-3
        )
    kept = {path.parent.name for path in (config.out / "features").rglob("*.npy")}
    assert kept == {"truth", "ddim-1", "mean", "fill", "classic", "autoencoder"}


# On several processes

# What a process runs: forked from a server that has imported everything, and computed nothing.
PROCESS = """
import os, sys
os.environ.update(environment)
descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(descriptor, 2)
import torch
torch.set_num_threads(1)
from vidfill.sampling.sweep.run import main
sys.exit(main(arguments))
"""
MIXED = "ddim:2 ddpm:8+resample(n=1) ddim:8+jump(length=2,times=3) dpmpp:5 heun:3 ddim:6+inject"


def start(config: SweepConfig, size: int) -> list[BaseProcess]:
    """Processes that meet as a launcher's do; what they say goes to a file beside the results."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vidfill.sampling.sweep.run"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(size):
        meeting = {"WORLD_SIZE": size, "RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        names = {
            "environment": {k: str(v) for k, v in meeting.items()} | {"MASTER_PORT": str(port)},
            "arguments": arguments_for(config),
            "said": str(said_of(config)),
        }
        processes.append(context.Process(target=exec, args=(PROCESS, names)))
        processes[-1].start()
    return processes


def arguments_for(config: SweepConfig) -> list[str]:
    changed = ("schedules", "clips", "completions", "batch_size", "keep", "device")
    options = [word for name in changed for word in (f"--{name}", str(getattr(config, name)))]
    return [str(config.model), config.shards, str(config.out), *options]


def said_of(config: SweepConfig) -> Path:
    return config.out.with_name(f"{config.out.name}.said")


def end(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.fixture
def mixed(config: SweepConfig) -> SweepConfig:
    return dataclasses.replace(config, schedules=MIXED, clips=2, completions=2, batch_size=0)


def read_files(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_two_processes_find_what_one_finds(mixed: SweepConfig) -> None:
    alone = dataclasses.replace(mixed, out=mixed.out.with_name("alone"))
    sweep(alone)
    assert end(start(mixed, 2)) == [0, 0], said_of(mixed).read_text()
    assert_same_results(mixed.out, alone.out)
    assert read_files(mixed.out).keys() == read_files(alone.out).keys()
    about = json.loads((mixed.out / "sweep.json").read_text())
    assert about["processes"] == 2
    assert "error" not in said_of(mixed).read_text()


def test_killed_at_random_moments_it_continues_on_another_number_of_processes(
    mixed: SweepConfig,
) -> None:
    alone = dataclasses.replace(mixed, out=mixed.out.with_name("alone"))
    sweep(alone)
    everything = len(read_csv(alone.out / "clips.csv"))
    done: set[str] = set()
    for run, size in enumerate((2, 3, 1)):
        processes = start(mixed, size)
        wanted = len(done) + 1 + derive_seed("kill", run) % (everything // 4)
        while len(found := rows_so_far(mixed.out)) < wanted:
            assert all(process.is_alive() for process in processes), said_of(mixed).read_text()
            time.sleep(0.005)
        assert done <= found
        for process in processes:
            process.kill()
        assert end(processes) == [-signal.SIGKILL] * size
        done = rows_so_far(mixed.out)
        assert not (mixed.out / "results.csv").exists()
    assert end(start(mixed, 2)) == [0, 0], said_of(mixed).read_text()
    assert done <= rows_so_far(mixed.out)
    assert_same_results(mixed.out, alone.out)


def rows_so_far(out: Path) -> set[str]:
    """The whole rows of all processes, as they were written."""
    paths = [path for path in out.glob("clips*.csv") if path.is_file()]
    lines = [line for path in paths for line in path.read_text().splitlines(keepends=True)]
    return {line for line in lines if line.endswith("\n") and not line.startswith("schedule,")}


def test_the_launcher_of_the_documentation_runs_a_sweep(config: SweepConfig) -> None:
    node = Path(__file__).parents[3] / "launch" / "node.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(node)]
    launch += ["--num_processes", "2", "--main_process_port", "0", "-m", "vidfill.sampling.sweep"]
    done = subprocess.run(
        [sys.executable, *launch, *arguments_for(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((config.out / "sweep.json").read_text())["processes"] == 2
    assert done.stdout.count("autoencoder") == 1  # the first process shows the table, alone


def test_a_mistake_on_two_processes_is_said_once_and_ends_both(config: SweepConfig) -> None:
    wrong = dataclasses.replace(config, schedules="ddim:41")
    assert end(start(wrong, 2)) == [2, 2]
    assert said_of(wrong).read_text().count("give at most 40") == 1
    assert not wrong.out.exists()


def test_the_default_schedules_are_the_papers_n_and_can_be_read() -> None:
    schedules = read_schedules(DEFAULT_SCHEDULES)
    assert " ".join(schedules) == DEFAULT_SCHEDULES
    assert [schedule for schedule in schedules if schedule.startswith("ddpm")] == [
        "ddpm:50",
        *(f"ddpm:50+resample(n={n})" for n in (4, 6, 10)),
    ]


def test_slugs_are_safe_names_of_files() -> None:
    assert slug("ddpm:50(variance=large)+resample(n=4)") == "ddpm-50-variance-large-resample-n-4"
