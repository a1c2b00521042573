from __future__ import annotations

import cv2
import numpy as np
import pytest
from vidfill.sampling.metrics.warping import Motion, follow, warping_error

STEP = 2  # pixels that the scene moves to the right from frame to frame


def scene(height: int = 64, width: int = 80, frames: int = 4) -> np.ndarray:
    """Smooth patches that move to the right."""
    noise = np.random.default_rng(0).normal(0, 1, (height, width + STEP * frames, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    levels = 255 * (smooth - smooth.min()) / np.ptp(smooth)
    first = STEP * np.arange(frames, 0, -1)
    return np.stack([levels[:, x : x + width] for x in first]).astype(np.uint8)


def exact_motion(truth: np.ndarray) -> Motion:
    """The scene's, as it is."""
    frames, height, width, _ = truth.shape
    x, y = np.meshgrid(np.arange(width) + STEP, np.arange(height))
    places = np.stack([np.stack([x, y], axis=-1)] * (frames - 1)).astype(np.float32)
    return Motion(places, np.stack([x < width] * (frames - 1)))


def test_the_flow_of_a_moving_scene_is_its_motion() -> None:
    motion, exact = follow(scene()), exact_motion(scene())
    inner = (slice(None), slice(8, -8), slice(8, -8 - STEP))
    assert motion.seen[inner].mean() > 0.99
    assert np.abs(motion.places - exact.places)[inner].max() < 0.5


def test_what_leaves_the_frame_is_not_seen() -> None:
    assert not follow(scene()).seen[:, 8:-8, -STEP + 1 :].any()


def test_what_a_moving_thing_covers_is_not_seen() -> None:
    background = scene(frames=1)[0]
    clip = np.stack([background, background])
    patch = scene(64, 80, 2)[1][10:34, 40:64]
    clip[0][20:44, 20:44] = clip[1][20:44, 26:50] = 255 - patch
    covered = follow(clip).seen[0, 22:42, 45:49]
    assert covered.mean() < 0.5
    assert follow(clip).seen[0].mean() > 0.85


def test_the_exact_motion_of_a_scene_leaves_no_warping_error() -> None:
    assert warping_error(scene(), exact_motion(scene())) == 0


def test_the_estimated_motion_of_a_scene_leaves_next_to_none() -> None:
    # 1.7e-6 seen, against 3e-3 without motion.
    assert warping_error(scene(), follow(scene())) < 1e-5


def test_warping_error_is_the_mean_square_of_the_jumps_along_the_motion() -> None:
    result = scene() // 2
    result[1::2] += 51  # a fifth of the range
    expected = 0.2**2
    assert warping_error(result, exact_motion(result)) == pytest.approx(expected, rel=1e-5)


def test_pixels_that_are_not_seen_do_not_count() -> None:
    result = scene()
    motion = exact_motion(result)
    motion.seen[:, :20] = False
    result[::2, :20] = 0
    assert warping_error(result, motion) == 0


def test_a_shift_of_the_whole_clips_colour_is_no_warping_error() -> None:
    assert warping_error(scene() // 2 + np.uint8(40), exact_motion(scene())) == 0


def test_blur_lowers_the_warping_error_below_the_truths() -> None:
    random = np.random.default_rng(1)
    truth = np.clip(scene() + random.normal(0, 8, scene().shape), 0, 255).astype(np.uint8)
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 2) for frame in truth])
    motion = follow(truth)
    assert warping_error(blurred, motion) < 0.5 * warping_error(truth, motion)


@pytest.mark.parametrize("shape", [(4, 8, 8, 3), (1, 64, 64, 3)])
def test_tiny_frames_and_single_ones_have_no_warping_error(shape: tuple[int, ...]) -> None:
    frames = np.zeros(shape, np.uint8)
    assert np.isnan(warping_error(frames, follow(frames)))
