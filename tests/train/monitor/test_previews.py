"""A preview's picture and film hold the frames that they were made of."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from vidfill.train.monitor.previews import PREVIEW_GAP, film_of, picture_of


def a_clip(seed: int) -> np.ndarray:
    """Three versions of 16×16 in 5 frames; few colours, which a GIF's palette holds."""
    random = np.random.default_rng(seed)
    version = random.choice(
        np.uint8([0, 100, 200]), (5, 16, 3 * (16 + PREVIEW_GAP) - PREVIEW_GAP, 3)
    )
    version[:, :, 16 : 16 + PREVIEW_GAP] = version[
        :, :, 2 * 16 + PREVIEW_GAP : 2 * (16 + PREVIEW_GAP)
    ] = 255
    return version


def test_a_film_is_a_gif_of_the_frames() -> None:
    clips = [a_clip(0), a_clip(1)]
    film = Image.open(io.BytesIO(film_of(clips)))
    assert (film.format, film.n_frames) == ("GIF", 5)
    for number in range(5):
        film.seek(number)
        frame = np.asarray(film.convert("RGB"))
        assert film.info["duration"] == 120  # a GIF counts hundredths of a second
        assert np.array_equal(frame[:16], clips[0][number])
        assert (frame[16 : 16 + PREVIEW_GAP] == 255).all()
        assert np.array_equal(frame[16 + PREVIEW_GAP :], clips[1][number])


def test_a_picture_has_a_film_strip_for_each_version_of_each_clip() -> None:
    clips = [a_clip(0), a_clip(1)]
    picture = picture_of(clips)
    assert picture.shape == (6 * 16 + 5 * PREVIEW_GAP, 5 * 16, 3)
    for strip in range(6):
        clip, version = divmod(strip, 3)
        top, left = strip * (16 + PREVIEW_GAP), version * (16 + PREVIEW_GAP)
        for frame in range(5):
            shown = picture[top : top + 16, frame * 16 : (frame + 1) * 16]
            assert np.array_equal(shown, clips[clip][frame, :, left : left + 16])
