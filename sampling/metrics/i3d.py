"""I3D: the features behind FVD and VFID (Carreira and Zisserman, 2017)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ...data.videos import Frames
from ...errors import BadInput
from ...modeling.autoencoder import to_pixels
from .networks import Features

Video = Float[Tensor, "batch _ _ _ _"]  # channels, frames, height, width

I3D_SIZE = 224  # pixels; the height and width that I3D was trained at
FVD_FRAMES = 10  # the fewest that the authors of FVD allow


def pad_same(video: Video, kernel: Sequence[int], stride: Sequence[int]) -> Video:
    """Zeros around a video, so that ⌈size / stride⌉ windows fit: TensorFlow's SAME.

    If their number is odd, the larger half comes after. A maximum pool may be padded with zeros
    too, as it follows a ReLU.
    """
    padding: list[int] = []
    for size, window, step in zip(video.shape[:1:-1], kernel[::-1], stride[::-1], strict=True):
        total = max((-(-size // step) - 1) * step + window - size, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(video, padding)


class _Unit(nn.Module):
    """Convolution, batch norm and ReLU."""

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv = nn.Conv3d(channels, out, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out, eps=1e-3)

    def forward(self, video: Video) -> Video:
        return F.relu(self.bn(self.conv(pad_same(video, self.kernel, self.stride))))


class _Pool(nn.Module):
    """Maximum over windows."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, video: Video) -> Video:
        padded = pad_same(video, self.kernel, self.stride)
        return F.max_pool3d(padded, self.kernel, self.stride)


class _Mixed(nn.Module):
    """Four branches side by side: 1×1×1, two of 3×3×3, and a maximum."""

    def __init__(self, channels: int, outs: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        self.b0 = _Unit(channels, outs[0])
        self.b1a, self.b1b = _Unit(channels, outs[1]), _Unit(outs[1], outs[2], 3)
        self.b2a, self.b2b = _Unit(channels, outs[3]), _Unit(outs[3], outs[4], 3)
        self.pool = _Pool((3, 3, 3), (1, 1, 1))
        self.b3 = _Unit(channels, outs[5])

    def forward(self, video: Video) -> Video:
        branches = (
            self.b0(video),
            self.b1b(self.b1a(video)),
            self.b2b(self.b2a(video)),
            self.b3(self.pool(video)),
        )
        return torch.cat(branches, dim=1)


class I3d(nn.Module):
    """The RGB network of Carreira & Zisserman 2017, "Quo Vadis, Action Recognition?", Figure 3."""

    def __init__(self) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {
            "Conv3d_1a_7x7": _Unit(3, 64, 7, 2),
            "MaxPool3d_2a_3x3": _Pool((1, 3, 3), (1, 2, 2)),
            "Conv3d_2b_1x1": _Unit(64, 64),
            "Conv3d_2c_3x3": _Unit(64, 192, 3),
            "MaxPool3d_3a_3x3": _Pool((1, 3, 3), (1, 2, 2)),
            "Mixed_3b": _Mixed(192, (64, 96, 128, 16, 32, 32)),
            "Mixed_3c": _Mixed(256, (128, 128, 192, 32, 96, 64)),
            "MaxPool3d_4a_3x3": _Pool((3, 3, 3), (2, 2, 2)),
            "Mixed_4b": _Mixed(480, (192, 96, 208, 16, 48, 64)),
            "Mixed_4c": _Mixed(512, (160, 112, 224, 24, 64, 64)),
            "Mixed_4d": _Mixed(512, (128, 128, 256, 24, 64, 64)),
            "Mixed_4e": _Mixed(512, (112, 144, 288, 32, 64, 64)),
            "Mixed_4f": _Mixed(528, (256, 160, 320, 32, 128, 128)),
            "MaxPool3d_5a_2x2": _Pool((2, 2, 2), (2, 2, 2)),
            "Mixed_5b": _Mixed(832, (256, 160, 320, 32, 128, 128)),
            "Mixed_5c": _Mixed(832, (384, 192, 384, 48, 128, 128)),
        }
        self.trunk = nn.Sequential(OrderedDict(layers))
        self.logits = nn.ModuleDict({"conv": nn.Conv3d(1024, 400, 1)})

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def classify(self, pixels: Float[Tensor, "frames 3 224 224"]) -> Float[Tensor, "400"]:
        """The logits of one video of at least 9 frames in [-1, 1], averaged over time."""
        pooled = F.avg_pool3d(self._see(pixels), (2, 7, 7), stride=1)
        return self.logits["conv"](pooled).mean(dim=(0, 2, 3, 4))

    def describe(self, pixels: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "1024"]:
        """The last layer before the classifier, averaged over time and space."""
        return self._see(pixels).mean(dim=(0, 2, 3, 4))

    def _see(self, pixels: Float[Tensor, "frames 3 height width"]) -> Video:
        return self.trunk(rearrange(pixels, "f c h w -> 1 c f h w"))


@torch.no_grad()
def fvd_features(network: I3d, frames: Frames) -> Features:
    """FVD's features of a video: 400 logits, of frames resized to 224×224 and in [-1, 1].

    Bilinear, between the middles of pixels.

    Raises:
        BadInput: the video has fewer than 10 frames.
    """
    if len(frames) < FVD_FRAMES:
        raise BadInput(
            f"the clips have {len(frames)} frames; FVD wants at least {FVD_FRAMES}: "
            "give longer clips, or leave I3D out"
        )
    pixels = to_pixels(frames).to(network.device)
    resized = F.interpolate(pixels, (I3D_SIZE, I3D_SIZE), mode="bilinear", align_corners=False)
    return network.classify(resized).cpu().numpy()


@torch.no_grad()
def vfid_features(network: I3d, frames: Frames) -> Features:
    """VFID's features of a video: 1024 averages, of frames at their own size and in [0, 1]."""
    pixels = (to_pixels(frames).to(network.device) + 1) / 2
    return network.describe(pixels).cpu().numpy()
