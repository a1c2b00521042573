"""The pipeline gives the same frames wherever it is loaded, and leaves what is visible alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import SHIPPED_WEIGHTS, Autoencoder, load_autoencoder
from vidfill.modeling.denoiser import Denoiser
from vidfill.modeling.settings import SHIPPED
from vidfill.progress import say_once
from vidfill.sampling.inpaint import windows
from vidfill.sampling.inpaint.windows import FillSettings, fill_windows, usual_schedule
from vidfill.sampling.pipeline import VideoInpaintPipeline, read_mask, read_video
from vidfill.sampling.schedules.language import parse
from vidfill.sampling.schedules.program import compile_schedule

SCHEDULE = "ddim:2"  # of the fixtures' pipeline
FRAMES, HEIGHT, WIDTH = 5, 18, 22  # of the fixtures' video


def frames_of(pipe: VideoInpaintPipeline, *given: object, **options: object) -> np.ndarray:
    """Of all samples, as 8-bit values."""
    values = pipe(*given, output_type="np", **options).frames
    return np.rint(values * 255).astype(np.uint8)


# What it makes


def test_what_is_visible_stays_to_the_bit_and_samples_differ_in_the_holes(
    pipe: VideoInpaintPipeline, video: np.ndarray, mask: np.ndarray
) -> None:
    first, second = frames_of(pipe, video, mask, num_samples=2)
    for frames in (first, second):
        assert np.array_equal(frames[~mask], video[~mask])
        assert not np.array_equal(frames[mask], video[mask])
    assert not np.array_equal(first, second)
    assert np.array_equal(frames_of(pipe, video, mask)[0], first)


def test_it_is_what_the_windows_are_filled_with(
    pipe: VideoInpaintPipeline,
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    video: np.ndarray,
    mask: np.ndarray,
) -> None:
    program = compile_schedule(parse("ddim:3"), denoiser.timesteps)
    settings = FillSettings(denoiser, autoencoder, program, seed=7, samples=[1], feather=2)
    given = zip(video, mask.astype(np.uint8), strict=True)
    expected = [frame for window in fill_windows(given, settings) for frame in window.frames[0]]
    frames = frames_of(pipe, video, mask, "ddim:3", seed=7, num_samples=2, feather=2)
    assert np.array_equal(frames[1], np.stack(expected))


def test_the_seed_decides_and_a_generator_draws_it(
    pipe: VideoInpaintPipeline, video: np.ndarray, mask: np.ndarray
) -> None:
    draws = [
        frames_of(pipe, video, mask, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    assert not np.array_equal(frames_of(pipe, video, mask, seed=1), frames_of(pipe, video, mask))


def test_all_outputs_are_the_same_frames(
    pipe: VideoInpaintPipeline, video: np.ndarray, mask: np.ndarray
) -> None:
    expected = frames_of(pipe, video, mask)
    values = pipe(video, mask, output_type="np").frames
    assert np.array_equal((values * 255).astype(np.uint8), expected)  # as export_to_video does
    images = pipe(video, mask).frames
    assert np.array_equal([[np.array(image) for image in frames] for frames in images], expected)
    tensor = pipe(video, mask, output_type="pt").frames
    assert tensor.shape == (1, FRAMES, 3, HEIGHT, WIDTH)
    assert np.array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), values)


# What goes in


def test_all_ways_to_hold_a_video_are_the_same_frames(video: np.ndarray) -> None:
    channels_first = torch.from_numpy(video).permute(0, 3, 1, 2)
    for held in (
        [Image.fromarray(frame) for frame in video],
        video.astype(np.float32) / 255,
        video.astype(np.float64) / 255,
        channels_first,
        channels_first.float() / 255,
    ):
        assert np.array_equal(read_video(held), video)


def test_all_ways_to_hold_a_mask_are_the_same_holes(video: np.ndarray, mask: np.ndarray) -> None:
    levels = mask * np.uint8(255)
    tensor = torch.from_numpy(mask)
    for held in (
        mask,
        mask.astype(np.uint8),
        levels,
        np.where(mask, 140, 90).astype(np.uint8),
        mask.astype(np.float32)[..., None],
        tensor,
        tensor[:, None].float(),
        [Image.fromarray(frame) for frame in levels],
        [Image.fromarray(frame).convert("RGB") for frame in levels],
    ):
        assert np.array_equal(read_mask(held, video), mask)
    one_for_all = np.broadcast_to(mask[0], mask.shape)
    for held in (mask[0], mask[:1], tensor[0], Image.fromarray(levels[0])):
        assert np.array_equal(read_mask(held, video), one_for_all)
    assert not read_mask(Image.new("L", (WIDTH, HEIGHT), 1), video).any()


BLANK = np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
HOLE = np.zeros((FRAMES, HEIGHT, WIDTH), bool)


@pytest.mark.parametrize(
    ("video", "mask", "said"),
    [
        (BLANK, HOLE[:-1], r"mask has the shape \[4, 18, 22\], the video's frames \[5, 18, 22\]"),
        (BLANK, HOLE[:, :-1], "one for all, of their size"),
        (BLANK, BLANK, r"mask has the shape \[5, 18, 22, 3\]"),
        (BLANK, HOLE.astype(np.int64), "mask is of int64: give 8-bit values"),
        (BLANK, HOLE - 0.5, "mask has values from -0.5 to -0.5"),
        (BLANK.astype(np.int32), HOLE, "video is of int32"),
        (BLANK - 1.0, HOLE, "video has values from -1 to -1: give floats from 0 to 1"),
        (BLANK + np.nan, HOLE, "video has values from nan to nan"),
        (BLANK[0], HOLE, r"video has the shape \[18, 22, 3\]: give one of \[frames, height"),
        (BLANK[None], HOLE, r"give one of \[frames, height, width, 3\]"),
        (BLANK[:0], HOLE, r"video has the shape \[0, 18, 22, 3\]"),
        (torch.from_numpy(BLANK), HOLE, r"give one of \[frames, 3, height, width\]"),
        ([], HOLE, "video has images of no size"),
        ("clip.mp4", HOLE, "video is a list of other things than PIL images"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], HOLE, "images of 8x8 and 8x9"),
    ],
)
def test_what_is_no_video_or_does_not_fit_is_refused_by_name(
    video: object, mask: object, said: str, pipe: VideoInpaintPipeline
) -> None:
    with pytest.raises(BadInput, match=said):
        pipe(video, mask)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_samples": 0}, "num_samples is 0: give 1 or more"),
        ({"schedule": "ddim:99"}, "the model was trained with 40 timesteps"),
        ({"output_type": "latent"}, "output_type is 'latent': give one of pil, np, pt"),
        ({"overlap": 9}, "overlap is 9"),
    ],
)
def test_an_impossible_option_is_refused_by_name(
    options: dict, said: str, pipe: VideoInpaintPipeline
) -> None:
    # The output's type is checked by Beartype first, as long as the tests run.
    with pytest.raises(Exception, match=said if "output_type" not in options else "output_type"):
        pipe(BLANK, HOLE, **options)


def test_an_autoencoder_of_other_latents_is_refused(denoiser: Denoiser) -> None:
    with pytest.raises(BadInput, match=r"vae is .*, whose downsampling is 8; .* is 4"):
        described = denoiser.describe()
        VideoInpaintPipeline(denoiser.network, load_autoencoder("shipped").network, **described)
    with pytest.raises(BadInput, match="diffusion and latents are missing"):
        VideoInpaintPipeline(denoiser.network)


# The folder


def test_diffusers_runs_no_code_of_a_folder_unasked(
    pipe: VideoInpaintPipeline, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_the_folder_is_a_model_for_every_verb(
    pipe: VideoInpaintPipeline, denoiser: Denoiser, autoencoder: Autoencoder, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = Denoiser.load(tmp_path)
    assert loaded.config == denoiser.config
    assert loaded.space.shape == denoiser.space.shape
    ours, theirs = loaded.network.state_dict(), denoiser.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert load_autoencoder(loaded.autoencoder["name"]).sha256 == autoencoder.sha256


@pytest.mark.slow
def test_the_packages_own_autoencoder_is_named_and_not_written(
    denoiser: Denoiser, video: np.ndarray, mask: np.ndarray, tmp_path: Path
) -> None:
    shipped = load_autoencoder("shipped")
    space = dataclasses.replace(denoiser.space, autoencoder=shipped.identity())
    pipe = VideoInpaintPipeline.of(Denoiser(denoiser.network, denoiser.config, space), shipped)
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "vae").exists()
    again = VideoInpaintPipeline.from_pretrained(tmp_path)
    frames = [frames_of(p, video, mask, SCHEDULE) for p in (pipe, again)]
    assert np.array_equal(*frames)
    assert Denoiser.load(tmp_path).autoencoder["name"] == "shipped"


def test_the_card_goes_along_and_no_path_of_this_machine(
    pipe: VideoInpaintPipeline, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    pipe.save_pretrained(first)
    (first / "README.md").write_text("# A model\n")
    VideoInpaintPipeline.from_pretrained(first).save_pretrained(second)
    written = {file.relative_to(second): file for file in second.rglob("*") if file.is_file()}
    assert {str(name) for name in written} == {
        *("README.md", "model_index.json", "pipeline.py"),
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
    }
    assert (second / "README.md").read_text() == "# A model\n"
    for file in written.values():
        assert str(tmp_path).encode() not in file.read_bytes()
        assert file.stat().st_mode == (second / "README.md").stat().st_mode


def test_a_folder_without_a_pipeline_is_refused_with_the_remedy(
    denoiser: Denoiser, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="holds no model"):
        VideoInpaintPipeline.from_pretrained(tmp_path)
    denoiser.save(tmp_path)
    with pytest.raises(BadInput, match="`vidfill export` makes a pipeline of a run"):
        VideoInpaintPipeline.from_pretrained(tmp_path)


def test_a_folder_says_which_schedule_is_its_usual_one(
    pipe: VideoInpaintPipeline, denoiser: Denoiser, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "given")
    denoiser.save(tmp_path / "of_a_run")
    assert usual_schedule(tmp_path / "given") == SCHEDULE
    assert usual_schedule(tmp_path / "of_a_run") == windows.SCHEDULE


def test_the_packages_own_model_fills_at_once_and_is_small(
    video: np.ndarray, mask: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    files = [file for file in (SHIPPED_WEIGHTS / "inpaint").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 10e6
    assert (SHIPPED_WEIGHTS / "inpaint" / "README.md").is_file()
    say_once.cache_clear()
    pipe = VideoInpaintPipeline.from_pretrained(SHIPPED)
    assert "the package's own small model" in capfd.readouterr().err
    frames = frames_of(pipe, video, mask, "ddim:1")[0]
    assert np.array_equal(frames[~mask], video[~mask])
    assert not np.array_equal(frames[mask], video[mask])


# Precisions and devices


def assert_near(ours: np.ndarray, theirs: np.ndarray, most: int) -> None:
    assert np.abs(ours.astype(int) - theirs).max() <= most


@pytest.mark.slow
def test_a_variant_in_half_precision_loads(
    pipe: VideoInpaintPipeline, video: np.ndarray, mask: np.ndarray, tmp_path: Path
) -> None:
    expected = frames_of(pipe, video, mask)
    pipe.save_pretrained(tmp_path / "whole")
    half = VideoInpaintPipeline.from_pretrained(tmp_path / "whole", dtype=torch.float16)
    assert (half.unet.dtype, half.vae.dtype) == (torch.float16, torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    name = "diffusion_pytorch_model.fp16.safetensors"
    assert all((tmp_path / "half" / part / name).is_file() for part in ("unet", "vae"))
    again = VideoInpaintPipeline.from_pretrained(tmp_path / "half", variant="fp16")
    assert again.unet.dtype == torch.float32
    # Eleven bits of each weight are left: measured 1 of 255.
    assert_near(frames_of(again, video, mask), expected, 2)
    assert_near(frames_of(half, video, mask), expected, 2)


def test_in_bfloat16_it_computes_in_bfloat16(
    pipe: VideoInpaintPipeline, video: np.ndarray, mask: np.ndarray
) -> None:
    expected = frames_of(pipe, video, mask)
    moved = pipe.to("cpu", torch.bfloat16)
    assert moved.unet.dtype == torch.bfloat16
    assert (moved.denoiser.precision, moved.autoencoder.precision) == ("bfloat16", "bfloat16")
    frames = frames_of(moved, video, mask)
    assert np.array_equal(frames[0][~mask], video[~mask])
    # Eight bits of each weight and activation are left.
    assert_near(frames, expected, 10)
    assert not np.array_equal(frames, expected)


def test_offloaded_it_gives_the_same_frames(
    pipe: VideoInpaintPipeline, video: np.ndarray, mask: np.ndarray
) -> None:
    expected = frames_of(pipe, video, mask)
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(frames_of(pipe, video, mask), expected)
    assert np.array_equal(frames_of(pipe, video, mask), expected)
