"""What version 0.1 left is read, and goes on; `of_0.1/README.md` tells how it was made."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import vidfill
from vidfill import jobs
from vidfill.data.verify.defects import is_sound
from vidfill.data.verify.run import verify
from vidfill.data.verify.settings import VerifyConfig
from vidfill.modeling.denoiser import Denoiser
from vidfill.sampling.sweep.run import sweep
from vidfill.sampling.sweep.settings import SweepConfig
from vidfill.train.config import ExportConfig
from vidfill.train.export import export
from vidfill.train.loop import main

KEPT = Path(__file__).parent / "of_0.1"
OPTIONS = [
    *("--batch_size", "1", "--log_every", "1", "--preview.every", "0", "--evaluation.every", "0"),
    *("--keep_checkpoints", "1", "--model.block_out_channels", "[4]", "--model.head_channels", "4"),
    *("--model.norm_groups", "2", "--optimizer.warmup", "2", "--optimizer.learning_rate", "2e-3"),
    *("--optimizer.ema_decays", "[0.9]"),
]
LOSSES = [1.02445161, 0.75502133]  # of the steps 5 and 6, under version 0.1


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the folders, as if they had been made there."""
    folder = shutil.copytree(KEPT, tmp_path / "old")
    for mark in folder.glob("*/job.json"):
        mark.write_text(mark.read_text().replace("/kept", str(folder)))
    return folder


def edit(path: Path, *keys: str, to: object) -> None:
    record = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    path.write_text(json.dumps(record))


@pytest.mark.slow
def test_a_run_of_0_1_goes_on_as_it_would_have(
    old: Path, losses: Callable[[Path], list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(old / "run" / "job.json", "config", "optimizer", "momentum", to=0.5)
    shards = shutil.move(old / "shards", old / "moved")
    command = [str(shards), str(old / "run"), *OPTIONS, "--steps", "6"]
    assert main([*command, "--seed", "1"]) == 2
    assert "seed was 0, now 1" in capsys.readouterr().err
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "options that are no more: optimizer.momentum\n" in said
    assert "from step 5 on shards is " in said
    assert "steps is 6 (was 4)\n" in said
    assert losses(old / "run") == pytest.approx(LOSSES, rel=1e-4)
    record = jobs.read_job(old / "run")
    assert record and record.stands_on
    assert record.version == vidfill.__version__
    assert set(record.stands_on["shards"]) == {"train", "validation"}


def test_a_run_of_0_1_does_not_go_on_with_other_latents(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(old / "shards" / "train" / "manifest.json", "latents_std", to=[1.0] * 4)
    assert main([str(old / "shards"), str(old / "run"), *OPTIONS, "--steps", "6"]) == 2
    assert "was trained on other latents" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_of_0_1_is_read_and_begun_with(old: Path, tmp_path: Path) -> None:
    export(ExportConfig(old / "run", tmp_path / "anew"))
    theirs, ours = (Denoiser.load(folder) for folder in (old / "model", tmp_path / "anew"))
    assert theirs.fingerprint() == ours.fingerprint()
    command = [str(old / "shards"), str(tmp_path / "tuned"), *OPTIONS, "--steps", "1"]
    assert main([*command, "--from", str(old / "model")]) == 0
    assert Denoiser.load(tmp_path / "tuned").config == theirs.config
    weights = theirs.network.state_dict()
    tuned = Denoiser.load(tmp_path / "tuned").network.state_dict()
    assert all(torch.allclose(tuned[name], weights[name], atol=2e-3) for name in weights)


def test_shards_of_0_1_are_intact(old: Path) -> None:
    checked = VerifyConfig(str(old / "shards"), samples=0, device="cpu")
    assert is_sound(verify(checked))
    edit(old / "shards" / "validation" / "manifest.json", "latents_std", to=[1.0] * 4)
    assert not is_sound(verify(checked))


def read_rows(out: Path) -> dict[str, list[float]]:
    """The measures of each schedule and baseline; the time that it took is no measure."""
    with (out / "clips.csv").open(newline="") as file:
        rows = [{**row, "seconds_per_clip": "0"} for row in csv.DictReader(file)]
    return {row["schedule"]: [float(text) for text in list(row.values())[3:]] for row in rows}


@pytest.mark.slow
def test_a_sweep_of_0_1_goes_on(old: Path) -> None:
    before = read_rows(old / "sweep")
    lines = (old / "sweep" / "clips.csv").read_text().splitlines(keepends=True)
    (old / "sweep" / "clips.csv").write_text("".join(lines[:3]))  # as if killed after two rows
    places = (old / "model", str(old / "shards"), old / "sweep")
    sweep(SweepConfig(*places, "ddim:1", examples=1, batch_size=1, keep=0, device="cpu"))
    after = read_rows(old / "sweep")
    assert after.keys() >= before.keys()  # baselines were added since
    for name, row in before.items():
        assert after[name] == pytest.approx(row, rel=1e-3, nan_ok=True), name
