from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from vidfill.data.shards.format import Example
from vidfill.modeling.autoencoder import Autoencoder
from vidfill.modeling.denoiser import Denoiser, LatentSpace
from vidfill.modeling.noise import DiffusionConfig
from vidfill.modeling.unet import VideoUNet
from vidfill.sampling.pipeline import VideoInpaintPipeline

FRAMES, SIZE, CHANNELS = 3, 16, 4  # of the smallest clips; their latents are 4x4


def make_autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    widths = (8, 8, 8)
    network = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=CHANNELS,
    )
    return Autoencoder(network, "tiny")


def make_denoiser(autoencoder: Autoencoder) -> Denoiser:
    """Random weights, none of them zero: every input matters to every output."""
    network = VideoUNet(
        latent_channels=CHANNELS,
        condition_channels=CHANNELS + 1,
        block_out_channels=(8, 16),
        head_channels=8,
        norm_groups=4,
    )
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn(weight.shape, generator=source), alpha=0.1)
    config = DiffusionConfig(timesteps=40, target="v", mask_channel=True)
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 1.1, 1.2, 1.3]
    space = LatentSpace([FRAMES, CHANNELS, 4, 4], mean, std, autoencoder.identity())
    return Denoiser(network.eval(), config, space)


@pytest.fixture
def autoencoder() -> Autoencoder:
    return make_autoencoder()


@pytest.fixture
def denoiser(autoencoder: Autoencoder) -> Denoiser:
    return make_denoiser(autoencoder)


@pytest.fixture(scope="session")
def model_on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The denoiser's folder, whose record names the autoencoder's."""
    folder = tmp_path_factory.mktemp("model")
    autoencoder = make_autoencoder()
    autoencoder.network.save_pretrained(folder / "autoencoder")
    denoiser = make_denoiser(autoencoder)
    denoiser.autoencoder["name"] = str(folder / "autoencoder")
    (folder / "model").mkdir()
    denoiser.save(folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def make_example() -> Callable[[str], Example]:
    def make(key: str) -> Example:
        random = np.random.default_rng(len(key) * sum(key.encode()))
        mask = np.zeros((FRAMES, SIZE, SIZE), np.uint8)
        mask[:, 4:12, 4:8] = 1
        latents = random.normal(size=(2, FRAMES, CHANNELS, 4, 4)).astype(np.float16)
        return Example(
            key=key,
            latents=latents[0],
            masked_latents=latents[1],
            mask=mask,
            record={"fill": [90, 100, 110]},
            pixels=random.integers(0, 256, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8),
        )

    return make


@pytest.fixture
def pipe(denoiser: Denoiser, autoencoder: Autoencoder) -> VideoInpaintPipeline:
    made = VideoInpaintPipeline.of(denoiser, autoencoder, "ddim:2")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def video() -> np.ndarray:
    """More frames than a window has, sides that fit nothing."""
    random = np.random.default_rng(0)
    return random.integers(0, 256, (5, 18, 22, 3), dtype=np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    """A box that moves, and a frame without a hole."""
    hole = np.zeros((5, 18, 22), bool)
    for frame in range(4):
        hole[frame, 4:12, 3 + frame : 11 + frame] = True
    return hole
