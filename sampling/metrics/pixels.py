"""How close a result is to the truth, on composited 8-bit RGB frames (one clip at a time).

Composited: outside the hole the result is the truth's own pixels, so the whole-frame metrics
measure the hole too, diluted by what is visible.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float

from ...data.videos import Frames, Masks, Pixels

PEAK = 255.0  # the largest 8-bit value
SSIM_RADIUS = 5  # pixels from the middle of the window to its edge
SSIM_65 = 65  # pixels; the side of E2FGVI's and ProPainter's window
PSNR_CAP = 100.0  # dB; counted for a frame without error


def composite(truth: Frames, result: Frames, mask: Masks) -> Frames:
    """The result in the hole (`mask == 1`), the truth where it is visible."""
    return np.where(mask[..., None] == 1, result, truth)


def psnr(result: Frames, truth: Frames) -> float:
    """Peak signal-to-noise ratio in dB of each whole frame, averaged over the frames.

    10·log10(255² / mean squared error over pixels and RGB); a frame without error counts as 100.
    """
    squared = _difference(result, truth) ** 2
    return float(_decibels(squared.mean(axis=(1, 2, 3))).mean())


def psnr_hole(result: Frames, truth: Frames, mask: Masks) -> float:
    """As `psnr`, over the hole's pixels only; frames without a hole are left out.

    NaN where no frame has a hole.
    """
    squared = _difference(result, truth) ** 2
    frames = [squared[t][mask[t] == 1].mean() for t in range(len(mask)) if mask[t].any()]
    return float(_decibels(np.array(frames)).mean()) if frames else float("nan")


def ssim(result: Frames, truth: Frames) -> float:
    """Structural similarity of each whole frame, 1 at best, averaged over RGB and frames.

    Wang et al. 2004: a Gaussian window of σ = 1.5 over 11×11 pixels, K = (0.01, 0.03), averaged
    over the places where it lies within the frame (as scikit-image's; torchmetrics' own average
    takes in the reflected border). NaN for frames of fewer than 11×11 pixels.
    """
    # Seconds to import, and training's previews need only `composite`.
    from torchmetrics.functional.image import structural_similarity_index_measure

    ours, theirs = (
        rearrange(torch.from_numpy(frames), "f h w c -> f c h w").float()
        for frames in (result, truth)
    )
    _, similarity = structural_similarity_index_measure(
        ours, theirs, sigma=1.5, data_range=PEAK, return_full_image=True
    )
    return float(similarity[..., SSIM_RADIUS:-SSIM_RADIUS, SSIM_RADIUS:-SSIM_RADIUS].mean())


def ssim_65(result: Frames, truth: Frames) -> float:
    """Structural similarity as E2FGVI and ProPainter measure it, averaged over RGB and frames.

    scikit-image's with win_size=65: a flat window of 65×65 pixels, covariances over N − 1,
    K = (0.01, 0.03), averaged over the places where it lies within the frame. NaN for frames of
    fewer than 65×65 pixels.
    """
    if min(truth.shape[1:3]) < SSIM_65:
        return float("nan")
    return float(np.mean([_flat_ssim(r, t) for r, t in zip(result, truth, strict=True)]))


def colour_error(result: Frames, truth: Frames, mask: Masks) -> float:
    """How far the hole's colour is off over the whole clip, in 8-bit units.

    |mean of (result − truth) over the hole's pixels of all frames| of each of R, G and B, averaged
    over the three. NaN where no frame has a hole.
    """
    if not mask.any():
        return float("nan")
    shift = _difference(result, truth)[mask == 1].mean(axis=0)
    return float(np.abs(shift).mean())


def temporal_error(result: Frames, truth: Frames, mask: Masks) -> float:
    """How far the hole's changes from frame to frame are off, in 8-bit units.

    Mean of |(result_t − result_{t−1}) − (truth_t − truth_{t−1})| over RGB and over the hole's
    pixels of the frames t ≥ 1, the hole being frame t's. NaN where those frames have no hole.
    """
    if not mask[1:].any():
        return float("nan")
    changes = np.abs(np.diff(_difference(result, truth), axis=0))
    return float(changes[mask[1:] == 1].mean())


def flicker(result: Frames, truth: Frames, mask: Masks) -> float:
    """How much the colour of the whole hole jumps from frame to frame, in 8-bit units.

    With s_t the mean of (result − truth) over frame t's hole, the mean of |s_t − s_{t−1}| over RGB
    and over the frames that have a hole as the one before has. NaN where there are none.
    """
    holed = np.any(mask, axis=(1, 2))
    difference = _difference(result, truth)
    pairs = [t for t in range(1, len(mask)) if holed[t - 1] and holed[t]]
    shifts = {t: difference[t][mask[t] == 1].mean(axis=0) for t in range(len(mask)) if holed[t]}
    jumps = [np.abs(shifts[t] - shifts[t - 1]).mean() for t in pairs]
    return float(np.mean(jumps)) if jumps else float("nan")


def seam_error(result: Frames, truth: Frames, mask: Masks) -> float:
    """How far the steps across the hole's border are off, in 8-bit units.

    Mean of ||step of the result| − |step of the truth|| over RGB and over all pairs of pixels side
    by side, or one above the other, of which one is in the hole. NaN where there are none.
    """
    steps = np.concatenate([_step_errors(result, truth, mask, axis) for axis in (1, 2)])
    return float(steps.mean()) if steps.size else float("nan")


def _step_errors(
    result: Frames, truth: Frames, mask: Masks, axis: int
) -> Float[np.ndarray, "pairs 3"]:
    ours, theirs = (
        np.abs(np.diff(frames.astype(np.float64), axis=axis)) for frames in (result, truth)
    )
    return np.abs(ours - theirs)[np.diff(mask, axis=axis) != 0]


def _flat_ssim(result: Pixels, truth: Pixels) -> float:
    r, t = result.astype(np.float64), truth.astype(np.float64)
    mean_r, mean_t, mean_rr, mean_tt, mean_rt = map(_window_mean, (r, t, r * r, t * t, r * t))
    sampled = SSIM_65**2 / (SSIM_65**2 - 1)
    covariance = sampled * (mean_rt - mean_r * mean_t)
    variances = sampled * (mean_rr - mean_r**2 + mean_tt - mean_t**2)
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    similarity = (2 * mean_r * mean_t + c1) * (2 * covariance + c2)
    return float((similarity / ((mean_r**2 + mean_t**2 + c1) * (variances + c2))).mean())


def _window_mean(
    values: Float[np.ndarray, "height width 3"],
) -> Float[np.ndarray, "inner_height inner_width 3"]:
    edge = SSIM_65 // 2
    return cv2.boxFilter(values, -1, (SSIM_65, SSIM_65))[edge:-edge, edge:-edge]


def _difference(result: Frames, truth: Frames) -> Float[np.ndarray, "frames height width 3"]:
    return result.astype(np.float64) - truth


def _decibels(mean_squared: Float[np.ndarray, " frames"]) -> Float[np.ndarray, " frames"]:
    with np.errstate(divide="ignore"):
        return np.minimum(10 * np.log10(PEAK**2 / mean_squared), PSNR_CAP)
