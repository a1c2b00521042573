"""The recipe of the package's own small autoencoder: `python -m vidfill.train.autoencoder`."""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Len, MultipleOf
from diffusers import AutoencoderTiny
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .. import jobs, options
from ..data.encode.sources import Source, find_sources
from ..data.fingerprints import fingerprint_videos
from ..data.masks import draw_mask, fill_hole
from ..data.videos import FrameSize, UnreadableVideo, read_video
from ..errors import BadInput, say
from ..files import write_atomically
from ..modeling.autoencoder import CONFIG, WEIGHTS, load_autoencoder, to_frames, to_pixels
from ..options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed
from ..processes import choose_device
from ..progress import show_progress
from ..sampling.metrics.pixels import psnr
from ..seeding import derive_seed, generator

VERB = "train.autoencoder"
MODULE = f"python -m vidfill.{VERB}"
CARD, STATE = "README.md", "state.safetensors"

EXAMPLES = f"""examples:
  vidfill synth videos --clips 300 --size 128 --seed 1000
  {MODULE} videos autoencoder
  vidfill encode videos shards --autoencoder autoencoder
"""

LEVELS = 4  # three halvings: 8 pixels to a latent, as in Stable Diffusion
WARMUP = 100  # steps
GRADIENT_CLIP = 1.0
HOLDS_OUT = 10  # where there is no validation split: one video in so many
HIDES = 4  # one frame in so many has a hole, so that masked videos are coded as well as others

Side = Annotated[int, Ge(2 ** (LEVELS - 1)), MultipleOf(2 ** (LEVELS - 1))]
Blocks = Annotated[tuple[NonNegativeInt, ...], Len(LEVELS, LEVELS)]
TinyNetwork = Any  # diffusers' AutoencoderTiny, whose methods type checkers do not see
FramesBySize = dict[int, UInt8[np.ndarray, "_ _ _ 3"]]  # frames, height, width; by size


@dataclass(frozen=True)
class AutoencoderTraining:
    """Train a small autoencoder (diffusers' AutoencoderTiny) on a folder of videos.

    Writes a folder that `--autoencoder` takes: weights in float16, scaled so that the latents'
    deviation is 1, and a model card with the PSNR on held-out videos. All frames are held in
    memory. A seed gives the same weights again on the same machine with as many threads.
    """

    videos: Path
    """Folder of videos, as `vidfill encode` takes it; without a validation split every tenth video
    is held out."""
    out: Path
    """Folder to write; the same command continues there."""
    sizes: Annotated[tuple[Side, ...], Len(1)] = (64, 128)
    """Sides of the squares that frames are scaled to, pixels; steps take turns; multiples of 8."""
    frames_per_video: PositiveInt = 24
    """Evenly spaced frames taken of each video."""
    latent_channels: PositiveInt = 4
    """Channels of the latents."""
    width: PositiveInt = 64
    """Channels of every hidden layer."""
    encoder_blocks: Blocks = (0, 1, 3, 3)
    """Residual blocks of the encoder at 1/1, 1/2, 1/4 and 1/8 of the size."""
    decoder_blocks: Blocks = (3, 3, 1, 0)
    """Residual blocks of the decoder at 1/8, 1/4, 1/2 and 1/1 of the size."""
    steps: PositiveInt = 4500
    """Optimizer steps."""
    batch: PositiveInt = 16
    """Frames of a step at the smallest size; at the others as many as have as many pixels."""
    learning_rate: PositiveFloat = 1e-3
    """Adam's at its highest; it rises over 100 steps and falls to 0 along a cosine."""
    l1: NonNegativeFloat = 0.05
    """Weight of the mean absolute error beside the mean squared error."""
    latent_noise: NonNegativeFloat = 0.1
    """Deviation of the noise added to the latents while training, so that the decoder forgives a
    diffusion model's errors; 0 adds none."""
    latent_penalty: NonNegativeFloat = 1e-4
    """Weight of the latents' mean square, which keeps them near 1."""
    seed: Seed = 0
    """Seed of the first weights, the order of the frames, their holes and the noise."""
    save_every: PositiveInt = 250
    """Steps between the states from which an interrupted run continues."""
    device: str = "auto"
    """Where it trains: "cpu", "cuda", "cuda:1"…; "auto" is a GPU if there is one."""


def train_autoencoder(config: AutoencoderTraining) -> dict[int, float]:
    """Train, write the folder, and return the PSNR (dB) on held-out videos by size.

    Raises:
        BadInput: a value is out of range, a video is no video, or the loss is not finite.
    """
    options.check(config)
    device = choose_device(config.device)
    jobs.refuse_launcher(VERB)
    sources = find_sources(config.videos)
    split = _split(sources, config.videos)
    paths = [source.path for source in sources]

    def identify(before: Mapping[str, Any]) -> dict[str, Any]:
        return {"videos": fingerprint_videos(*paths, known=before.get("videos", ()), whole=False)}

    with jobs.claim(config.out, VERB, config, stands_on=identify):
        return _train_claimed(config, device, *split)


def _train_claimed(
    config: AutoencoderTraining,
    device: torch.device,
    train_videos: Sequence[Path],
    held_out_videos: Sequence[Path],
) -> dict[int, float]:
    held_out = _read(held_out_videos, config, "reading held-out videos")
    if (config.out / CARD).is_file():
        return _say(evaluate(config.out, held_out, config.frames_per_video))
    network = build_network(config).to(device, memory_format=torch.channels_last)
    seconds = _train(config, network, _read(train_videos, config, "reading videos"))
    _save(config.out, network, _latent_deviation(network, held_out))
    figures = evaluate(config.out, held_out, config.frames_per_video)
    card = write_card(config, figures, seconds, len(train_videos), len(held_out_videos))
    write_atomically(config.out / CARD, card.encode())
    (config.out / STATE).unlink()
    return _say(figures)


def _split(sources: Sequence[Source], videos: Path) -> tuple[list[Path], list[Path]]:
    training = [source.path for source in sources if source.split == "train"]
    validation = [source.path for source in sources if source.split == "validation"]
    if training and validation:
        return training, validation
    everything = training or validation
    if len(everything) < 2:
        raise BadInput(f"{videos} holds one video: give at least two, for one is held out")
    held_out = everything[::HOLDS_OUT]
    return [video for video in everything if video not in held_out], held_out


def _read(videos: Sequence[Path], config: AutoencoderTraining, description: str) -> FramesBySize:
    read: dict[int, list[np.ndarray]] = {size: [] for size in config.sizes}
    with show_progress(description, len(videos), "videos") as progress:
        for video in videos:
            for size, frames in read.items():
                frames.append(_read_evenly(video, size, config.frames_per_video))
            progress.advance(note=video.name)
    return {size: np.concatenate(frames) for size, frames in read.items()}


def _read_evenly(video: Path, size: int, count: int) -> UInt8[np.ndarray, "frames size size 3"]:
    try:
        frames, _ = read_video(video, FrameSize(size, size))
    except UnreadableVideo as error:
        raise BadInput(f"{video} cannot be read ({error}): remove it or mend it") from error
    return frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]


def build_network(config: AutoencoderTraining) -> TinyNetwork:
    """The network at its first weights, which the seed alone decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "first weights"))
        return AutoencoderTiny(
            encoder_block_out_channels=(config.width,) * LEVELS,
            decoder_block_out_channels=(config.width,) * LEVELS,
            num_encoder_blocks=config.encoder_blocks,
            num_decoder_blocks=config.decoder_blocks,
            latent_channels=config.latent_channels,
        )


def _train(config: AutoencoderTraining, network: TinyNetwork, frames: FramesBySize) -> float:
    """Train to the end, from the newest state if there is one; return the seconds of it all."""
    optimizer = torch.optim.Adam(network.parameters())
    done, seconds = _load_state(config.out / STATE, network, optimizer)
    began = time.monotonic() - seconds
    with show_progress("training", config.steps, "steps", done) as progress:
        for step in range(done, config.steps):
            optimizer.param_groups[0]["lr"] = learning_rate(config, step)
            loss, error = _loss(config, network, draw_batch(config, frames, step), step)
            if not math.isfinite(loss.item()):
                raise BadInput(f"the loss is {loss.item()} at step {step}: lower learning_rate")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_CLIP)
            optimizer.step()
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                seconds = time.monotonic() - began
                _save_state(config.out / STATE, network, optimizer, step + 1, seconds)
            progress.advance(note=f"PSNR {10 * math.log10(4 / error):.1f} dB")
    return seconds


def learning_rate(config: AutoencoderTraining, step: int) -> float:
    """The rate of a step: a linear rise, then half a cosine down to 0."""
    rise = min(1.0, (step + 1) / WARMUP)
    return config.learning_rate * rise * (1 + math.cos(math.pi * step / config.steps)) / 2


def draw_batch(
    config: AutoencoderTraining, frames: FramesBySize, step: int
) -> Float[Tensor, "batch 3 height width"]:
    """The frames of a step, a pure function of the seed and the step; some have a hole."""
    size = config.sizes[step % len(config.sizes)]
    count = max(1, config.batch * min(config.sizes) ** 2 // size**2)
    rng = generator(config.seed, step, "frames")
    chosen = frames[size][torch.randint(len(frames[size]), (count,), generator=rng).numpy()]
    for slot in range(0, count, HIDES):
        one = chosen[slot : slot + 1]
        mask = draw_mask("stationary", 1, size, size, (config.seed, step, slot))
        chosen[slot : slot + 1] = fill_hole(one, mask)
    return to_pixels(chosen)


def _loss(
    config: AutoencoderTraining,
    network: TinyNetwork,
    pixels: Float[Tensor, "batch 3 height width"],
    step: int,
) -> tuple[Float[Tensor, ""], float]:
    """The loss of a step, and the mean squared error within it."""
    pixels = pixels.to(network.device, memory_format=torch.channels_last)
    with torch.autocast(network.device.type, dtype=torch.bfloat16):
        latents = network.encode(pixels).latents.float()
        rng = generator(config.seed, step, "latent noise")
        noise = torch.randn(latents.shape, generator=rng).to(latents.device)
        decoded = network.decode(latents + config.latent_noise * noise).sample.float()
    squared = (decoded - pixels).square().mean()
    absolute = (decoded - pixels).abs().mean()
    loss = squared + config.l1 * absolute + config.latent_penalty * latents.square().mean()
    return loss, squared.item()


def _save_state(
    path: Path, network: TinyNetwork, optimizer: torch.optim.Adam, step: int, seconds: float
) -> None:
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        tensors |= {f"{kind}.{name}": value for kind, value in optimizer.state[parameter].items()}
    whole = {name: value.contiguous() for name, value in tensors.items()}
    whole |= {"steps": torch.tensor(step), "seconds": torch.tensor(seconds, dtype=torch.float64)}
    write_atomically(path, save(whole))


def _load_state(path: Path, network: TinyNetwork, optimizer: torch.optim.Adam) -> tuple[int, float]:
    """Restore the state, if there is one; return the steps and seconds that it took."""
    if not path.is_file():
        return 0, 0.0
    tensors = load_file(path)
    network.load_state_dict({name: tensors[f"network.{name}"] for name in network.state_dict()})
    for name, parameter in network.named_parameters():
        optimizer.state[parameter] = {
            "step": tensors[f"step.{name}"],  # Adam keeps it on the CPU
            "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
            "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
        }
    return int(tensors["steps"]), float(tensors["seconds"])


@torch.no_grad()
def _latent_deviation(network: TinyNetwork, frames: FramesBySize) -> float:
    """The standard deviation of all latents of at most 256 frames of each size."""
    latents = [
        network.encode(to_pixels(chosen).to(network.device)).latents.flatten()
        for every in frames.values()
        for chosen in [every[:: math.ceil(len(every) / 256)]]
    ]
    return torch.cat(latents).std().item()


def _save(out: Path, network: TinyNetwork, latent_deviation: float) -> None:
    network.register_to_config(scaling_factor=1.0 / latent_deviation)
    config = json.loads(network.to_json_string())
    config.pop("block_out_channels", None)  # diffusers derives it, and warns where it finds it
    weights = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    write_atomically(out / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    write_atomically(out / WEIGHTS, save(weights, {"format": "pt"}))


def evaluate(folder: Path, held_out: FramesBySize, frames_per_video: int) -> dict[int, float]:
    """Mean PSNR (dB, `sampling.metrics.psnr`) of what the autoencoder makes of held-out videos."""
    autoencoder = load_autoencoder(str(folder))
    figures = {}
    for size, frames in held_out.items():
        clips = np.split(frames, len(frames) // frames_per_video)
        decoded = (autoencoder.decode(autoencoder.encode(to_pixels(clip[None]))) for clip in clips)
        scores = [psnr(to_frames(d)[0], clip) for d, clip in zip(decoded, clips, strict=True)]
        figures[size] = float(np.mean(scores))
    return figures


def _say(figures: dict[int, float]) -> dict[int, float]:
    for size, decibels in figures.items():
        say(f"PSNR on held-out videos at {size}x{size}: {decibels:.2f} dB", file=sys.stdout)
    return figures


def write_card(
    config: AutoencoderTraining,
    figures: dict[int, float],
    seconds: float,
    train_videos: int,
    held_out_videos: int,
) -> str:
    """The model card, in Markdown: data, command, hardware, time, figures."""
    channels, sizes = config.latent_channels, " and ".join(map(str, config.sizes))
    rows = "\n".join(f"| {size}x{size} | {figure:.2f} |" for size, figure in figures.items())
    return f"""\
# A small autoencoder

An AutoencoderTiny (diffusers) with {channels} latent channels and 8-fold downsampling,
trained from scratch with vidfill's own recipe. Weights are stored in float16 and used in float32;
latents times `scaling_factor` have a deviation of 1. It is not meant for other kinds of videos.

## Data

- {_describe_data(config.videos)}
- {train_videos} videos for training, {held_out_videos} held out.
- {config.frames_per_video} evenly spaced frames of each, scaled to {sizes} pixels.
- In a quarter of the training frames, cells of a 4x4 grid were hidden, as `vidfill encode` does.

## Training

    {MODULE} {shlex.join(jobs.words_of(config))}

- {config.steps} steps of Adam in {seconds / 60:.0f} minutes on {_describe_hardware(config.device)}.
- Loss: mean squared error + {config.l1:g} mean absolute error + {config.latent_penalty:g} mean
  square of the latents.
- Noise of deviation {config.latent_noise:g} on the latents (before `scaling_factor`).

## Figures

PSNR on the held-out videos in dB, for each frame as 8-bit RGB, averaged over frames and videos.

| size | PSNR |
| --- | --- |
{rows}
"""


def _describe_data(videos: Path) -> str:
    job = jobs.read_job(videos)
    if not job:
        return f"The videos in `{videos.name}`."
    options = ", ".join(f"{name} {value}" for name, value in job.config.items() if name != "out")
    return f"Videos made by `vidfill {job.verb}` ({options})."


def _describe_hardware(name: str) -> str:
    device = choose_device(name)
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of a CPU ({platform.machine()})"


def main(argv: Sequence[str] | None = None) -> int:
    return jobs.main(AutoencoderTraining, train_autoencoder, argv, verb=VERB, examples=EXAMPLES)


if __name__ == "__main__":
    sys.exit(main())
