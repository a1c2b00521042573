"""What is exported is the run's average, bit for bit, and explains itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vidfill.modeling.checkpoint import newest_first
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
from vidfill.modeling.diffusion import Denoiser
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
    assert f"{steps} steps of 3 clips" in card
    assert f"of decay {decay} a step" in card
    assert ("| loss |" in card) == (decay == "0.2")  # what the run evaluates is the first average
    assert str(run.parent) not in card


def test_the_two_averages_differ(run: Path, tmp_path: Path) -> None:
    main([str(run), str(tmp_path / "short"), "--ema", "0.2"])
    main([str(run), str(tmp_path / "long"), "--ema", "0.9"])
    short, long = (load_file(tmp_path / name / WEIGHTS) for name in ("short", "long"))
    assert not all(torch.equal(short[name], long[name]) for name in short)


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
    assert "exists: choose another folder" in capsys.readouterr().err
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
