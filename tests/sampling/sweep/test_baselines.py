from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from vidfill.data.shards.format import Example
from vidfill.modeling.autoencoder import Autoencoder, to_frames, to_pixels
from vidfill.modeling.denoiser import Denoiser
from vidfill.sampling.examples import inpaint
from vidfill.sampling.sweep import baselines

MakeExample = Callable[[str], Example]


def levels(*grey: int) -> np.ndarray:
    """One 8x8 frame of each grey level."""
    return np.stack([np.full((8, 8, 3), level, np.uint8) for level in grey])


def hidden_in(*frames: int, of: int) -> np.ndarray:
    """A mask with a 2x2 hole in the same place of the given frames."""
    mask = np.zeros((of, 8, 8), np.uint8)
    mask[list(frames), 3:5, 3:5] = 1
    return mask


def test_fill_is_the_recorded_colour_in_the_hole(make_example: MakeExample) -> None:
    example = make_example("a")
    frames = baselines.fill(example)
    assert (frames[example.mask == 1] == [90, 100, 110]).all()
    assert example.pixels is not None
    assert (frames[example.mask == 0] == example.pixels[example.mask == 0]).all()


def test_classic_takes_the_nearest_frame_in_which_a_pixel_is_visible() -> None:
    truth = levels(10, 20, 30, 40, 50)
    filled = baselines.classic(truth, hidden_in(1, 2, of=5))
    assert filled[:, 3, 3, 0].tolist() == [10, 10, 40, 40, 50]


def test_classic_prefers_the_earlier_of_two_frames_equally_near() -> None:
    truth = levels(10, 20, 30, 40, 50)
    assert baselines.classic(truth, hidden_in(2, of=5))[2, 3, 3, 0] == 20


def test_classic_takes_each_pixel_from_its_own_nearest_frame() -> None:
    mask = hidden_in(1, of=3)
    mask[0, 3, 3] = 1
    filled = baselines.classic(levels(10, 20, 30), mask)
    assert filled[1, 3, 3, 0] == filled[0, 3, 3, 0] == 30
    assert filled[1, 4, 4, 0] == 10


def test_classic_inpaints_what_no_frame_shows_from_its_own_frame() -> None:
    filled = baselines.classic(levels(10, 50), hidden_in(0, 1, of=2))
    # Telea's average of equal values is rounded: one level off at most.
    assert filled.astype(int) == pytest.approx(levels(10, 50), abs=1)


def test_classic_uses_nothing_that_is_hidden(make_example: MakeExample) -> None:
    example = make_example("a")
    assert example.pixels is not None
    random = np.random.default_rng(0)
    mask = random.integers(0, 2, example.mask.shape, dtype=np.uint8)
    mask[:, 5:9, 5:9] = 1
    another = np.where(mask[..., None] == 1, 255 - example.pixels, example.pixels)
    filled = baselines.classic(example.pixels, mask)
    assert (filled == baselines.classic(another, mask)).all()
    assert (filled[mask == 0] == example.pixels[mask == 0]).all()


def test_autoencoder_is_the_decoded_latents_in_the_hole(
    autoencoder: Autoencoder, make_example: MakeExample
) -> None:
    example = make_example("a")
    assert example.pixels is not None
    latents = autoencoder.encode(to_pixels(example.pixels)[None]).half()
    example = dataclasses.replace(example, latents=latents[0].numpy())
    decoded = to_frames(autoencoder.decode(latents.float())[0])
    frames = baselines.autoencoder(autoencoder, example)
    hole = example.mask == 1
    assert (frames[hole] == decoded[hole]).all()
    assert (frames[~hole] == example.pixels[~hole]).all()


def test_mean_is_the_clean_estimate_at_pure_noise(
    denoiser: Denoiser, autoencoder: Autoencoder, make_example: MakeExample
) -> None:
    examples = [make_example("a")]
    once, twice = (
        next(inpaint(denoiser, autoencoder, examples, schedule, seed=0, capacity=1))[1]
        for schedule in (baselines.MEAN, "ddpm:1")
    )
    assert (once == twice).all()
