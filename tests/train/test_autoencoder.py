from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from vidfill import jobs
from vidfill.data.encode.sources import find_sources
from vidfill.data.videos import write_video
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import WEIGHTS, load_autoencoder, to_pixels
from vidfill.train import autoencoder as recipe
from vidfill.train.autoencoder import AutoencoderTraining, train_autoencoder

SMALL = {
    "sizes": (16, 32),
    "frames_per_video": 3,
    "width": 8,
    "encoder_blocks": (0, 0, 0, 1),
    "decoder_blocks": (1, 0, 0, 0),
    "batch": 8,
    "steps": 6,
    "save_every": 2,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for number, split in enumerate(["train", "train", "val"]):
        write_video(root / split / f"{number}.mp4", a_moving_square(number), fps=10.0)
    return root


def a_moving_square(number):
    frames = np.full((5, 32, 32, 3), 120, np.uint8)
    for index, frame in enumerate(frames):
        frame[8:20, 4 * index : 4 * index + 12, number] = 220
    return frames


def small(videos, out, **changes):
    return AutoencoderTraining(videos, out, **(SMALL | changes))


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory):
    """A configuration that has run, and the figures that it returned."""
    config = small(videos, tmp_path_factory.mktemp("trained") / "out")
    return config, train_autoencoder(config)


@pytest.mark.slow
def test_training_raises_the_psnr_of_held_out_videos(videos, tmp_path):
    short = train_autoencoder(small(videos, tmp_path / "short", steps=1))
    longer = train_autoencoder(small(videos, tmp_path / "longer", steps=60, learning_rate=1e-2))
    assert all(longer[size] > short[size] + 6 for size in (16, 32))


def test_the_folder_opens_in_diffusers_and_its_latents_have_unit_scale(videos, trained):
    config, _ = trained
    AutoencoderTiny.from_pretrained(config.out)
    dtypes = {weight.dtype for weight in load_file(config.out / WEIGHTS).values()}
    assert dtypes == {torch.float16}
    autoencoder = load_autoencoder(str(config.out))
    held_out = recipe._read(sorted((videos / "val").iterdir()), config, "reading")
    latents = [autoencoder.encode(to_pixels(clip[None])) for clip in held_out.values()]
    deviation = torch.cat([latent.flatten() for latent in latents]).std().item()
    assert deviation == pytest.approx(1, abs=0.02)


def test_a_seed_gives_the_same_weights_again_and_another_seed_others(videos, trained, tmp_path):
    before = (trained[0].out / WEIGHTS).read_bytes()
    for name, seed in (("same", 0), ("other", 1)):
        train_autoencoder(small(videos, tmp_path / name, seed=seed))
        assert ((tmp_path / name / WEIGHTS).read_bytes() == before) == (name == "same")


def test_an_interrupted_run_continues_to_the_weights_of_an_uninterrupted_one(
    videos, trained, tmp_path, monkeypatch
):
    def interrupt(config, frames, step):
        if step == 5:
            raise KeyboardInterrupt
        return draw_batch(config, frames, step)

    draw_batch = recipe.draw_batch
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(recipe, "draw_batch", interrupt)
        train_autoencoder(small(videos, tmp_path / "halved"))
    assert not (tmp_path / "halved" / WEIGHTS).exists()
    train_autoencoder(small(videos, tmp_path / "halved"))
    halved = (tmp_path / "halved" / WEIGHTS).read_bytes()
    assert halved == (trained[0].out / WEIGHTS).read_bytes()


def test_a_finished_command_given_again_tells_its_figures_and_changes_nothing(trained, capsys):
    config, figures = trained
    before = {file: file.stat().st_mtime_ns for file in config.out.iterdir()}
    assert train_autoencoder(config) == figures
    said = capsys.readouterr().out
    assert all(f"{size}x{size}: {figure:.2f} dB" in said for size, figure in figures.items())
    assert {file: file.stat().st_mtime_ns for file in config.out.iterdir()} == before


def test_the_card_tells_data_command_time_and_figures(videos, trained):
    config, figures = trained
    card = (config.out / "README.md").read_text()
    assert f"python -m vidfill.train.autoencoder {videos} {config.out} --sizes" in card
    assert "2 videos for training, 1 held out" in card
    assert "minutes on" in card
    assert all(f"| {size}x{size} | {figures[size]:.2f} |" in card for size in (16, 32))


def test_the_cards_command_line_gives_the_same_configuration(videos, tmp_path):
    config = small(videos, tmp_path / "out", l1=0.1)
    parsed = jobs.parse(AutoencoderTraining, jobs.words_of(config), verb=recipe.VERB)
    assert dataclasses.asdict(parsed) == dataclasses.asdict(config)


def test_the_card_tells_how_synthetic_videos_were_made(videos, tmp_path):
    job = {"verb": "synth", "config": {"out": "x", "clips": 300, "seed": 1000}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    said = recipe._describe_data(tmp_path)
    assert said == "Videos made by `vidfill synth` (clips 300, seed 1000)."


def test_a_part_of_each_batch_has_a_hole(videos, tmp_path):
    config = small(videos, tmp_path, batch=4)
    grey = {size: np.full((2, size, size, 3), 10, np.uint8) for size in config.sizes}
    for frames in grey.values():
        frames[:, ::4, ::4] = 200
    batch = recipe.draw_batch(config, grey, 0)
    bright = (batch > 0).float().mean(dim=(1, 2, 3))
    assert bright.tolist() == pytest.approx([0.75 / 16, 1 / 16, 1 / 16, 1 / 16])


def test_without_a_validation_split_every_tenth_video_is_held_out(tmp_path):
    for number in range(11):
        write_video(tmp_path / f"{number:02}.mp4", a_moving_square(0), fps=10.0)
    train, held_out = recipe._split(find_sources(tmp_path), tmp_path)
    assert [video.stem for video in held_out] == ["00", "10"]
    assert [video.stem for video in train] == [f"{number:02}" for number in range(1, 10)]


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": (20,)},
        {"sizes": ()},
        {"encoder_blocks": (1, 1)},
        {"decoder_blocks": (1,) * 5},
        {"steps": 0},
        {"batch": 0},
        {"frames_per_video": 0},
        {"learning_rate": float("nan")},
    ],
)
def test_a_value_out_of_range_is_refused_by_name(videos, tmp_path, changes):
    with pytest.raises(BadInput, match=next(iter(changes))):
        train_autoencoder(small(videos, tmp_path / "out", **changes))


def test_a_file_that_is_no_video_is_refused_by_name(videos, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "broken.mp4").write_text("no video")
    write_video(tmp_path / "val" / "whole.mp4", a_moving_square(0), fps=10.0)
    with pytest.raises(BadInput, match=r"broken\.mp4 cannot be read"):
        train_autoencoder(small(tmp_path, tmp_path / "out"))


def test_a_folder_with_one_video_is_refused(tmp_path):
    write_video(tmp_path / "videos" / "one.mp4", a_moving_square(0), fps=10.0)
    with pytest.raises(BadInput, match="holds one video"):
        train_autoencoder(small(tmp_path / "videos", tmp_path / "out"))


def test_a_folder_that_holds_something_else_is_left_alone(videos, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        train_autoencoder(small(videos, tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
