from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from vidfill import jobs
from vidfill.data.shards import (
    MANIFEST,
    Example,
    Manifest,
    ShardTable,
    family_of,
    latent_moments,
    write_shard,
)
from vidfill.modeling.autoencoder import Autoencoder
from vidfill.modeling.diffusion import Denoiser
from vidfill.sampling import sweep as sweep_module
from vidfill.sampling.ledger import COLUMNS, Ledger
from vidfill.sampling.metrics import measure
from vidfill.sampling.sampler import inpaint
from vidfill.sampling.sweep import (
    SweepConfig,
    main,
    read_schedules,
    show_results,
    slug,
    sweep,
)

Row = dict[str, str]
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
    return sorted(rows, key=lambda row: (row["schedule"], row.get("clip", "")))


def test_results_have_the_baselines_then_the_schedules_with_their_costs(
    config: SweepConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    show_results(sweep(config))
    rows = read_csv(config.out / "results.csv")
    assert ",".join(rows[0]) == (
        "schedule,nfe,seconds_per_clip,psnr,psnr_hole,ssim,colour_error,temporal_error,clips"
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
    sweep(config)
    rows = {(row["schedule"], row["clip"]): row for row in read_csv(config.out / "clips.csv")}
    for schedule in SCHEDULES:
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
    sample = sweep_module.sample

    def interrupted(*args: object, **kwargs: object) -> Iterator[object]:
        for result in sample(*args, **kwargs):  # type: ignore[arg-type]
            yield result
            nonlocal finished
            finished += 1
            if finished == 4:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(config)
    before = (config.out / "clips.csv").read_bytes()
    assert not (config.out / "results.csv").exists()
    with (config.out / "clips.csv").open("ab") as file:
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
    assert (config.out / "clips.csv").read_bytes().startswith(before)
    for name in ("clips.csv", "results.csv"):
        ours, theirs = (untimed(read_csv(out / name)) for out in (config.out, whole.out))
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            assert our.keys() == their.keys()
            for column, value in our.items():
                if column in ("schedule", "clip"):
                    assert value == their[column]
                else:
                    assert float(value) == pytest.approx(float(their[column]), rel=1e-3)
    sampled = [row for row in read_csv(config.out / "clips.csv") if int(row["nfe"])]
    done = [line for line in before.decode().splitlines()[1:] if int(line.split(",")[2])]
    total = sum(int(row["nfe"]) for row in sampled)
    assert sum(evaluations) == total - sum(int(line.split(",")[2]) for line in done)


def test_a_finished_sweep_started_again_evaluates_nothing(
    config: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(config)
    before = (config.out / "results.csv").read_bytes()
    monkeypatch.delattr(Denoiser, "denoise")
    sweep(config)
    assert (config.out / "results.csv").read_bytes() == before


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
    with pytest.raises(jobs.BadInput, match="the model has changed since the sweep in"):
        sweep(config)


def test_seconds_add_up_over_the_runs_of_a_sweep(tmp_path: Path) -> None:
    first = Ledger(tmp_path, {"model": "a"})
    first.add(dict.fromkeys(COLUMNS, "0") | {"schedule": "ddim:2", "clip": "a"})
    again = Ledger(tmp_path, {"model": "a"})
    assert again.seconds > 0
    assert ("ddim:2", "a") in again
    assert ("ddim:2", "b") not in again


def test_a_plan_tells_the_cost_and_writes_nothing(
    config: SweepConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(config.model), str(config.shards), str(config.out), "--plan", "true"]
    assert main([*arguments, "--schedules", config.schedules, "--clips", "3"]) == 0
    said = capsys.readouterr().out
    assert not config.out.exists()
    costs = {name: numbers for name, *numbers in map(str.split, rows_of(said))}
    assert costs["ddpm:3+resample(n=1)"][:3] == ["6", "3", "18"]
    assert costs["all"][:2] == ["3", str(3 * (1 + 2 + 6))]


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
        ({"batch_size": 0}, "batch_size is 0: give 1 or more"),
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
    with pytest.raises(jobs.BadInput, match=message):
        sweep(bad)
    assert not config.out.exists()


def test_an_autoencoder_other_than_the_models_is_refused(
    config: SweepConfig, autoencoder: Autoencoder, tmp_path: Path
) -> None:
    next(autoencoder.network.parameters()).data.add_(1)
    autoencoder.network.save_pretrained(tmp_path / "another")
    with pytest.raises(jobs.BadInput, match=r"autoencoder is .*another .*the model was trained on"):
        sweep(dataclasses.replace(config, autoencoder=str(tmp_path / "another")))


def test_several_processes_are_refused(
    config: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(jobs.BadInput, match="WORLD_SIZE is 2; sweep runs in one process"):
        sweep(config)


def test_the_default_schedules_are_the_papers_n_and_can_be_read() -> None:
    schedules = read_schedules(sweep_module.DEFAULT_SCHEDULES)
    assert " ".join(schedules) == sweep_module.DEFAULT_SCHEDULES
    assert [schedule for schedule in schedules if schedule.startswith("ddpm")] == [
        "ddpm:50",
        *(f"ddpm:50+resample(n={n})" for n in (4, 6, 10)),
    ]


def test_slugs_are_safe_names_of_files() -> None:
    assert slug("ddpm:50(variance=large)+resample(n=4)") == "ddpm-50-variance-large-resample-n-4"
