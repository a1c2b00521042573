from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vidfill.data.masks import draw_mask
from vidfill.data.motion.propagation import propagate, propagate_clip
from vidfill.data.videos import Frames, Masks, read_frames

FRAMES, HEIGHT, WIDTH = 9, 64, 96
EVAL = Path(__file__).parents[4] / "shared" / "videos" / "natural" / "eval"


def texture(seed: int = 0, size: int = 256) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 1, (size, size, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.5)
    return np.rint(128 + 45 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)


def film(motion: Callable[[int], np.ndarray], frames: int = FRAMES, seed: int = 0) -> Frames:
    """A textured wall; `motion` gives the affine map from a frame's pixels to the wall's."""
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    wall = texture(seed)
    shot = [cv2.warpAffine(wall, motion(t), (WIDTH, HEIGHT), flags=flags) for t in range(frames)]
    return np.stack(shot)


def pan(t: int) -> np.ndarray:
    return np.float32([[1, 0, 60 + 2.3 * t], [0, 1, 60 + 0.7 * t]])


def turn(t: int) -> np.ndarray:
    matrix = cv2.getRotationMatrix2D((WIDTH / 2, HEIGHT / 2), 1.5 * t, 1.0)
    return matrix + np.float32([[0, 0, 70], [0, 0, 70]])


def zoom(t: int) -> np.ndarray:
    matrix = cv2.getRotationMatrix2D((WIDTH / 2, HEIGHT / 2), 0, 1 + 0.015 * t)
    return matrix + np.float32([[0, 0, 70], [0, 0, 70]])


def box(frames: int = FRAMES, *, speed: int = 6) -> Masks:
    """A box that moves against the picture."""
    masks = np.zeros((frames, HEIGHT, WIDTH), np.uint8)
    for t in range(frames):
        masks[t, 20:44, 8 + speed * t : 26 + speed * t] = 1
    return masks


def error_in(result: Frames, truth: Frames, where: np.ndarray) -> float:
    """Root of the mean squared difference, in 8-bit units."""
    return float(np.sqrt(((result.astype(float) - truth)[where] ** 2).mean()))


@pytest.mark.parametrize("motion", [pan, turn, zoom])
def test_what_another_frame_shows_is_put_back_to_within_interpolation(
    motion: Callable[[int], np.ndarray],
) -> None:
    truth, masks = film(motion), box()
    pixels, confidence = propagate_clip(truth, masks)
    found = (masks == 1) & (confidence > 0)
    assert found.sum() > 0.95 * masks.sum()
    # Half a pixel's shift there and back is what interpolation may do to such a picture.
    half = np.float32([[1, 0, 0.5], [0, 1, 0.5]])
    back = np.float32([[1, 0, -0.5], [0, 1, -0.5]])
    size = (WIDTH, HEIGHT)
    twice = cv2.warpAffine(cv2.warpAffine(truth[0], half, size), back, size)
    bound = error_in(
        twice[4:-4, 4:-4], truth[0, 4:-4, 4:-4], np.ones((HEIGHT - 8, WIDTH - 8), bool)
    )
    assert error_in(pixels, truth, found) < 1.5 * bound


def test_a_camera_that_stands_still_gives_exact_copies() -> None:
    truth, masks = np.repeat(film(pan, 1), FRAMES, axis=0), box()
    pixels, confidence = propagate_clip(truth, masks)
    assert (confidence > 0).all()
    assert error_in(pixels, truth, masks == 1) < 1  # the light of a border is matched


def test_without_a_hole_frames_are_as_they_were() -> None:
    truth = film(pan)
    pixels, confidence = propagate_clip(truth, np.zeros_like(box()))
    np.testing.assert_array_equal(pixels, truth)
    assert (confidence == 1).all()


def test_outside_the_hole_nothing_changes_and_what_is_not_found_is_black() -> None:
    truth = film(pan)
    masks = draw_mask("stationary", FRAMES, HEIGHT, WIDTH, (1,))
    pixels, confidence = propagate_clip(truth, masks)
    np.testing.assert_array_equal(pixels[masks == 0], truth[masks == 0])
    assert (confidence[masks == 0] == 1).all()
    assert (confidence[masks == 1] < 1).all()
    assert not pixels[confidence == 0].any()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), family=st.sampled_from(["stationary", "variable", "box"]))
def test_what_is_hidden_changes_no_bit(seed: int, family: str) -> None:
    truth = film(pan, 5)
    masks = draw_mask(family, 5, HEIGHT, WIDTH, (seed,))
    noise = np.random.default_rng(seed).integers(0, 256, truth.shape, np.uint8)
    other = np.where(masks[..., None] == 1, noise, truth)
    for one, two in zip(propagate_clip(truth, masks), propagate_clip(other, masks), strict=True):
        np.testing.assert_array_equal(one, two)


def test_time_reversed_gives_the_mirrored_result() -> None:
    truth, masks = film(turn), box()
    pixels, confidence = propagate_clip(truth, masks)
    again, confidence_again = propagate_clip(truth[::-1], masks[::-1])
    np.testing.assert_allclose(again[::-1], pixels, atol=1)
    np.testing.assert_allclose(confidence_again[::-1], confidence, atol=1e-5)


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_a_frame_depends_on_those_within_reach_alone(reach: int) -> None:
    truth, masks = film(pan, 12), box(12)
    whole = propagate_clip(truth, masks, reach)
    for begin, end in ((0, 8), (3, 12)):
        part = propagate_clip(truth[begin:end], masks[begin:end], reach)
        first = begin and begin + reach
        last = 12 if end == 12 else end - reach
        for of_part, of_whole in zip(part, whole, strict=True):
            inside = of_part[first - begin : last - begin]
            np.testing.assert_array_equal(inside, of_whole[first:last])


def test_no_more_frames_are_held_than_the_reach_asks_for() -> None:
    truth, masks, read = film(pan, 20), box(20, speed=3), 0

    def pairs():
        nonlocal read
        for pair in zip(truth, masks, strict=True):
            read += 1
            yield pair

    for done, _ in enumerate(propagate(pairs(), reach=3)):
        assert read <= done + 4


def test_a_cut_is_not_crossed() -> None:
    first, second = film(pan, 4), film(pan, 4, seed=5)
    masks = np.zeros((8, HEIGHT, WIDTH), np.uint8)
    masks[:4, 16:48, 30:60] = 1  # the first scene never shows it; the second would
    still = np.concatenate([np.repeat(first[:1], 4, axis=0), np.repeat(second[:1], 4, axis=0)])
    _, confidence = propagate_clip(still, masks)
    assert (confidence[:4][masks[:4] == 1] == 0).all()


def test_what_stands_in_front_does_not_fill_what_is_behind_it() -> None:
    wall = np.repeat(film(pan, 1), FRAMES, axis=0)
    truth, masks = wall.copy(), np.zeros((FRAMES, HEIGHT, WIDTH), np.uint8)
    masks[4, 20:44, 40:60] = 1
    red = texture(3)[:40, :16] // 3
    red[..., 0] += 160
    for t in range(FRAMES):  # a red thing comes, and soon is where the hole was
        left = 24 + 6 * (t - 4)
        truth[t, 12:52, left : left + 16] = red
    pixels, confidence = propagate_clip(truth, masks)
    found = (masks == 1) & (confidence > 0.5)
    assert found.sum() > 0.3 * masks.sum()
    assert error_in(pixels, wall, found) < 12


@pytest.mark.parametrize("change", [12, -20])
def test_light_that_changes_leaves_no_step_at_the_border(change: int) -> None:
    truth = film(pan, 3).astype(np.int16) // 2 + 60
    truth[1] += change
    truth = truth.astype(np.uint8)
    masks = np.zeros((3, HEIGHT, WIDTH), np.uint8)
    masks[1, 20:44, 30:60] = 1
    pixels, confidence = propagate_clip(truth, masks)
    assert (confidence[masks == 1] > 0).mean() > 0.95
    difference = (pixels.astype(int) - truth)[(masks == 1) & (confidence > 0)]
    assert abs(difference.mean()) < 0.15 * abs(change)


@pytest.mark.slow
@pytest.mark.skipif(not EVAL.is_dir(), reason="no natural clips in ../shared")
def test_the_error_rises_as_the_confidence_falls() -> None:
    squared, confidences = [], []
    for path in sorted(EVAL.iterdir())[:3]:
        truth = np.stack([frame for frame, _ in zip(read_frames(path), range(10), strict=False)])
        masks = draw_mask("variable", *truth.shape[:3], (0,))
        pixels, confidence = propagate_clip(truth, masks)
        found = (masks == 1) & (confidence > 0)
        squared.append(((pixels.astype(float) - truth)[found] ** 2).mean(axis=-1))
        confidences.append(confidence[found])
    errors, trust = np.concatenate(squared), np.concatenate(confidences)
    bins = [(trust > low) & (trust <= low + 0.25) for low in (0, 0.25, 0.5, 0.75)]
    means = [errors[each].mean() for each in bins]
    assert means == sorted(means, reverse=True)
