from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from vidfill.data.encode.run import encode
from vidfill.data.encode.settings import EncodeConfig
from vidfill.data.shards.format import Example
from vidfill.data.storage.names import shard_name
from vidfill.data.verify.run import verify
from vidfill.data.verify.settings import VerifyConfig
from vidfill.modeling.autoencoder import Autoencoder
from vidfill.modeling.denoiser import Denoiser, LatentSpace
from vidfill.modeling.settings import DiffusionConfig
from vidfill.modeling.unet import VideoUNet
from vidfill.sampling.inpaint.run import inpaint
from vidfill.sampling.inpaint.settings import InpaintConfig
from vidfill.sampling.pipeline import VideoInpaintPipeline
from vidfill.sampling.sweep.run import sweep
from vidfill.sampling.sweep.settings import SweepConfig
from vidfill.train.autoencoder import AutoencoderTraining, train_autoencoder

FRAMES, SIZE, CHANNELS = 3, 16, 4  # of the smallest clips; their latents are 4x4
JOB_FRAMES = 6  # of the videos of `jobs`


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


def write_images(folder: Path, seed: int, mode: str) -> None:
    folder.mkdir(parents=True)
    shape = (JOB_FRAMES, SIZE, SIZE, 3) if mode == "RGB" else (JOB_FRAMES, SIZE, SIZE)
    values = np.random.default_rng(seed).integers(0, 2, shape, dtype=np.uint8) * np.uint8(255)
    for index, frame in enumerate(values):
        Image.fromarray(frame).save(folder / f"{index}.bmp")


def write_raw(path: Path, seed: int) -> None:
    """A video whose last byte is a sample."""
    header = f"YUV4MPEG2 W{SIZE} H{SIZE} F25:1 Ip A1:1 C444\n".encode()
    values = np.random.default_rng(seed).integers(16, 236, (JOB_FRAMES, 3 * SIZE * SIZE), np.uint8)
    path.write_bytes(header + b"".join(b"FRAME\n" + frame.tobytes() for frame in values))


class Jobs:
    """Each of the jobs as it was begun, in one folder with what it stands on."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        shutil.copytree(model.parent, root / "kept")
        self.model, vae = root / "kept" / model.name, str(root / "kept" / "autoencoder")
        record = self.model / "denoiser.json"
        fields = json.loads(record.read_text())
        fields["latents"]["autoencoder"]["name"] = vae
        record.write_text(json.dumps(fields))
        videos, masks = root / "videos", root / "masks"
        for number, name in enumerate(("b", "c")):
            write_images(videos / name, number, "RGB")
            write_images(masks / name, number + 5, "L")
        write_raw(videos / "a.y4m", 9)
        shutil.copy(masks / "b" / "0.bmp", masks / "a.bmp")
        encoding = EncodeConfig(
            *(videos, root / "shards", vae),
            frames=3,
            masks="own",
            mask_files=masks,
            pixels="all",
            device="cpu",
        )
        sweeping = SweepConfig(
            *(self.model, str(encoding.out), root / "sweep", "ddim:1 ddim:2"),
            examples=2,
            split="train",
            batch_size=1,
            keep=1,
            device="cpu",
        )
        filling = InpaintConfig(
            *(videos / "b", str(masks / "b"), root / "frames", self.model, "ddim:1"),
            device="cpu",
        )
        raw = dataclasses.replace(
            filling, video=videos / "a.y4m", mask=str(masks / "a.bmp"), out=root / "filled.mkv"
        )
        recipe = AutoencoderTraining(
            *(videos, root / "trained", (16,), 2, 4, 8, (0, 1, 1, 1), (1, 1, 1, 0)),
            steps=1,
            batch=2,
            device="cpu",
        )
        checked = dataclasses.replace(encoding, out=root / "checked")
        encode(checked)
        self.sweeping = sweeping
        self.encoding = dataclasses.replace(encoding, out=root / "anew")
        self.filling = dataclasses.replace(raw, out=root / "anew.mkv")
        self.run: dict[str, Callable[[], Any]] = {
            "encode": lambda: encode(encoding),
            "encode without a manifest": lambda: self.encode_again(encoding),
            "encode in checked": lambda: encode(checked),
            "verify": lambda: self.repair(checked.out),
            "sweep": lambda: sweep(sweeping),
            "inpaint": lambda: inpaint(filling),
            "inpaint a file": lambda: inpaint(raw),
            "train.autoencoder": lambda: train_autoencoder(recipe),
        }

    def encode_again(self, config: EncodeConfig) -> None:
        """The manifest would tell another autoencoder by itself."""
        manifest = config.out / "train" / "manifest.json"
        content = manifest.read_bytes()
        manifest.unlink()
        try:
            encode(config)
        finally:
            manifest.write_bytes(content)

    def repair(self, shards: Path) -> None:
        (shards / "train" / shard_name(0)).unlink(missing_ok=True)
        verify(VerifyConfig(str(shards), repair=True, samples=0, device="cpu"))

    def again(self, name: str) -> None:
        """Begin a job, if it was not yet, or go on with it; inpainting stops before its end."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vidfill.sampling.inpaint.run.write_all", stop)
            with contextlib.suppress(Stopped):
                self.run[name]()


class Stopped(Exception):
    pass


def stop(*_: object) -> None:
    raise Stopped


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory, model_on_disk: Path) -> Jobs:
    """All of them, begun."""
    made = Jobs(tmp_path_factory.mktemp("changed"), model_on_disk)
    for name in made.run:
        made.again(name)
    return made


@pytest.fixture(scope="session")
def words_of(
    tmp_path_factory: pytest.TempPathFactory, model_on_disk: Path
) -> Callable[[str, int, Path], list[str]]:
    """What follows the verb of a small job of a kind, by its seed and output."""
    root = tmp_path_factory.mktemp("small")
    videos, shards, vae = root / "videos", root / "shards", model_on_disk.parent / "autoencoder"
    for name in "ab":
        write_images(videos / name, ord(name), "RGB")
    encode(EncodeConfig(videos, shards, str(vae), frames=3, pixels="all", device="cpu"))

    def words(kind: str, seed: int, out: Path) -> list[str]:
        every = {
            "synth": f"{out} --clips 2 --validation 1 --size 16 --frames 3",
            "encode": f"{videos} {out} --autoencoder {vae} --frames 3 --pixels all "
            "--shard_megabytes 0.03 --device cpu",
            "inpaint": f"{videos}/a --mask 4,4,8,8 --out {out} --model {model_on_disk} "
            "--schedule ddim:2 --device cpu",
            "sweep": f"{model_on_disk} {shards} {out} --schedules ddim:1 --examples 2 "
            "--split train --batch_size 1 --device cpu",
            "train": f"{shards} {out} --steps 4 --batch_size 2 --checkpoint_every 2 "
            "--model.block_out_channels [8,16] --model.head_channels 8 --model.norm_groups 4 "
            "--evaluation.every 0 --preview.every 0",
            "verify": f"{shards} --samples 1 --device cpu",
            "recipe": f"{videos} {out} --sizes [16] --frames_per_video 2 --width 8 --steps 3 "
            "--encoder_blocks [0,1,1,1] --decoder_blocks [1,1,1,0] --batch 2 --device cpu",
        }
        seeded = [] if kind == "verify" else ["--seed", str(seed)]
        return [*every[kind].split(), *seeded]

    return words
