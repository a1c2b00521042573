"""Videos, folders of images, a tiny random autoencoder, and encodings of them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from vidfill.data import videos
from vidfill.data.encode.settings import EncodeConfig

FRAMES, SIDE = 4, 32
SHARD = 0.03  # megabytes: two clips of that size, without pixels


def _write_lossless(path: Path, frames: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def _write_images(folder: Path, frames: np.ndarray, suffix: str = "png", step: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(frames):
        Image.fromarray(pixels).save(folder / f"{step * index:05}.{suffix}")
    return folder


def _damage(path: Path) -> None:
    """The second half of the data is lost, the header is not."""
    content = bytearray(path.read_bytes())
    first, last = content.index(b"mdat") + 4, content.index(b"moov") - 4
    middle = (first + last) // 2
    content[middle:last] = bytes(last - middle)
    path.write_bytes(content)


@pytest.fixture(scope="session")
def write_lossless() -> Callable[..., Path]:
    """Write RGB frames as a video."""
    return _write_lossless


@pytest.fixture(scope="session")
def write_images() -> Callable[..., Path]:
    """Write frames as a folder of images with numbers as names."""
    return _write_images


@pytest.fixture(scope="session")
def damage() -> Callable[[Path], None]:
    """Damage an MP4's data but not its header."""
    return _damage


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random autoencoder of downsampling 8."""
    torch.manual_seed(0)
    network = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    folder = tmp_path_factory.mktemp("autoencoder")
    network.save_pretrained(folder)
    return str(folder)


def _draw_video(seed: int, frames: int = FRAMES, side: int = SIDE) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, 256, (frames, 4, 4, 3), dtype=np.uint8)
    return blocks.repeat(side // 4, axis=1).repeat(side // 4, axis=2)


def _write_video(path: Path, seed: int, frames: int = FRAMES, side: int = SIDE) -> None:
    videos.write_video(path, _draw_video(seed, frames, side), 12.5)


@pytest.fixture(scope="session")
def draw_video() -> Callable[..., np.ndarray]:
    """Frames of random blocks."""
    return _draw_video


@pytest.fixture(scope="session")
def write_video() -> Callable[..., None]:
    """Write frames of random blocks as an MP4."""
    return _write_video


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five training and two validation videos; the second has two clips."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(5):
        _write_video(root / "train" / f"v{number}.mp4", number, FRAMES * 2 if number == 1 else 5)
    for number in range(5, 7):
        _write_video(root / "val" / f"v{number}.mp4", number)
    return root


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The videos, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "videos"))


@pytest.fixture
def configure(autoencoder: str, tmp_path: Path) -> Callable[..., EncodeConfig]:
    """The configuration of a small job."""

    def make(videos: Path, **changes: object) -> EncodeConfig:
        plain = EncodeConfig(
            videos,
            tmp_path / "out",
            autoencoder,
            frames=FRAMES,
            shard_megabytes=SHARD,
            pixels="none",
            device="cpu",
        )
        return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]

    return make


def _read_bytes(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def read_bytes() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a folder by its path there."""
    return _read_bytes
