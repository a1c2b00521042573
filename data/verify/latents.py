"""What the numbers of a data set must look like, where no checksum can tell.

The scaling factor. An autoencoder's factor is 1 / the standard deviation of its latents (Rombach et
al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", Appendix G), so latents
scaled once have one of about 1, unscaled ones of about 1 / factor, and ones scaled twice of about
the factor. The nearest of the three, in ratio, is what happened. A factor of about 1 tells nothing,
and one video's contrast is not another's: where clips can be encoded afresh, that decides instead.

The masked latents. An autoencoder answers to a change where the change is: latents and masked
latents differ in the hole, fade away beside it, and agree in frames without a hole. Of the two it
is the masked ones that break off at the hole's edges. Both are judged over a whole split, since a
hole may hide what has the fill's colour; an example is named where its own evidence is clear.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, UInt8

from ...modeling.autoencoder import Autoencoder, to_frames, to_pixels
from .. import masks
from ..shards.format import Example, Manifest, family_of
from ..shards.reading import Shard
from ..shards.writing import Moments
from ..storage.names import MANIFEST
from .findings import ANEW, Look

# Mean difference between a clip's latents and those of another device, batch or release, in the
# latents' standard deviations. Rounding to float16 makes 2e-4 of it, computing in bfloat16 2e-2
# (TAESD and the shipped autoencoder, collision clips, on a CPU); the rest is for other devices.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.1}
TELLING = 2.0  # a scaling factor, or one over it, from which on latents show whether it is missing
SCALED = {0: "scaled once", -1: "not scaled at all", 1: "scaled twice"}  # by the factor's power

# Of correct examples (three autoencoders, every family, two fills) the difference inside the hole
# is at least 1.2 times that outside, as a rule 3 times, and the jumps of true latents at its edge
# are at most 1.3 times those of masked ones, as a rule half. What is wrong has the inverse ratios.
CLEAR = 0.1  # standard deviations, below which a difference may be chance
MISPLACED, SWAPPED = 1.5, 2.0  # ratios from which on one example is wrong
MISPLACED_ON_AVERAGE, SWAPPED_ON_AVERAGE = 1.0, 1.4
SAME_ON_AVERAGE = 0.5  # a hole may hide just what it is filled with, but hardly in most clips

Frames = UInt8[np.ndarray, "frames height width 3"]


@dataclass
class Totals:
    """What the examples of a shard, or of a split, add up to; not those with NaN or infinity."""

    values: int = 0  # of each channel of the latents
    moments: Any = 0.0  # [2, channels]: sums and squares of `values` values
    evidence: Any = 0.0  # sums of `Evidence`, over the examples that "masked latents" saw

    def add(self, other: Totals) -> None:
        self.values += other.values
        self.moments = self.moments + other.moments
        self.evidence = self.evidence + other.evidence


def check_example(
    number: int,
    example: Example,
    latent_mask: Float16[np.ndarray, "frames 1 h w"],
    manifest: Manifest,
    look: Look,
) -> Totals:
    """Whether the values of an example of shard `number` are such as encode gives.

    Returns:
        What they add to the totals.
    """
    look.seen["finite values"] += 1
    for name in ("latents", "masked_latents", "log_variance"):
        array = getattr(example, name)
        if array is not None and not np.isfinite(array).all():
            reason = f"{name} holds NaN or infinity"
            look.find_in_shard(number, "finite values", reason, example.key)
            return Totals()
    moments = Moments()
    moments.add(example)
    totals = Totals(moments.values, np.array([moments.sums, moments.squares]))
    look.seen["masks"] += 1
    if reason := _find_wrong_mask(example, latent_mask):
        look.find_in_shard(number, "masks", reason, example.key)
    elif example.mask.min() != example.mask.max():
        look.seen["masked latents"] += 1
        evidence = _weigh(example, latent_mask.astype(np.float32), manifest)
        totals.evidence = np.array(evidence)
        if reason := evidence.find_wrong(_tolerance(manifest)):
            look.find_in_shard(number, "masked latents", reason, example.key)
    return totals


def _find_wrong_mask(example: Example, latent_mask: Float16[np.ndarray, "frames 1 h w"]) -> str:
    mask = example.mask
    least, most = mask.min(), mask.max()
    if most > 1:
        return f"its mask has the value {most}: 1 is the hole, 0 is not"
    # A video's own masks may be so, where nothing was there to hide.
    if least == most and family_of(example.key) != masks.OWN:
        return "its mask hides the whole clip" if most else "its mask hides nothing"
    shrunk = masks.latent_mask(mask, *latent_mask.shape[-2:]).numpy().astype(np.float16)
    if not np.array_equal(shrunk, latent_mask):
        return "its latent_mask is not its mask's"
    return ""


class Evidence(NamedTuple):
    """How two videos of latents lie to a mask; all in the latents' standard deviations."""

    inside: float  # mean difference between the two where pixels are hidden
    outside: float  # and where they are not
    whole: float  # and in the frame, of those without a hole, in which it is largest
    true_jumps: float  # mean difference between neighbours of whom one is hidden: of the latents
    masked_jumps: float  # and of the masked latents
    same: float = 0.0  # 1 where the two are equal, 0 where not

    def find_wrong(self, tolerance: float) -> str:
        """What is clearly wrong with one example."""
        if self.whole > tolerance:
            return (
                "latents and masked latents differ in a frame without a hole "
                f"({self.whole:.2g} standard deviations)"
            )
        return self._judge(MISPLACED, SWAPPED, "its mask is inverted, or another's")

    def find_wrong_on_average(self) -> str:
        """What is wrong with examples of which this is the mean."""
        if self.same > SAME_ON_AVERAGE:
            return f"latents and masked latents are the same in {self.same:.0%} of the examples"
        wrong = self._judge(MISPLACED_ON_AVERAGE, SWAPPED_ON_AVERAGE, "masks are not theirs")
        return wrong and f"on average {wrong}"

    def _judge(self, misplaced: float, swapped: float, cause: str) -> str:
        if self.outside > max(CLEAR, misplaced * self.inside):
            return (
                f"latents and masked latents differ outside the hole ({self.outside:.2g} "
                f"standard deviations) more than in it ({self.inside:.2g}): {cause}"
            )
        if self.true_jumps > max(CLEAR, swapped * self.masked_jumps):
            return (
                f"the latents break off at the hole's edge (by {self.true_jumps:.2g} standard "
                f"deviations), not the masked latents ({self.masked_jumps:.2g}): "
                "the two are swapped"
            )
        return ""


def _weigh(
    example: Example, latent_mask: Float32[np.ndarray, "frames 1 h w"], manifest: Manifest
) -> Evidence:
    # Not by torch, whose own threads would get into each other's way here.
    deviations = np.maximum(manifest.latents_std, 1e-6).astype(np.float32)[:, None, None]
    latents = example.latents.astype(np.float32) / deviations
    masked_latents = example.masked_latents.astype(np.float32) / deviations
    difference = np.abs(latents - masked_latents).mean(axis=1, keepdims=True)
    untouched = difference[latent_mask.max(axis=(1, 2, 3)) == 0].mean(axis=(1, 2, 3))
    return Evidence(
        inside=_average(difference, latent_mask),
        outside=_average(difference, 1 - latent_mask),
        whole=max(untouched.tolist(), default=0.0),
        true_jumps=_measure_jumps(latents, latent_mask),
        masked_jumps=_measure_jumps(masked_latents, latent_mask),
        same=float(np.array_equal(latents, masked_latents)),
    )


def _average(
    values: Float32[np.ndarray, "*shape"], weights: Float32[np.ndarray, "*shape"]
) -> float:
    return float((values * weights).sum() / max(float(weights.sum()), 1e-6))


def _measure_jumps(
    latents: Float32[np.ndarray, "frames channels h w"],
    latent_mask: Float32[np.ndarray, "frames 1 h w"],
) -> float:
    """Mean difference between neighbours in time and space, weighed by their masks' difference."""
    total, weight = 0.0, 1e-6
    for axis in (0, 2, 3):
        edges = np.abs(np.diff(latent_mask, axis=axis))
        jumps = np.abs(np.diff(latents, axis=axis)).mean(axis=1, keepdims=True)
        total += float((jumps * edges).sum())
        weight += float(edges.sum())
    return total / weight


def _tolerance(manifest: Manifest) -> float:
    return TOLERANCE.get(manifest.autoencoder.get("precision", ""), max(TOLERANCE.values()))


def check_sums(shard: Shard, totals: Totals, look: Look) -> None:
    """Whether a shard's index has the moments of its latents, but for the order of summation."""
    index = shard.index
    if not totals.values or totals.values != index.values:
        return  # not every example counts
    computed, said = totals.moments.ravel(), np.array([*index.sums, *index.squares])
    if computed.shape != said.shape or not np.allclose(
        computed / index.values, said / index.values, rtol=1e-6, atol=1e-6
    ):
        reason = "its index has other sums of latents than the shard"
        look.find_in_shard(shard.number, "statistics", reason)


def check_statistics(manifest: Manifest, totals: Totals, look: Look) -> None:
    """Whether the manifest's mean and standard deviation are those of all latents."""
    frames, _, h, w = manifest.latent_shape
    if totals.values != manifest.examples * frames * h * w:
        look.notes["statistics"] = "some examples could not be read, or hold NaN"
        return
    look.seen["statistics"] += len(manifest.shards.examples)
    mean, square = totals.moments / totals.values
    computed = {"latents_mean": mean, "latents_std": np.sqrt(np.maximum(square - mean**2, 0))}
    for name, values in computed.items():
        said = np.array(getattr(manifest, name))
        if not np.allclose(said, values, rtol=1e-5, atol=1e-6):
            channel = int(np.argmax(np.abs(said - values)))
            reason = (
                f"{name} of channel {channel} is {said[channel]:.6g}, "
                f"the latents' is {values[channel]:.6g}"
            )
            look.find("statistics", MANIFEST, reason)


def check_average(totals: Totals, look: Look) -> None:
    """Judge a split by its examples' mean, where none was clearly wrong by itself."""
    examples = look.seen["masked latents"]
    if not examples or look.bad["masked latents"]:
        return
    mean = Evidence(*(totals.evidence / examples).tolist())
    if reason := mean.find_wrong_on_average():
        look.find("masked latents", "", reason, remedy=ANEW)


def check_scaling(manifest: Manifest, totals: Totals, powers: Sequence[int], look: Look) -> None:
    """Whether the latents were scaled once.

    `powers` are those of the factor by which clips differ from clips encoded afresh.
    """
    factor = manifest.autoencoder["scaling_factor"]
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        look.find("manifest", MANIFEST, f"autoencoder.scaling_factor is {factor!r}")
        return
    if powers:
        [(power, agreeing)] = collections.Counter(powers).most_common(1)
        look.seen["scaling"] += len(powers)
        told = f"{agreeing} of {len(powers)} agree with clips encoded afresh"
    elif max(factor, 1 / factor) < TELLING:
        look.notes["scaling"] = f"latents do not show a factor as near to 1 as {factor:.4g}"
        return
    elif not totals.values:
        look.notes["scaling"] = "the latents have no standard deviation"
        return
    else:
        mean, square = totals.moments.mean(axis=1) / totals.values
        deviation = max(math.sqrt(max(square - mean**2, 0.0)), 1e-9)
        power = min(SCALED, key=lambda p: abs(math.log(deviation) - p * math.log(factor)))
        look.seen["scaling"] += look.seen["XXH3, shapes"]
        told = f"their standard deviation is {deviation:.3g}, the factor {factor:.4g}"
    if power:
        look.find("scaling", "", f"the latents are {SCALED[power]}: {told}", remedy=ANEW)
    else:
        look.notes["scaling"] = told


class Sample(NamedTuple):
    """One clip to decode and compare."""

    number: int  # of its shard
    example: Example
    source: Frames | None  # its frames in its video, where that is at hand

    @property
    def truth(self) -> Frames | None:
        """Its frames, where they are at hand."""
        return self.example.pixels if self.source is None else self.source


def check_samples(
    samples: Iterable[Sample], autoencoder: Autoencoder, manifest: Manifest, look: Look
) -> list[int]:
    """Decode a few clips, and encode those whose frames are at hand.

    Returns:
        The powers of the scaling factor by which stored latents differ from fresh ones.
    """
    quality: list[float] = []
    powers: list[int] = []
    for sample in samples:
        quality += _check_decoded(sample, autoencoder, look)
        powers += _check_encoded(sample, autoencoder, manifest, look)
    if quality:
        mean = sum(quality) / len(quality)
        look.notes["decoded"] = f"PSNR {mean:.1f} dB, at least {min(quality):.1f}"
    if look.seen["encoded again"] < look.seen["decoded"]:
        look.notes["encoded again"] = "the other clips' videos are not at hand: give --videos"
    return powers


def _check_decoded(sample: Sample, autoencoder: Autoencoder, look: Look) -> list[float]:
    """Whether both of a clip's latents decode to numbers; the PSNR of the clip, if it is known."""
    look.seen["decoded"] += 1
    example, truth = sample.example, sample.truth
    both = np.stack([example.latents, example.masked_latents]).astype(np.float32)
    pixels = autoencoder.decode(torch.from_numpy(both))
    if not torch.isfinite(pixels).all():
        reason = "it decodes to NaN or infinity"
        look.find_in_shard(sample.number, "decoded", reason, example.key)
        return []
    if truth is None:
        return []
    decoded = to_frames(pixels)[0].astype(np.float32)
    error = float(np.square(decoded - truth).mean())
    return [10 * math.log10(255**2 / max(error, 1e-9))]


def _check_encoded(
    sample: Sample, autoencoder: Autoencoder, manifest: Manifest, look: Look
) -> list[int]:
    """Whether a clip's latents are those that encoding its frames gives.

    Returns:
        The power of the scaling factor by which they differ; nothing where they differ otherwise.
    """
    example, truth = sample.example, sample.truth
    if truth is None:
        return []
    look.seen["encoded again"] += 1

    def find(reason: str) -> None:
        look.find_in_shard(sample.number, "encoded again", reason, example.key)

    if example.pixels is not None and not np.array_equal(truth, example.pixels):
        find("its pixels are not its source's")
    tolerance = _tolerance(manifest)
    masked = masks.fill_hole(truth, example.mask, tuple(example.record["fill"]))
    pixels = to_pixels(np.stack([truth, masked]))
    if example.log_variance is None:
        fresh = autoencoder.encode(pixels).cpu().numpy()
    else:
        fresh, log_variances = (part.cpu().numpy() for part in autoencoder.encode_moments(pixels))
        # A log-variance is no multiple of another: what counts is the share by which it is off.
        if np.abs(example.log_variance - log_variances[0]).mean() > 10 * tolerance:
            find("its log-variance is not that of its frames")
    stored = np.stack([example.latents, example.masked_latents]).astype(np.float32)
    factor = autoencoder.scaling_factor
    for power in SCALED:
        if _distance(stored, fresh * factor**power) <= tolerance:
            if power:
                find(f"its latents are {SCALED[power]}")
            return [power]
    parts = zip(("latents", "masked_latents"), stored, fresh, strict=True)
    off = ", ".join(f"{name} by {_distance(a, b):.2g}" for name, a, b in parts)
    find(f"encoded afresh it is another: {off} standard deviations")
    return []


def _distance(a: Float[np.ndarray, "*shape"], b: Float[np.ndarray, "*shape"]) -> float:
    """Mean difference, in standard deviations of `b`."""
    return float(np.abs(a - b).mean() / max(float(b.std()), 1e-6))
