from __future__ import annotations

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from vidfill.sampling.metrics import pixels as metrics

RANDOM = np.random.default_rng(0)


@pytest.fixture
def truth() -> np.ndarray:
    return RANDOM.integers(0, 256, (4, 24, 20, 3), dtype=np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((4, 24, 20), np.uint8)
    mask[:, 6:12, 5:10] = 1
    return mask


@pytest.fixture
def result(truth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    guess = RANDOM.integers(0, 256, truth.shape, dtype=np.uint8)
    return metrics.composite(truth, guess, mask)


def grey(*levels: int) -> np.ndarray:
    """One 2x2 frame of each level."""
    return np.stack([np.full((2, 2, 3), level, np.uint8) for level in levels])


def whole(frames: int) -> np.ndarray:
    return np.ones((frames, 2, 2), np.uint8)


def test_composite_takes_the_hole_from_the_result_and_the_rest_from_the_truth(
    truth: np.ndarray, result: np.ndarray, mask: np.ndarray
) -> None:
    composited = metrics.composite(truth, 255 - truth, mask)
    assert (composited[mask == 0] == truth[mask == 0]).all()
    assert (composited[mask == 1] == 255 - truth[mask == 1]).all()


def test_psnr_is_scikit_images_averaged_over_frames(truth: np.ndarray, result: np.ndarray) -> None:
    theirs = [peak_signal_noise_ratio(t, r) for t, r in zip(truth, result, strict=True)]
    assert metrics.psnr(result, truth) == pytest.approx(np.mean(theirs))


def test_psnr_of_the_hole_is_scikit_images_of_its_pixels(
    truth: np.ndarray, result: np.ndarray, mask: np.ndarray
) -> None:
    hole = (slice(None), slice(6, 12), slice(5, 10))
    theirs = [peak_signal_noise_ratio(t, r) for t, r in zip(truth[hole], result[hole], strict=True)]
    assert metrics.psnr_hole(result, truth, mask) == pytest.approx(np.mean(theirs))


def test_ssim_is_scikit_images_with_the_same_window(truth: np.ndarray, result: np.ndarray) -> None:
    theirs = [
        structural_similarity(
            t, r, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1
        )
        for t, r in zip(truth, result, strict=True)
    ]
    assert metrics.ssim(result, truth) == pytest.approx(np.mean(theirs), abs=1e-5)


def test_a_perfect_result_scores_the_best_values(truth: np.ndarray, mask: np.ndarray) -> None:
    assert metrics.psnr(truth, truth) == metrics.psnr_hole(truth, truth, mask) == 100
    assert metrics.ssim(truth, truth) == pytest.approx(1)
    assert metrics.colour_error(truth, truth, mask) == 0
    assert metrics.temporal_error(truth, truth, mask) == 0


def test_known_psnr_of_a_known_error() -> None:
    # 255 / 25.5 = 10, so an error of 25.5 would be 20 dB; 51 is 20·log10(5) = 13.979 dB.
    assert metrics.psnr(grey(151), grey(100)) == pytest.approx(13.9794, abs=1e-4)


def test_frames_without_a_hole_do_not_count_in_the_hole() -> None:
    mask = whole(2)
    mask[0] = 0
    result, truth = grey(100, 151), grey(100, 100)
    assert metrics.psnr_hole(result, truth, mask) == pytest.approx(13.9794, abs=1e-4)


def test_colour_error_is_the_clips_shift_of_colour_and_not_its_flicker() -> None:
    truth = grey(100, 100)
    assert metrics.colour_error(grey(110, 110), truth, whole(2)) == 10
    assert metrics.colour_error(grey(90, 110), truth, whole(2)) == 0


def test_colour_errors_of_opposite_channels_do_not_cancel() -> None:
    result = grey(100)
    result[..., 0] += 6
    result[..., 1] -= 3
    assert metrics.colour_error(result, grey(100), whole(1)) == 3


def test_temporal_error_is_flicker_and_not_a_shift_of_colour() -> None:
    truth = grey(100, 100, 100)
    assert metrics.temporal_error(grey(110, 110, 110), truth, whole(3)) == 0
    assert metrics.temporal_error(grey(100, 110, 95), truth, whole(3)) == (10 + 15) / 2


def test_temporal_error_allows_the_truths_own_motion() -> None:
    assert metrics.temporal_error(grey(10, 60, 20), grey(0, 50, 10), whole(3)) == 0


def test_a_clip_without_a_hole_has_no_hole_metrics(truth: np.ndarray) -> None:
    none = np.zeros(truth.shape[:3], np.uint8)
    for metric in (metrics.psnr_hole, metrics.colour_error, metrics.temporal_error):
        assert np.isnan(metric(truth, truth, none))


def test_ssim_65_is_scikit_images_with_that_window() -> None:
    truth = RANDOM.integers(0, 256, (2, 70, 81, 3), dtype=np.uint8)
    result = np.clip(truth + RANDOM.normal(0, 30, truth.shape), 0, 255).astype(np.uint8)
    theirs = [
        structural_similarity(t, r, win_size=65, channel_axis=-1)
        for t, r in zip(truth, result, strict=True)
    ]
    assert metrics.ssim_65(result, truth) == pytest.approx(np.mean(theirs), abs=1e-9)


def test_frames_smaller_than_its_window_have_no_ssim_65(truth: np.ndarray) -> None:
    assert np.isnan(metrics.ssim_65(truth, truth))


def test_flicker_is_the_jump_of_the_holes_whole_colour() -> None:
    truth = grey(100, 100, 100)
    assert metrics.flicker(grey(110, 110, 110), truth, whole(3)) == 0
    assert metrics.flicker(grey(100, 110, 95), truth, whole(3)) == (10 + 15) / 2


def test_what_cancels_within_a_hole_does_not_flicker() -> None:
    result = grey(100, 100)
    result[1, 0] += 20
    result[1, 1] -= 20
    assert metrics.flicker(result, grey(100, 100), whole(2)) == 0
    assert metrics.temporal_error(result, grey(100, 100), whole(2)) == 20


def test_flicker_compares_frames_that_follow_each_other_only() -> None:
    mask = whole(4)
    mask[1] = 0
    assert metrics.flicker(grey(0, 0, 110, 117), grey(100, 0, 100, 100), mask) == 7


def test_a_stationary_hole_flickers_no_more_than_its_temporal_error(
    truth: np.ndarray, result: np.ndarray, mask: np.ndarray
) -> None:
    error = metrics.temporal_error(result, truth, mask)
    assert 0 < metrics.flicker(result, truth, mask) < error


def test_a_patch_of_another_shade_is_off_by_that_at_its_seam(mask: np.ndarray) -> None:
    truth = np.full((*mask.shape, 3), 100, np.uint8)
    for shade in (93, 107):
        result = np.where(mask[..., None] == 1, shade, truth).astype(np.uint8)
        assert metrics.seam_error(result, truth, mask) == 7


def test_what_lies_inside_the_hole_does_not_show_at_its_seam(
    truth: np.ndarray, mask: np.ndarray
) -> None:
    result = truth.copy()
    result[:, 7:11, 6:9] = 0
    assert metrics.seam_error(result, truth, mask) == 0
    result[:, 6, 5] = 255 - truth[:, 6, 5]
    assert metrics.seam_error(result, truth, mask) > 0


def test_the_steps_across_a_seam_are_those_to_the_sides_and_above_and_below() -> None:
    truth = np.zeros((1, 3, 3, 3), np.uint8)
    mask = np.zeros((1, 3, 3), np.uint8)
    mask[0, 1, 1] = 1
    truth[0, 1, 0], truth[0, 1, 2], truth[0, 0, 1], truth[0, 2, 1] = 10, 20, 30, 40
    result = truth.copy()
    result[0, 1, 1] = 25  # steps of 15, 5, 5, 15 where the truth's are 10, 20, 30, 40
    assert metrics.seam_error(result, truth, mask) == (5 + 15 + 25 + 25) / 4


@pytest.mark.parametrize("hole", [0, 1])
def test_without_a_border_there_is_no_seam(truth: np.ndarray, hole: int) -> None:
    mask = np.full(truth.shape[:3], hole, np.uint8)
    assert np.isnan(metrics.seam_error(truth, truth, mask))
