"""What a sweep measures on one clip: its scores, and its features for the distance of a set.

`fvd` and `vfid` are `frechet.frechet_distance` of what `describe_clip` gives for each clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...data.videos import Frames, Masks
from . import pixels
from .i3d import I3d, fvd_features, vfid_features
from .lpips import Lpips, lpips
from .networks import Features, load
from .warping import follow, warping_error


@dataclass(frozen=True)
class Judges:
    """The networks that judge results; the measures of a missing one are left out."""

    lpips: Lpips | None = None
    i3d: I3d | None = None

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Those that are there, by name."""
        both = {"lpips": self.lpips, "i3d": self.i3d}
        return {name: network for name, network in both.items() if network is not None}


def load_judges(lpips: str, i3d: str, device: torch.device) -> Judges:
    """The networks by the names of their files, as `networks.load` takes them; "" is none.

    Raises:
        BadInput: a file is not what it should be.
    """
    return Judges(
        load(Lpips, lpips, device) if lpips else None, load(I3d, i3d, device) if i3d else None
    )


def score_clip(result: Frames, truth: Frames, mask: Masks, judges: Judges) -> dict[str, float]:
    """The scores of a composited result, by the names of their columns; lpips if it is there."""
    scores = {
        "psnr": pixels.psnr(result, truth),
        "psnr_hole": pixels.psnr_hole(result, truth, mask),
        "ssim": pixels.ssim(result, truth),
        "colour_error": pixels.colour_error(result, truth, mask),
        "temporal_error": pixels.temporal_error(result, truth, mask),
        "flicker": pixels.flicker(result, truth, mask),
        "seam_error": pixels.seam_error(result, truth, mask),
        "warping_error": warping_error(result, follow(truth)),
        "ssim_65": pixels.ssim_65(result, truth),
    }
    return scores | ({"lpips": lpips(judges.lpips, result, truth)} if judges.lpips else {})


def describe_clip(frames: Frames, judges: Judges) -> dict[str, Features]:
    """A clip's features for FVD and VFID, by the names of their columns; none without I3D.

    Raises:
        BadInput: the clip is too short for the FVD.
    """
    if not judges.i3d:
        return {}
    return {
        "fvd": fvd_features(judges.i3d, frames),
        "vfid": vfid_features(judges.i3d, frames),
    }
