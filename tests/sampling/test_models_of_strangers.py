"""A model's folder from elsewhere: nothing is run, no hub is asked, one line says why."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vidfill.errors import BadInput, describe
from vidfill.modeling.autoencoder import SHIPPED_WEIGHTS, load_autoencoder
from vidfill.modeling.denoiser import Denoiser
from vidfill.sampling.pipeline import VideoInpaintPipeline

WEIGHTS, INDEX = "diffusion_pytorch_model.safetensors", "model_index.json"
LOADERS: dict[str, Callable[[Path], object]] = {
    "inpaint": Denoiser.load,
    "pipeline": lambda folder: VideoInpaintPipeline.from_pretrained(str(folder)),
}
loaded_by = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def connect(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return Path(shutil.copytree(SHIPPED_WEIGHTS / "inpaint", tmp_path / "model"))


def with_field(file: Path, name: str, value: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))


def refusal(load: Callable[[Path], object], folder: Path) -> str:
    with pytest.raises(BadInput) as raised:
        load(folder)
    assert "\n" not in describe(raised.value)
    return describe(raised.value)


@loaded_by
def test_weights_in_a_pickle_are_refused_however_benign(load, model: Path) -> None:
    weights = model / "unet" / WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert WEIGHTS in refusal(load, model)


def test_an_autoencoders_pickle_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SHIPPED_WEIGHTS / "collisions", tmp_path / "vae"))
    weights = folder / WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert WEIGHTS in refusal(lambda vae: load_autoencoder(str(vae)), folder)


@loaded_by
def test_a_model_without_its_network_is_damaged(load, model: Path) -> None:
    shutil.rmtree(model / "unet")
    assert "config.json" in refusal(load, model)


@loaded_by
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unet", ["os", "system"]),
        ("unet", [None, None]),
        ("unet", 5),
        ("vae", ["os", "system"]),
        ("vae", [1, 2]),
        ("schedule", None),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("quantization_config", 1),
        ("latents", {}),
        ("diffusion", {"timesteps": 2**63}),
    ],
)
def test_an_index_that_names_other_parts_is_refused(load, model: Path, name: str, value) -> None:
    with_field(model / INDEX, name, value)
    assert f"{INDEX}: " in (said := refusal(load, model))
    assert name in said


@loaded_by
@pytest.mark.parametrize("content", ["", "[]", "null", "[" * 100_000, "{" + '"a":{' * 5_000])
def test_an_index_that_is_no_record_is_refused(load, model: Path, content: str) -> None:
    (model / INDEX).write_text(content)
    refusal(load, model)


@loaded_by
@pytest.mark.parametrize("value", [{"quant_method": "bitsandbytes"}, {}, 1, "x"])
def test_quantised_weights_are_refused(load, model: Path, value) -> None:
    with_field(model / "unet" / "config.json", "quantization_config", value)
    assert "quantization_config" in refusal(load, model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scaling_factor", 0),
        ("scaling_factor", float("nan")),
        ("scaling_factor", None),
        ("shift_factor", float("inf")),
        ("latent_channels", 2**63),
        ("block_out_channels", []),
        ("encoder_block_out_channels", [2**63]),
        ("quantization_config", {}),
    ],
)
def test_an_autoencoder_that_cannot_be_is_refused(tmp_path: Path, name: str, value) -> None:
    folder = Path(shutil.copytree(SHIPPED_WEIGHTS / "collisions", tmp_path / "vae"))
    with_field(folder / "config.json", name, value)
    refusal(lambda vae: load_autoencoder(str(vae)), folder)


def test_an_autoencoder_that_gives_nan_ends_the_job(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SHIPPED_WEIGHTS / "collisions", tmp_path / "vae"))
    weights = load_file(folder / WEIGHTS)
    for name in ("encoder.layers.0.bias", "decoder.layers.0.bias"):
        weights[name][0] = float("nan")
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    autoencoder = load_autoencoder(str(folder))
    refusal(lambda _: autoencoder.encode(torch.zeros(1, 1, 3, 16, 16)), folder)
    refusal(lambda _: autoencoder.decode(torch.zeros(1, 1, 4, 2, 2)), folder)
