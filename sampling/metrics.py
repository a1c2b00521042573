"""How close a result is to the truth, on composited 8-bit RGB frames (one clip at a time).

Composited: outside the hole the result is the truth's own pixels, so the whole-frame metrics
measure the hole too, diluted by what is visible.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8

Frames = UInt8[np.ndarray, "frames height width 3"]
Mask = UInt8[np.ndarray, "frames height width"]

PEAK = 255.0  # the largest 8-bit value
SSIM_RADIUS = 5  # pixels from the middle of the window to its edge
PSNR_CAP = 100.0  # dB; what a frame without any error counts as


def composite(truth: Frames, result: Frames, mask: Mask) -> Frames:
    """The result in the hole (`mask == 1`), the truth where it is visible."""
    return np.where(mask[..., None] == 1, result, truth)


def measure(result: Frames, truth: Frames, mask: Mask) -> dict[str, float]:
    """Every metric of one clip, by the name of its column, in the order of the columns.

    Args:
        result: The composited result.
        truth: The clip as it was.
        mask: 1 is the hole.
    """
    return {
        "psnr": psnr(result, truth),
        "psnr_hole": psnr_hole(result, truth, mask),
        "ssim": ssim(result, truth),
        "colour_error": colour_error(result, truth, mask),
        "temporal_error": temporal_error(result, truth, mask),
    }


def psnr(result: Frames, truth: Frames) -> float:
    """Peak signal-to-noise ratio in dB of each whole frame, averaged over the frames.

    10·log10(255² / mean squared error over pixels and RGB); a frame without error counts as 100.
    """
    squared = _difference(result, truth) ** 2
    return float(_decibels(squared.mean(axis=(1, 2, 3))).mean())


def psnr_hole(result: Frames, truth: Frames, mask: Mask) -> float:
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


def colour_error(result: Frames, truth: Frames, mask: Mask) -> float:
    """How far the hole's colour is off over the whole clip, in 8-bit units.

    |mean of (result − truth) over the hole's pixels of all frames| of each of R, G and B, averaged
    over the three. NaN where no frame has a hole.
    """
    if not mask.any():
        return float("nan")
    shift = _difference(result, truth)[mask == 1].mean(axis=0)
    return float(np.abs(shift).mean())


def temporal_error(result: Frames, truth: Frames, mask: Mask) -> float:
    """How far the hole's changes from frame to frame are off, in 8-bit units.

    Mean of |(result_t − result_{t−1}) − (truth_t − truth_{t−1})| over RGB and over the hole's
    pixels of the frames t ≥ 1, the hole being frame t's. NaN where those frames have no hole.
    """
    if not mask[1:].any():
        return float("nan")
    changes = np.abs(np.diff(_difference(result, truth), axis=0))
    return float(changes[mask[1:] == 1].mean())


def _difference(result: Frames, truth: Frames) -> Float[np.ndarray, "frames height width 3"]:
    return result.astype(np.float64) - truth


def _decibels(mean_squared: Float[np.ndarray, " frames"]) -> Float[np.ndarray, " frames"]:
    with np.errstate(divide="ignore"):
        return np.minimum(10 * np.log10(PEAK**2 / mean_squared), PSNR_CAP)
