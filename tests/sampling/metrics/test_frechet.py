from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import _compute_fid
from vidfill.sampling.metrics.frechet import frechet_distance


def draw(seed: int, clips: int, features: int) -> np.ndarray:
    """Correlated features of unequal scale."""
    random = np.random.default_rng(seed)
    return random.normal(1, 1, (clips, features)) @ random.normal(0, 1, (features, features))


@pytest.mark.parametrize("clips", [9, 40])
def test_it_is_the_formula_with_scipys_matrix_root(clips: int) -> None:
    ours, theirs = draw(0, clips, 8), draw(1, 30, 8)
    first, second = np.cov(ours.T), np.cov(theirs.T)
    apart = ((ours.mean(0) - theirs.mean(0)) ** 2).sum()
    expected = apart + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert frechet_distance(ours, theirs) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("clips", [5, 60])
def test_it_is_torchmetrics_with_fewer_clips_than_features_too(clips: int) -> None:
    ours, theirs = draw(0, clips, 20), draw(1, clips, 20)
    statistics = [
        torch.from_numpy(np.asarray(value))
        for features in (ours, theirs)
        for value in (features.mean(0), np.cov(features.T))
    ]
    # Their sum of roots of eigenvalues has 20 of which 16 are rounding where there are 5 clips.
    expected = float(_compute_fid(*statistics))
    assert frechet_distance(ours, theirs) == pytest.approx(expected, rel=1e-5)


def test_of_one_feature_it_is_the_squares_of_the_shift_and_of_the_spreads_difference() -> None:
    ours, theirs = draw(0, 12, 1), draw(1, 15, 1)
    shift = ours.mean() - theirs.mean()
    spread = ours.std(ddof=1) - theirs.std(ddof=1)
    assert frechet_distance(ours, theirs) == pytest.approx(shift**2 + spread**2)


@pytest.mark.parametrize("clips", [4, 40])
def test_a_shift_costs_its_square_and_a_scale_its_share_of_the_variance(clips: int) -> None:
    features = draw(0, clips, 10)
    shift = np.arange(10.0)
    assert frechet_distance(features + shift, features) == pytest.approx(shift @ shift)
    centred = features - features.mean(0)
    variance = centred.var(axis=0, ddof=1).sum()
    assert frechet_distance(3 * centred, centred) == pytest.approx(4 * variance)


@pytest.mark.parametrize("clips", [4, 40])
def test_a_set_is_at_no_distance_from_itself_in_any_order(clips: int) -> None:
    features = draw(0, clips, 10)
    # Differences of traces of about 500.
    assert frechet_distance(features, features[::-1]) == pytest.approx(0, abs=1e-10)


def test_it_is_symmetric_and_keeps_its_value_when_both_sets_are_turned() -> None:
    ours, theirs = draw(0, 6, 10), draw(1, 30, 10)
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(10, 10)))[0]
    distance = frechet_distance(ours, theirs)
    assert frechet_distance(theirs, ours) == pytest.approx(distance)
    assert frechet_distance(ours @ turn, theirs @ turn) == pytest.approx(distance)


def test_one_clip_has_no_covariance() -> None:
    assert np.isnan(frechet_distance(draw(0, 1, 3), draw(1, 5, 3)))
