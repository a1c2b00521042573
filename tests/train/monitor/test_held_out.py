"""The held-out loss: its value, its parts, and that nothing but the network changes it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from vidfill.data.encode.run import encode
from vidfill.data.encode.settings import EncodeConfig
from vidfill.data.shards.reading import ShardedDataset
from vidfill.data.shards.stream import Batch
from vidfill.data.storage.names import shard_name
from vidfill.data.synth.run import SynthConfig, synth
from vidfill.errors import BadInput
from vidfill.modeling.denoiser import Denoiser, LatentSpace
from vidfill.modeling.settings import DiffusionConfig, LossConfig
from vidfill.modeling.unet import VideoUNet
from vidfill.train.config import DataConfig, EvaluationConfig, PreviewConfig, TrainConfig
from vidfill.train.monitor.held_out import HeldOut, figures, open_held_out
from vidfill.train.monitor.previews import open_preview
from vidfill.train.state import make_denoiser
from vidfill.train.step import diffusion_loss

CPU = torch.device("cpu")


def batch_of(position: int, latents: torch.Tensor, latent_mask: torch.Tensor) -> Batch:
    """A batch of one clip whose masked latents are zero."""
    one = latents[None], torch.zeros_like(latents)[None], latent_mask[None]
    return Batch([str(position)], [position], torch.ones(1), *one)


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """One training clip and seven held-out ones."""
    root = tmp_path_factory.mktemp("held-out")
    autoencoder = ShardedDataset(shards, "train").manifest.autoencoder["name"]
    synth(SynthConfig(root / "videos", clips=1, validation=7, size=32, frames=20))
    encode(EncodeConfig(root / "videos", root / "shards", autoencoder=autoencoder))
    return root / "shards"


@pytest.fixture
def config(tiny_config: TrainConfig, validation: Path) -> TrainConfig:
    return dataclasses.replace(tiny_config, shards=str(validation), batch_size=4)


@pytest.fixture
def denoiser(config: TrainConfig) -> Denoiser:
    """Random weights; those of the last layer, which are zero at first, too."""
    made = make_denoiser(config, ShardedDataset(config.shards, "train").manifest)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in made.network.parameters():
            weight.add_(torch.randn(weight.shape, generator=source), alpha=0.05)
    made.network.eval().requires_grad_(False)
    return made


def opened(
    config: TrainConfig, denoiser: Denoiser, process: int = 0, processes: int = 1
) -> HeldOut:
    held_out = open_held_out(config, denoiser, process, processes)
    assert held_out
    return held_out


@pytest.mark.parametrize("part", ["sha256", "scaling_factor"])
def test_held_out_clips_and_previews_of_another_autoencoder_are_refused(
    config: TrainConfig, denoiser: Denoiser, tmp_path: Path, part: str
) -> None:
    shards = Path(shutil.copytree(config.shards, tmp_path / "shards"))
    file = shards / "validation" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["autoencoder"][part] = "f" * 64 if part == "sha256" else 3.0
    file.write_text(json.dumps(manifest))
    other = dataclasses.replace(config, shards=str(shards), preview=PreviewConfig(every=1))
    for open_clips in (
        lambda: open_held_out(other, denoiser, 0, 1),
        lambda: open_preview(other, denoiser, CPU),
    ):
        with pytest.raises(BadInput, match=f"validation holds latents of .*whose {part} is "):
            open_clips()


def test_the_loss_of_a_network_that_predicts_zero_is_the_targets_mean_square() -> None:
    """A fresh network predicts zero everywhere, and its target, the clean latents, is known.

    The latents are 2 in the hole, a quarter of the first frame, and 1 elsewhere.
    """
    network = VideoUNet(1, 1, block_out_channels=(8,), head_channels=8, norm_groups=4)
    space = LatentSpace([2, 1, 4, 4], [0.0], [1.0], {})
    config = DiffusionConfig(timesteps=10, process="flow", target="clean", normalise=False)
    hole = torch.zeros(2, 1, 4, 4)
    hole[0, :, :2, :2] = 1
    held_out = HeldOut([batch_of(3, 1 + hole, hole)], quantiles=2, seed=0)
    found = figures(held_out.sums(Denoiser(network.eval(), config, space), CPU))
    mean = (4 * 4 + 28 * 1) / 32
    expected = {"loss": mean, "loss_hole": 4, "loss_visible": 1}
    assert found == pytest.approx(expected | {"loss_quantile_1": mean, "loss_quantile_2": mean})


def test_a_latent_half_in_the_hole_counts_half_on_either_side() -> None:
    network = VideoUNet(1, 1, block_out_channels=(8,), head_channels=8, norm_groups=4)
    config = DiffusionConfig(timesteps=10, process="flow", target="clean", normalise=False)
    denoiser = Denoiser(network.eval(), config, LatentSpace([1, 1, 2, 2], [0.0], [1.0], {}))
    latents = torch.tensor([[[[3.0, 1.0], [1.0, 1.0]]]])
    hole = torch.tensor([[[[0.5, 0.5], [0.0, 0.0]]]])
    held_out = HeldOut([batch_of(0, latents, hole)], quantiles=1, seed=0)
    found = figures(held_out.sums(denoiser, CPU))
    assert found["loss_hole"] == pytest.approx((0.5 * 9 + 0.5 * 1) / 1)
    assert found["loss_visible"] == pytest.approx((0.5 * 9 + 0.5 * 1 + 1 + 1) / 3)


def test_what_no_clip_has_is_left_out() -> None:
    assert figures(torch.tensor([[6.0, 3, 0, 0, 6, 3]], dtype=torch.float64)) == {
        "loss": 2,
        "loss_visible": 2,
        "loss_quantile_1": 2,
    }


def test_it_is_what_training_computes_at_the_same_draws(
    config: TrainConfig, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training's own function at the draws that the evaluation gave the denoiser."""
    held_out = opened(config, denoiser)
    seen: list[torch.Tensor] = []
    pair = denoiser.training_pair

    def listen(
        clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen.extend([clean, noise, timestep])
        return pair(clean, noise, timestep)

    monkeypatch.setattr(denoiser, "training_pair", listen)
    total = held_out.sums(denoiser, CPU)[:, 0].sum().item()
    monkeypatch.undo()
    batches = [*held_out.batches] * held_out.quantiles
    expected = 0.0
    for batch, (clean, noise, timestep) in zip(
        batches, zip(*[iter(seen)] * 3, strict=True), strict=True
    ):
        latents = denoiser.denormalise(clean)
        batch = batch.to(CPU)
        losses = diffusion_loss(
            denoiser.network, denoiser, batch, latents, timestep, noise, LossConfig()
        )
        expected += losses.sum().item()
    assert total == pytest.approx(expected, rel=1e-5)  # float32's, and normalised back and forth


def test_each_clip_is_measured_once_in_each_range_of_timesteps(
    config: TrainConfig, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    pair = denoiser.training_pair
    monkeypatch.setattr(
        denoiser,
        "training_pair",
        lambda clean, noise, timestep: seen.append(timestep) or pair(clean, noise, timestep),
    )
    opened(config, denoiser).sums(denoiser, CPU)
    timesteps = torch.cat(seen).reshape(4, 7)  # 1000 of them in four ranges, seven clips
    assert (timesteps // 250).tolist() == [[quantile] * 7 for quantile in range(4)]
    assert len(timesteps.unique()) > 20


@pytest.mark.slow
def test_the_figures_do_not_change_from_one_evaluation_to_the_next(
    config: TrainConfig, denoiser: Denoiser
) -> None:
    accelerator = Accelerator(cpu=True)
    held_out = opened(config, denoiser)
    torch.manual_seed(5)
    first = held_out.measure(denoiser, accelerator)
    torch.manual_seed(6)
    assert held_out.measure(denoiser, accelerator) == first
    assert opened(config, denoiser).measure(denoiser, accelerator) == first


@pytest.mark.slow
def test_the_shares_of_processes_add_up_to_the_whole(
    config: TrainConfig, denoiser: Denoiser
) -> None:
    """Batches are of another size then, so float32 rounds otherwise."""
    whole = figures(opened(config, denoiser).sums(denoiser, CPU))
    for processes in (2, 3, 9):
        parts = [opened(config, denoiser, process, processes) for process in range(processes)]
        assert sum(len(batch.keys) for part in parts for batch in part.batches) == 7
        total = torch.stack([part.sums(denoiser, CPU) for part in parts]).sum(dim=0)
        assert figures(total) == pytest.approx(whole, rel=1e-5)


def test_a_process_takes_as_many_clips_at_once_as_in_training(
    config: TrainConfig, denoiser: Denoiser
) -> None:
    config = dataclasses.replace(config, batch_size=12, gradient_accumulation=2)
    assert [len(batch.keys) for batch in opened(config, denoiser).batches] == [6, 1]
    assert [len(batch.keys) for batch in opened(config, denoiser, 0, 3).batches] == [2, 1]


def test_clips_are_spread_over_the_split(config: TrainConfig, denoiser: Denoiser) -> None:
    config = dataclasses.replace(config, evaluation=EvaluationConfig(clips=3))
    (batch,) = opened(config, denoiser).batches
    assert batch.positions == [0, 3, 6]


def test_there_is_none_without_a_validation_split_or_where_none_is_wanted(
    config: TrainConfig, denoiser: Denoiser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unwanted = dataclasses.replace(config, evaluation=EvaluationConfig(every=0))
    assert open_held_out(unwanted, denoiser, 0, 1) is None
    without = dataclasses.replace(config, shards=str(tmp_path))
    assert open_held_out(without, denoiser, 1, 2) is None
    assert capsys.readouterr().err == ""
    assert open_held_out(without, denoiser, 0, 2) is None
    assert "no validation split: no held-out loss" in capsys.readouterr().err


def test_a_damaged_clip_is_refused_or_left_out_aloud(
    config: TrainConfig, denoiser: Denoiser, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    for file in Path(config.shards).rglob("*"):
        if file.is_file():
            copy = damaged / file.relative_to(config.shards)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    shard = damaged / "validation" / shard_name(0)
    content = np.frombuffer(shard.read_bytes(), np.uint8).copy()
    content[1000:1100] ^= 255
    shard.write_bytes(content.tobytes())
    config = dataclasses.replace(config, shards=str(damaged))
    with pytest.raises(BadInput, match="is damaged"):
        open_held_out(config, denoiser, 0, 1)
    config = dataclasses.replace(config, data=DataConfig(damaged="skip"))
    assert sum(len(batch.keys) for batch in opened(config, denoiser).batches) == 6
    assert "left out of the held-out clips" in capsys.readouterr().err
