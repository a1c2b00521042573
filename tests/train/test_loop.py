"""Training's laws: it learns, it resumes exactly, and it is the same on one process and on two."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from vidfill.data.encode.run import encode
from vidfill.data.encode.settings import EncodeConfig
from vidfill.data.shards.reading import ShardedDataset
from vidfill.data.shards.stream import Batch
from vidfill.data.shards.writing import read_index
from vidfill.data.storage.names import shard_name
from vidfill.data.synth.run import SynthConfig, synth
from vidfill.errors import BadInput
from vidfill.modeling.denoiser import Denoiser
from vidfill.modeling.settings import PRESETS, DiffusionConfig, LossConfig
from vidfill.train.config import ModelConfig, PreviewConfig, TrainConfig
from vidfill.train.loop import main, train
from vidfill.train.step import draw_latents

ROOT = Path(__file__).parents[2]
TINY = [
    *("--steps", "6", "--batch_size", "3", "--log_every", "1", "--checkpoint_every", "3"),
    *("--model.block_out_channels", "[16,32]", "--model.head_channels", "8"),
    *("--model.norm_groups", "8", "--preview.every", "0"),
    *("--optimizer.learning_rate", "2e-3", "--optimizer.warmup", "2"),
]

Losses = Callable[[Path], list[float]]


def newest(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text()


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(newest(run).rglob("*.safetensors"))
    assert len(files) == 5  # weights, two moments, two averages
    return {
        f"{file.relative_to(newest(run))}:{name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


def assert_equal_weights(first: Path, second: Path) -> None:
    ours, theirs = weights_of(first), weights_of(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def launch(arguments: list[str], processes: int) -> None:
    """Run the README's command for several processes."""
    subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(ROOT / "launch" / "node.yaml")),
            *("--num_processes", str(processes), "--main_process_port", "0"),
            *("-m", "vidfill.train", *arguments),
        ],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=280,
    )


@pytest.mark.slow
def test_the_model_overfits_one_clip(
    tiny_config: TrainConfig, tmp_path: Path, losses: Losses
) -> None:
    """Of one clip the network learns all that its size allows, and its frames are shown.

    Seen of three seeds: 0.12 to 0.15 of the first loss.
    """
    autoencoder = ShardedDataset(tiny_config.shards, "train").manifest.autoencoder["name"]
    synth(SynthConfig(tmp_path / "videos", clips=1, validation=1, size=32, frames=20))
    encode(EncodeConfig(tmp_path / "videos", tmp_path / "one", autoencoder=autoencoder))
    config = dataclasses.replace(
        tiny_config,
        shards=str(tmp_path / "one"),
        steps=250,
        diffusion=DiffusionConfig(target="v"),
        checkpoint_every=250,
        preview=PreviewConfig(every=250, clips=1, schedule="ddim:2"),
    )
    train(config)
    curve = losses(config.out)
    first, last = sum(curve[:20]) / 20, sum(curve[-50:]) / 50
    assert last < 0.2 * first
    events = EventAccumulator(str(config.out / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "held_out/loss", "speed/clips_per_second"} <= scalars
    (written,) = events.Scalars("time/checkpoint_written_seconds")
    (waited,) = events.Scalars("time/checkpoint_seconds")
    assert written.value > waited.value
    assert len(events.Tags()["images"]) == 2  # a picture and a film


def test_resumed_run_equals_uninterrupted_run(
    tiny_config: TrainConfig, trained: TrainConfig
) -> None:
    for steps in (3, 6):
        train(dataclasses.replace(tiny_config, steps=steps))
    assert_equal_weights(trained.out, tiny_config.out)


@pytest.mark.slow
def test_zero_2_on_two_processes_trains_like_one_and_its_checkpoint_continues_anywhere(
    trained: TrainConfig, shards: Path, tmp_path: Path, losses: Losses
) -> None:
    """Real DeepSpeed over gloo: two steps without it, two under ZeRO-2, and two without."""
    run = tmp_path / "zero"
    assert main([str(shards), str(run), *TINY, "--steps", "2"]) == 0
    launch([str(shards), str(run), *TINY, "--zero_stage", "2", "--steps", "4"], processes=2)
    assert main([str(shards), str(run), *TINY]) == 0
    assert losses(run) == pytest.approx(losses(trained.out), rel=1e-4)


def damage_an_example(root: Path) -> str:
    """Flip a bit in the first training example; return its key."""
    index = read_index(root / "train", 0)
    assert index is not None
    tar = root / "train" / shard_name(0)
    content = bytearray(tar.read_bytes())
    content[index.members["masked_latents.npy"].offsets[0] + 200] ^= 1
    tar.write_bytes(content)
    return index.keys[0]


def test_a_damaged_example_stops_the_run_or_is_left_out_and_listed(
    tiny_config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = shutil.copytree(tiny_config.shards, tmp_path / "shards")
    key = damage_an_example(shards)
    command = [str(shards), str(tiny_config.out), *TINY]
    assert main(command) == 2
    assert f"shard-000000.tar is damaged at example {key}" in capsys.readouterr().err
    shutil.rmtree(tiny_config.out)
    assert main([*command, "--data.damaged", "skip"]) == 0
    listed = (tiny_config.out / "skipped-00000.jsonl").read_text().splitlines()
    skipped = [json.loads(line) for line in listed]
    assert {skip["key"] for skip in skipped} == {key}
    assert "checksum" in skipped[0]["reason"]
    # 18 positions of 4 clips: each comes once an epoch, in the fifth maybe.
    assert len(skipped) in (4, 5)
    assert "left out" in capsys.readouterr().err


def test_latents_are_drawn_from_the_posterior_of_each_position() -> None:
    shape = (2, 1, 1, 64, 64)
    batch = Batch(
        keys=["a", "b"],
        positions=[4, 5],
        weights=torch.ones(2),
        latents=torch.full(shape, 3.0),
        masked_latents=torch.zeros(shape),
        latent_mask=torch.zeros(shape),
        log_variance=torch.full(shape, 4.0).log(),
    )
    drawn = draw_latents(batch, seed=0)
    assert drawn.mean().item() == pytest.approx(3.0, abs=0.1)
    assert drawn.std().item() == pytest.approx(2.0, abs=0.1)
    assert torch.equal(drawn, draw_latents(batch, seed=0))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn, draw_latents(batch, seed=1))
    mean = dataclasses.replace(batch, log_variance=None)
    assert torch.equal(draw_latents(mean, seed=0), batch.latents)


@pytest.mark.slow
def test_a_preset_of_a_flow_with_tokens_of_the_condition_trains_and_loads(
    tiny_config: TrainConfig, losses: Losses
) -> None:
    """What `make_denoiser` is told reaches the network, the loss and the saved model."""
    config = dataclasses.replace(
        tiny_config,
        steps=2,
        model=ModelConfig(preset="tiny", conditioning="cross_attention"),
        diffusion=DiffusionConfig(process="flow", target="flow", mask_channel=True),
        loss=LossConfig(timesteps="logit_normal", hole=4.0),
    )
    train(config)
    assert len(losses(config.out)) == 2
    network = Denoiser.load(config.out).network
    assert network.config["conditioning"] == "cross_attention"
    widths = PRESETS["tiny"]["block_out_channels"]
    assert network.config["block_out_channels"] == list(widths)


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tiny_config: TrainConfig, trained: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained.out, tiny_config.out)
    damaged = newest(tiny_config.out) / "exp_avg.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    train(tiny_config)
    assert str(damaged) in capsys.readouterr().err
    assert_equal_weights(tiny_config.out, trained.out)


def test_a_checkpoint_of_another_configuration_is_refused(
    tiny_config: TrainConfig, trained: TrainConfig
) -> None:
    shutil.copytree(trained.out, tiny_config.out)
    before = (newest(tiny_config.out) / "state.json").read_bytes()
    other = dataclasses.replace(tiny_config, diffusion=DiffusionConfig(target="v"))
    with pytest.raises(BadInput, match=r"diffusion\.target was 'noise', now 'v'"):
        train(other)
    assert (newest(tiny_config.out) / "state.json").read_bytes() == before


def test_not_finite_loss_stops_the_run_before_it_reaches_the_weights(
    tiny_config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [str(tiny_config.shards), str(tiny_config.out), *TINY]
    assert main([*bad, "--optimizer.learning_rate", "1e30", "--optimizer.warmup", "0"]) == 2
    assert "loss of step" in capsys.readouterr().err
    assert not list((tiny_config.out / "checkpoints").glob("step-*"))


def test_checkpoints_are_pruned_and_the_averaged_model_loads(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, checkpoint_every=1, keep_checkpoints=2)
    train(config)
    kept = sorted(path.name for path in (config.out / "checkpoints").glob("step-*"))
    assert kept == ["step-00000005", "step-00000006"]
    denoiser = Denoiser.load(config.out)
    manifest = json.loads((Path(config.shards) / "train" / "manifest.json").read_text())
    assert denoiser.autoencoder == manifest["autoencoder"]


WRONG = [
    ("--keep_checkpoints", "0", "keep_checkpoints is 0: give 1 or more"),
    ("--model.head_channels", "24", "no multiple of head_channels"),
    ("--batch_size", "0", "batch_size is 0: give 1 or more"),
    ("--model.preset", "tini", "give one of tiny, mini, small, base"),
    ("--model.preset", "tiny", "has sizes of its own"),
    ("--diffusion.shift", "2", "only a flow has one"),
    ("--loss.hole", "0", "loss.hole is 0"),
    ("--optimizer.clip", "0", "optimizer.clip is 0.0: give more than 0"),
    ("--optimizer.warmup", "-5", "optimizer.warmup is -5: give 0 or more"),
    ("--optimizer.ema_decays", "[]", "ema_decays is (): give 1 or more"),
    ("--optimizer.ema_decays", "[1]", "ema_decays.0 is 1.0: give less than 1"),
    ("--timeout", "1e300", "timeout is 1e+300: give 525600 or less"),
    ("--seed", str(2**64), "give 18446744073709551615 or less"),
    ("--compile=true", "--zero_stage=3", "zero_stage 3"),
    ("--profile", "3", "as 100:105"),
    ("--max_skipped", "-1", "max_skipped is -1: give 0 or more"),
    ("--preview.schedule", "ddin:3", "ddim"),
]


def test_wrong_setting_is_refused_and_its_correction_is_not(
    tiny_config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tiny_config.shards), str(tiny_config.out), *TINY, "--preview.every", "6"]
    for option, value, message in WRONG:
        assert main([*command, option, value]) == 2
        assert message in capsys.readouterr().err
        assert not tiny_config.out.exists()
    assert main([*command, "--preview.schedule", "ddim:2"]) == 0


def test_shards_without_a_validation_split_train_without_previews(
    tiny_config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(Path(tiny_config.shards) / "train", tmp_path / "shards" / "train")
    config = dataclasses.replace(
        tiny_config, shards=str(tmp_path / "shards"), preview=PreviewConfig(every=1), steps=1
    )
    train(config)
    assert "no validation split: no previews" in capsys.readouterr().err


def test_missing_shards_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nothing"), str(tmp_path / "run")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
