"""The Fréchet distance between two sets of feature vectors: FVD and VFID, by their features."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

FeatureSet = Float[np.ndarray, "_ features"]  # a row for each clip


def frechet_distance(ours: FeatureSet, theirs: FeatureSet) -> float:
    """Squared 2-Wasserstein distance between the Gaussians of two sets' means and covariances.

    |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½ (Dowson & Landau 1982), the covariances over N − 1.
    With Σ = RᵀR the last trace is the sum of the singular values of R₁R₂ᵀ: exact where N is below
    the number of features, where the square root of the singular Σ₁Σ₂ is not. NaN for a set of
    fewer than two.
    """
    if min(len(ours), len(theirs)) < 2:
        return float("nan")
    first, second = _root(ours), _root(theirs)
    between = ours.mean(axis=0, dtype=np.float64) - theirs.mean(axis=0, dtype=np.float64)
    shared = np.linalg.norm(first @ second.T, "nuc")
    distance = between @ between + (first**2).sum() + (second**2).sum() - 2 * shared
    return max(float(distance), 0.0)


def _root(features: FeatureSet) -> Float[np.ndarray, "rank features"]:
    """R with RᵀR the covariance, of no more rows than there are features."""
    clips, width = features.shape
    centred = (features - features.mean(axis=0, dtype=np.float64)) / np.sqrt(clips - 1)
    return centred if clips <= width else np.asarray(np.linalg.qr(centred, mode="r"))
