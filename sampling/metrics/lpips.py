"""LPIPS: the perceptual distance of two images (Zhang et al., 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...data.videos import Frames
from ...modeling.autoencoder import to_pixels

LPIPS_CHANNELS = (3, 64, 192, 384, 256, 256)
LPIPS_LEAST = 31  # pixels in height and width; AlexNet's pooling leaves nothing of fewer


class Lpips(nn.Module):
    """LPIPS 0.1 with AlexNet: how different two pictures look, 0 when they are equal.

    Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
    Metric", Eq. 1.
    """

    def __init__(self) -> None:
        super().__init__()
        kernels = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
        convolutions = nn.ModuleList(
            nn.Conv2d(LPIPS_CHANNELS[i], LPIPS_CHANNELS[i + 1], kernel, stride, padding)
            for i, (kernel, stride, padding) in enumerate(kernels)
        )
        self.net = nn.ModuleDict({"conv": convolutions})
        self.lin = nn.ParameterList(torch.empty(channels) for channels in LPIPS_CHANNELS[1:])
        self.shift = nn.Buffer(torch.empty(1, 3, 1, 1))
        self.scale = nn.Buffer(torch.empty(1, 3, 1, 1))

    def forward(
        self,
        ours: Float[Tensor, "batch 3 height width"],
        theirs: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, " batch"]:
        """Pixels in [-1, 1], at their own size, which is `LPIPS_LEAST` or more each way."""
        pairs = zip(self._activations(ours), self._activations(theirs), self.lin, strict=True)
        return torch.stack(
            [torch.einsum("bchw,c->bhw", (a - b) ** 2, w).mean(dim=(1, 2)) for a, b, w in pairs]
        ).sum(dim=0)

    def _activations(self, pixels: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
        """After each ReLU, every place's channels divided by their length."""
        found = []
        hidden = (pixels - self.shift) / self.scale
        for i, convolution in enumerate(self.net["conv"].children()):
            if i in (1, 2):
                hidden = F.max_pool2d(hidden, 3, stride=2)
            hidden = F.relu(convolution(hidden))
            found.append(hidden / (hidden.norm(dim=1, keepdim=True) + 1e-10))
        return found


@torch.no_grad()
def lpips(network: Lpips, result: Frames, truth: Frames) -> float:
    """LPIPS (AlexNet, 0.1) of each whole frame at its own size, averaged over the frames.

    NaN for frames of fewer than 31×31 pixels.
    """
    if min(truth.shape[1:3]) < LPIPS_LEAST:
        return float("nan")
    ours, theirs = (to_pixels(frames).to(network.shift.device) for frames in (result, truth))
    return float(network(ours, theirs).mean())
