"""What is exported is the run's average, bit for bit, and explains itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vidfill.data.shards.reading import ShardedDataset
from vidfill.modeling.autoencoder import load_autoencoder
from vidfill.modeling.denoiser import Denoiser
from vidfill.modeling.run_folder import newest_first
from vidfill.sampling.pipeline import VideoInpaintPipeline
from vidfill.sampling.sweep.run import sweep
from vidfill.sampling.sweep.settings import SweepConfig
from vidfill.train.config import (
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PreviewConfig,
    TrainConfig,
)
from vidfill.train.export import main
from vidfill.train.loop import train

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# Loads a folder in both ways, in a process that knows nothing of the run, and keeps the weights.
READER = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from vidfill.modeling.denoiser import Denoiser
from vidfill.modeling.unet import VideoUNet

folder = Path(sys.argv[1])
unet = VideoUNet.from_pretrained(folder / "unet")
for name, network in (("denoiser", Denoiser.load(folder).network), ("unet", unet)):
    save_file(network.state_dict(), Path(sys.argv[2]) / f"{name}.safetensors")
"""


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 3 and 6, and two averages."""
    out = tmp_path_factory.mktemp("run") / "first"
    config = TrainConfig(
        str(shards),
        out,
        steps=6,
        batch_size=3,
        checkpoint_every=3,
        model=ModelConfig(block_out_channels=(16, 32), head_channels=8, norm_groups=8),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup=2, ema_decays=(0.2, 0.9)),
        evaluation=EvaluationConfig(every=3, clips=1),
        preview=PreviewConfig(every=0),
    )
    train(config)
    return out


@pytest.fixture(scope="module")
def swept(run: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept") / "sweep"
    sweep(SweepConfig(run, str(shards), out, "ddim:1 ddim:2", examples=1, keep=1, device="cpu"))
    return out


def assert_same_tensors(one: Path, other: Path) -> None:
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("options", "source", "decay", "steps"),
    [
        ([], "step-00000006/model", "0.2", 6),
        (["--ema", "0.9"], "step-00000006/average-1", "0.9", 6),
        (["--checkpoint", "step-00000003", "--ema", "0.2"], "step-00000003/model", "0.2", 3),
    ],
)
def test_the_exported_folder_is_the_average_asked_for_and_its_card_says_so(
    options: list[str], source: str, decay: str, steps: int, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    assert main([str(run), str(out), *options]) == 0
    assert_same_tensors(out / WEIGHTS, run / "checkpoints" / source / WEIGHTS)
    card = (out / "README.md").read_text()
    assert f"{steps} steps of 3 examples" in card
    assert f"with a decay of {decay} per step" in card
    assert ("| loss |" in card) == (decay == "0.2")  # what the run evaluates is the first average
    assert str(run.parent) not in card


def test_the_two_averages_differ(run: Path, tmp_path: Path) -> None:
    main([str(run), str(tmp_path / "short"), "--ema", "0.2"])
    main([str(run), str(tmp_path / "long"), "--ema", "0.9"])
    short, long = (load_file(tmp_path / name / WEIGHTS) for name in ("short", "long"))
    assert not all(torch.equal(short[name], long[name]) for name in short)


@pytest.mark.slow
def test_a_fresh_process_loads_it_as_a_denoiser_and_as_a_diffusers_model(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    assert main([str(run), str(out)]) == 0
    (tmp_path / "loaded").mkdir()
    command = [sys.executable, "-c", READER, str(out), str(tmp_path / "loaded")]
    subprocess.run(command, check=True, cwd=tmp_path)
    for name in ("denoiser", "unet"):
        assert_same_tensors(tmp_path / "loaded" / f"{name}.safetensors", out / WEIGHTS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ema", "0.99"], "ema is 0.99; the run averaged with 0.2 and 0.9: give one of them"),
        (
            ["--checkpoint", "step-4"],
            "holds step-00000006, step-00000003: give one of them",
        ),
    ],
)
def test_what_the_run_does_not_have_is_refused_with_what_it_has(
    options: list[str],
    said: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(run), str(tmp_path / "model"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over_and_no_other_folder_is_taken_for_a_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    assert main([str(run), str(tmp_path / "model")]) == 2
    assert "exists: choose another name" in capsys.readouterr().err
    assert main([str(tmp_path / "model"), str(tmp_path / "other")]) == 2
    assert "name a folder that `vidfill train` wrote" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "young")
    shutil.rmtree(tmp_path / "young" / "checkpoints")
    assert main([str(tmp_path / "young"), str(tmp_path / "other")]) == 2
    assert "holds no checkpoint yet" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_damaged_checkpoint_is_exported_by_nobody(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    newest, before = newest_first(copy / "checkpoints")
    (newest / "average-1" / WEIGHTS).write_bytes(b"")
    assert main([str(copy), str(tmp_path / "named"), "--checkpoint", newest.name]) == 2
    assert "its hash differs" in capsys.readouterr().err
    assert main([str(copy), str(tmp_path / "model")]) == 0
    assert "trying the one before" in capsys.readouterr().err
    assert_same_tensors(tmp_path / "model" / WEIGHTS, before / "model" / WEIGHTS)


def test_the_pipeline_makes_what_the_run_itself_makes(run: Path, tmp_path: Path) -> None:
    assert main([str(run), str(tmp_path / "model"), "--schedule", "ddim:2"]) == 0
    exported = VideoInpaintPipeline.from_pretrained(tmp_path / "model")
    denoiser = Denoiser.load(run)
    autoencoder = load_autoencoder(denoiser.autoencoder["name"])
    before = VideoInpaintPipeline.of(denoiser, autoencoder, "ddim:2")
    video = np.random.default_rng(0).integers(0, 256, (22, 32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), bool)
    mask[8:20, 12:24] = True
    ours, theirs = (pipe(video, mask, output_type="np").frames for pipe in (exported, before))
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours[0], video / np.float32(255))


@pytest.mark.slow
def test_the_exported_folder_is_swept_by_the_autoencoder_in_it(
    run: Path, shards: Path, swept: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    assert main([str(run), str(model)]) == 0
    out = tmp_path / "sweep"
    sweep(SweepConfig(model, str(shards), out, "ddim:1 ddim:2", examples=1, keep=1, device="cpu"))
    about = json.loads((out / "sweep.json").read_text())
    assert about["autoencoder"]["name"] == str(model / "vae")
    ours, theirs = (
        [line.split(",")[3:] for line in (folder / "results.csv").read_text().splitlines()]
        for folder in (out, swept)
    )
    assert ours == theirs  # but for the seconds


def test_half_the_precision_is_half_the_file_and_loads_as_float32(
    run: Path, tmp_path: Path
) -> None:
    main([str(run), str(tmp_path / "whole")])
    assert main([str(run), str(tmp_path / "half"), "--precision", "float16"]) == 0
    whole, half = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "half"))
    assert all(torch.equal(half[name], whole[name].half()) for name in whole)
    loaded = Denoiser.load(tmp_path / "half").network
    assert loaded.dtype == torch.float32
    assert VideoInpaintPipeline.from_pretrained(tmp_path / "half").unet.dtype == torch.float32
    assert "the weights here are float16" in (tmp_path / "half" / "README.md").read_text()
    vae = "vae/diffusion_pytorch_model.safetensors"  # its hash is what the latents are known by
    assert_same_tensors(tmp_path / "half" / vae, tmp_path / "whole" / vae)


def test_figures_of_other_weights_stay_out_of_the_card(
    run: Path, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert main([str(run), str(out), "--ema", "0.9", "--sweep", str(swept)]) == 2
    assert f"sweep is {swept}, of other weights than these" in capsys.readouterr().err
    assert not out.exists()


def test_the_card_names_data_masks_metrics_and_limits_and_no_path(
    run: Path, shards: Path, swept: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    assert main([str(run), str(model), "--sweep", str(swept)]) == 0
    card = (model / "README.md").read_text()
    manifest = ShardedDataset(shards, "train").manifest
    assert f"Data: `shards`, its training split, {manifest.examples} examples" in card
    assert f"Masks: {' '.join(manifest.masks['families'])}." in card
    assert "Autoencoder: AutoencoderTiny autoencoder (sha256" in card
    header, _, *rows = [line for line in card.splitlines() if line.startswith("|")][:9]
    names = [row.split("`")[1] for row in rows]
    assert names == ["fill", "classic", "flow", "mean", "autoencoder", "ddim:1", "ddim:2"]
    for column in ("NFE", "Temporal error", "PSNR of the hole", "SSIM"):
        assert column in header
    columns, first, *_ = (swept / "results.csv").read_text().splitlines()
    psnr = dict(zip(columns.split(","), first.split(","), strict=True))["psnr"]
    assert f"| {float(psnr):.2f} |" in rows[0]
    assert "## Limits" in card and "no evidence of what was there" in card
    for file in model.rglob("*"):
        for folder in (run, shards, tmp_path):
            assert file.is_dir() or str(folder.parent).encode() not in file.read_bytes()


def test_an_autoencoder_that_moved_is_asked_for_and_another_is_refused(
    run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(run, tmp_path / "run")
    gone = shards.parent / "autoencoder"
    there = gone.rename(tmp_path / "elsewhere")
    try:
        assert main([str(moved), str(tmp_path / "model")]) == 2
        assert "--autoencoder says where it is" in capsys.readouterr().err
        assert main([str(moved), str(tmp_path / "model"), "--autoencoder", "shipped"]) == 2
        assert "give that one with --autoencoder" in capsys.readouterr().err
        assert not (tmp_path / "model").exists()
        assert main([str(moved), str(tmp_path / "model"), "--autoencoder", str(there)]) == 0
    finally:
        there.rename(gone)
    VideoInpaintPipeline.from_pretrained(tmp_path / "model")


def test_without_the_shards_the_card_says_that_their_masks_are_not_known(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(run, tmp_path / "run")
    job = json.loads((moved / "job.json").read_text())
    job["config"]["shards"] = str(tmp_path / "gone")
    (moved / "job.json").write_text(json.dumps(job))
    assert main([str(moved), str(tmp_path / "model")]) == 0
    assert "the card cannot name the masks" in capsys.readouterr().err
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Masks: not known any more" in card and "`gone`" in card
