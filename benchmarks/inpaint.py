"""`vidfill inpaint` on videos of several lengths: peak memory, and the network's share of time."""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import load_autoencoder
from vidfill.modeling.denoiser import Denoiser, LatentSpace
from vidfill.modeling.settings import SHIPPED, DiffusionConfig
from vidfill.modeling.unet import VideoUNet
from vidfill.sampling.inpaint.run import inpaint
from vidfill.sampling.inpaint.settings import InpaintConfig

from .machine import describe, in_new_process, peak_bytes

EXAMPLES = """examples:
  python -m benchmarks.inpaint
      100 and 1,000 frames of 64x64 with a network that costs next to nothing: memory; minutes
  python -m benchmarks.inpaint --frames 100 1000 10000
      the table of docs/inpaint.md
  python -m benchmarks.inpaint --frames 95 --size 128 --model runs/train --schedule ddim:20
      a real model: the network's share of the time
"""

RATE = 25


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per length, each measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = options.model or make_model(root / "model", options.size)
        rows = []
        for frames in options.frames:
            video = make_video(root / f"{frames}.mp4", frames, options.size)
            print(f"{frames} frames …", file=sys.stderr)
            rows.append(in_new_process(run, str(video), str(model), options.schedule, options.size))
        return rows


def make_model(folder: Path, size: int) -> Path:
    """A network that costs next to nothing, with random weights."""
    autoencoder = load_autoencoder(SHIPPED)
    torch.manual_seed(0)
    network = VideoUNet(
        autoencoder.channels,
        autoencoder.channels + 1,
        block_out_channels=(8,),
        head_channels=8,
        norm_groups=4,
        attention=("none", "none"),
    )
    side = size // autoencoder.downsampling
    zeros, ones = [0.0] * autoencoder.channels, [1.0] * autoencoder.channels
    shape = [20, autoencoder.channels, side, side]
    space = LatentSpace(shape, zeros, ones, autoencoder.identity())
    Denoiser(network, DiffusionConfig(target="v", mask_channel=True), space).save(folder)
    return folder


def make_video(path: Path, frames: int, size: int) -> Path:
    """Stripes that drift, written frame by frame."""
    rows, columns = np.mgrid[:size, :size]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for t in range(frames):
            picture = np.stack([4 * rows + t, 4 * columns + 2 * t, rows + columns], axis=-1) % 256
            frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def run(video: str, model: str, schedule: str, size: int) -> dict[str, float]:
    """Fill a box in the middle of a video; in processor seconds, since other work may run too."""
    spent = count_seconds()
    quarter = size // 4
    config = InpaintConfig(
        Path(video),
        f"{quarter},{quarter},{2 * quarter},{2 * quarter}",
        Path(video).with_suffix(".mkv"),
        Path(model),
        schedule,
        device="cpu",
    )
    warm_up(config)
    spent.clear()
    began = time.process_time()
    peak = peak_bytes(torch.device("cpu"), lambda: inpaint(config))
    seconds = time.process_time() - began
    with av.open(video) as container:
        frames = container.streams.video[0].frames
    return {
        "frames": frames,
        "peak_bytes": peak,
        "process_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "frames_per_second": frames / seconds,
        "network_share": sum(spent) / seconds,
    }


def warm_up(config: InpaintConfig) -> None:
    """Fill one window, so that what is loaded and cached only once is not counted."""
    out = config.video.with_suffix(".warm.mkv")
    inpaint(InpaintConfig(**{**vars(config), "out": out, "trim": "0-0.5"}))


def count_seconds() -> list[float]:
    """A list to which every network call from now on adds its processor seconds."""
    spent: list[float] = []
    denoise: Callable[..., torch.Tensor] = Denoiser.denoise

    def timed(*given: Any) -> torch.Tensor:
        began = time.process_time()
        clean = denoise(*given)
        spent.append(time.process_time() - began)
        return clean

    Denoiser.denoise = timed  # type: ignore[method-assign]
    return spent


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| frames | peak of the process | relative to the first | of which the work adds "
        "| frames per processor second | network's share |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        share = row["process_bytes"] / rows[0]["process_bytes"]
        process, added = (row[name] / 2**20 for name in ("process_bytes", "peak_bytes"))
        lines.append(
            f"| {row['frames']:,} | {process:,.1f} MiB | {share:.1%} | {added:,.1f} MiB | "
            f"{row['frames_per_second']:.1f} | {row['network_share']:.1%} |"
        )
    return "\n".join(lines)


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inpaint",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--frames", type=int, nargs="+", default=[100, 1000], help="lengths")
    parser.add_argument("--size", type=int, default=64, help="height and width (default: 64)")
    parser.add_argument(
        "--model",
        type=Path,
        help="a model's folder (default: a network that costs next to nothing)",
    )
    parser.add_argument("--schedule", default="ddim:1", help="(default: ddim:1)")
    parser.add_argument("--json", action="store_true", help="print only the figures, as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = parse_options(argv)
    try:
        rows = measure(options)
    except BadInput as error:
        print(f"python -m benchmarks.inpaint: error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(table(rows), end="\n\n")
    print(
        "what the work adds is counted after a first window; the network does not include the "
        "autoencoder"
    )
    print(describe(torch.device("cpu")))
    print(shlex.join(["python", "-m", "benchmarks.inpaint", *argv]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
