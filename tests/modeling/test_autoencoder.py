from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from vidfill.data.synth.raycast import render
from vidfill.data.synth.run import SynthConfig, scene_of
from vidfill.data.videos import read_video
from vidfill.errors import BadInput
from vidfill.modeling import autoencoder as module
from vidfill.modeling.autoencoder import (
    CONFIG,
    SHIPPED_WEIGHTS,
    WEIGHTS,
    load_autoencoder,
    to_frames,
    to_pixels,
)
from vidfill.modeling.settings import SHIPPED
from vidfill.progress import say_once
from vidfill.sampling.metrics.pixels import psnr

SHARED = Path(__file__).parents[3] / "shared"
TAESD = SHARED / "weights" / "taesd"
COLLISIONS = SHARED / "videos" / "collisions" / "val"


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory):
    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=3,
        scaling_factor=0.5,
    )
    return saved(network, tmp_path_factory.mktemp("autoencoder") / "kl")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    torch.manual_seed(0)
    network = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(0, 1),
        num_decoder_blocks=(1, 0),
        latent_channels=2,
        scaling_factor=3.0,
    )
    return saved(network, tmp_path_factory.mktemp("autoencoder") / "tiny")


def saved(network, folder):
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def broken(tiny_folder, tmp_path):
    return Path(shutil.copytree(tiny_folder, tmp_path / "broken"))


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@functools.cache
def synthetic_clips(size):
    config = SynthConfig(Path("unused"), frames=6)
    return [render(scene_of(config, number), size) for number in (10_000, 10_001, 10_002)]


def decibels(autoencoder, clip):
    decoded = autoencoder.decode(autoencoder.encode(to_pixels(clip[None])))
    return psnr(to_frames(decoded)[0], clip)


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_the_shipped_autoencoder_keeps_synthetic_clips_at_30_decibels(size):
    autoencoder = load_autoencoder(SHIPPED)
    assert np.mean([decibels(autoencoder, clip) for clip in synthetic_clips(size)]) >= 30


def test_the_shipped_autoencoder_keeps_a_masked_clip_at_30_decibels():
    clip = synthetic_clips(64)[0].copy()
    clip[:, 16:32, 32:64] = 130
    assert decibels(load_autoencoder(SHIPPED), clip) >= 30


def test_the_shipped_autoencoder_forgives_small_errors_of_the_latents():
    autoencoder, clip = load_autoencoder(SHIPPED), synthetic_clips(64)[0]
    latents = autoencoder.encode(to_pixels(clip[None]))
    decoded = autoencoder.decode(latents + 0.1 * noise(*latents.shape))
    assert psnr(to_frames(decoded)[0], clip) >= 30


def test_the_shipped_latents_have_unit_scale():
    clips = to_pixels(np.stack(synthetic_clips(64)))
    assert load_autoencoder(SHIPPED).encode(clips).std().item() == pytest.approx(1, abs=0.25)


def test_the_shipped_folder_has_a_card_and_at_most_four_megabytes():
    assert (SHIPPED_WEIGHTS / "collisions" / "README.md").is_file()
    assert (
        sum(file.stat().st_size for file in (SHIPPED_WEIGHTS / "collisions").iterdir()) <= 4_000_000
    )


def test_the_shipped_autoencoder_is_named_once_where_it_is_used(capsys):
    say_once.cache_clear()
    load_autoencoder(SHIPPED)
    load_autoencoder(SHIPPED)
    said = capsys.readouterr().err
    assert said.count("vidfill: using the package's own small autoencoder") == 1
    assert said.count("\n") == 1


def test_kl_latents_are_the_posterior_mean_times_the_scaling_factor(kl_folder):
    autoencoder, diffusers_own = (
        load_autoencoder(str(kl_folder)),
        AutoencoderKL.from_pretrained(kl_folder),
    )
    pixels = noise(2, 3, 3, 16, 24)
    latents = autoencoder.encode(pixels)
    with torch.no_grad():
        expected = diffusers_own.encode(pixels.flatten(0, 1)).latent_dist.mode() * 0.5
        decoded = diffusers_own.decode(expected / 0.5).sample.clamp(-1, 1)
    torch.testing.assert_close(latents.flatten(0, 1), expected)
    torch.testing.assert_close(autoencoder.decode(latents).flatten(0, 1), decoded)
    assert latents.shape == (2, 3, autoencoder.channels, 4, 6)
    assert autoencoder.downsampling == 4


def test_moments_are_those_of_the_scaled_latents_posterior(kl_folder):
    autoencoder = load_autoencoder(str(kl_folder))
    pixels = noise(2, 3, 3, 16, 16)
    mean, log_variance = autoencoder.encode_moments(pixels)
    assert torch.equal(mean, autoencoder.encode(pixels))
    network = AutoencoderKL.from_pretrained(kl_folder)
    with torch.no_grad():
        posterior = network.encode(pixels.flatten(0, 1)).latent_dist
    expected = (posterior.std * network.config.scaling_factor).unflatten(0, (2, 3))
    torch.testing.assert_close((0.5 * log_variance).exp(), expected)


def test_an_autoencoder_without_a_posterior_says_so(tiny_folder):
    with pytest.raises(BadInput, match="is an AutoencoderTiny, which has no posterior"):
        load_autoencoder(str(tiny_folder)).encode_moments(noise(1, 1, 3, 8, 8))


def test_the_frames_of_a_call_change_no_more_than_rounding(kl_folder):
    autoencoder = load_autoencoder(str(kl_folder))
    pixels = noise(1, 5, 3, 16, 16)
    torch.testing.assert_close(autoencoder.encode(pixels, 2), autoencoder.encode(pixels))


def test_a_shift_is_taken_off_before_scaling_and_put_back_before_decoding(kl_folder, tmp_path):
    plain = load_autoencoder(str(kl_folder))
    network = AutoencoderKL.from_pretrained(kl_folder)
    network.register_to_config(shift_factor=0.25)
    shifted = load_autoencoder(str(saved(network, tmp_path / "shifted")))
    pixels = noise(1, 1, 3, 16, 16)
    latents = plain.encode(pixels)
    torch.testing.assert_close(shifted.encode(pixels), latents - 0.25 * 0.5)
    torch.testing.assert_close(shifted.decode(shifted.encode(pixels)), plain.decode(latents))


def test_tiny_latents_are_the_networks_times_its_scaling_factor(tiny_folder):
    pixels = noise(1, 2, 3, 16, 16)
    with torch.no_grad():
        expected = AutoencoderTiny.from_pretrained(tiny_folder).encode(pixels[0]).latents * 3
    torch.testing.assert_close(load_autoencoder(str(tiny_folder)).encode(pixels)[0], expected)


@pytest.mark.parametrize("folder", ["kl_folder", "tiny_folder"])
def test_a_batch_is_coded_as_each_clip_alone(folder, request):
    autoencoder = load_autoencoder(str(request.getfixturevalue(folder)))
    pixels = noise(3, 2, 3, 16, 16)
    together, alone = autoencoder.encode(pixels), [autoencoder.encode(p[None]) for p in pixels]
    torch.testing.assert_close(together, torch.cat(alone))
    decoded = torch.cat([autoencoder.decode(latents) for latents in alone])
    torch.testing.assert_close(autoencoder.decode(together), decoded)


def test_how_many_frames_a_call_takes_changes_nothing(tiny_folder, monkeypatch):
    autoencoder, pixels = load_autoencoder(str(tiny_folder)), noise(2, 3, 3, 16, 16)
    latents = autoencoder.encode(pixels)
    monkeypatch.setattr(module, "PIXELS_PER_CALL", 2 * 16 * 16)
    torch.testing.assert_close(autoencoder.encode(pixels), latents)


@pytest.mark.parametrize("folder", ["kl_folder", "tiny_folder"])
def test_a_frame_is_coded_without_a_look_at_the_others(folder, request):
    autoencoder = load_autoencoder(str(request.getfixturevalue(folder)))
    pixels = noise(1, 3, 3, 16, 16)
    changed = pixels.clone()
    changed[:, 1] = -pixels[:, 1]
    latents, others = autoencoder.encode(pixels), autoencoder.encode(changed)
    assert torch.equal(latents[:, [0, 2]], others[:, [0, 2]])
    assert not torch.equal(latents[:, 1], others[:, 1])


def test_an_autoencoder_is_frozen_and_leaves_no_graph(tiny_folder):
    autoencoder = load_autoencoder(str(tiny_folder))
    assert not autoencoder.network.training
    assert not any(p.requires_grad for p in autoencoder.network.parameters())
    assert not autoencoder.encode(noise(1, 1, 3, 8, 8).requires_grad_()).requires_grad


def test_bfloat16_codes_nearly_as_float32():
    clip = synthetic_clips(64)[0]
    exact, rough = load_autoencoder(SHIPPED), load_autoencoder(SHIPPED, precision="bfloat16")
    latents = rough.encode(to_pixels(clip[None]))
    assert latents.dtype == torch.float32
    assert decibels(rough, clip) == pytest.approx(decibels(exact, clip), abs=0.5)


def test_the_identity_follows_the_weights_and_not_the_folder(tiny_folder, tmp_path):
    copy = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    before, same = load_autoencoder(str(tiny_folder)), load_autoencoder(str(copy))
    assert same.sha256 == before.sha256
    weights = load_file(copy / WEIGHTS)
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, copy / WEIGHTS, {"format": "pt"})
    assert load_autoencoder(str(copy)).sha256 != before.sha256


def test_the_identity_is_plain_json(tiny_folder):
    identity = load_autoencoder(str(tiny_folder)).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["kind"] == "AutoencoderTiny"
    assert (identity["channels"], identity["downsampling"]) == (2, 2)
    assert identity["scaling_factor"] == 3.0


def test_float16_weights_are_used_in_float32(tiny_folder, tmp_path):
    half = AutoencoderTiny.from_pretrained(tiny_folder).half()
    autoencoder = load_autoencoder(str(saved(half, tmp_path / "half")))
    assert autoencoder.encode(noise(1, 1, 3, 8, 8)).dtype == torch.float32


def test_frames_survive_the_way_to_pixels_and_back():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(to_frames(to_pixels(levels)), levels)
    assert to_pixels(levels).min() == -1
    assert to_pixels(levels).max() == 1


def refusal(name):
    with pytest.raises(BadInput) as caught:
        load_autoencoder(str(name))
    message = str(caught.value)
    assert "\n" not in message
    assert str(name) in message
    return message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "no such folder"),
        ("/no/where", "no such folder"),
        ("./no", "no such folder"),
        ("owner/..name", "not a name on the hub"),
        ("owner/no-such-autoencoder", "hub did not give it .* local folder, or `--autoencoder shi"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_with_the_remedy(name, said):
    assert re.search(said, refusal(name))


def test_a_hub_name_in_the_local_cache_opens_without_a_network(tiny_folder, tmp_path, monkeypatch):
    cached = tmp_path / "models--owner--tiny"
    shutil.copytree(tiny_folder, cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    autoencoder = load_autoencoder("owner/tiny")
    assert autoencoder.name == "owner/tiny"
    assert autoencoder.sha256 == load_autoencoder(str(tiny_folder)).sha256


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (CONFIG, None, "config.json: No such file"),
        (WEIGHTS, None, WEIGHTS),
        (CONFIG, "{", "Invalid JSON"),
        (CONFIG, "[]", "it is []: Input should be an object"),
        (CONFIG, "{}", "field _class_name is missing"),
        (CONFIG, '{"_class_name": "UNet2DModel"}', "'AutoencoderKL' or 'AutoencoderTiny'"),
        (CONFIG, '{"_class_name": "AutoencoderTiny", "latent_channels": 3}', "shape"),
        (CONFIG, '{"_class_name": "AutoencoderTiny", "latent_channels": "x"}', ""),
        (WEIGHTS, "not weights", ""),
    ],
)
def test_a_folder_with_a_bad_file_is_refused(broken, file, content, said):
    (broken / file).unlink()
    if content is not None:
        (broken / file).write_text(content)
    assert said in refusal(broken)


def test_cut_off_weights_are_refused(broken):
    content = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(content[: len(content) // 2])
    refusal(broken)


def test_weights_that_lack_a_tensor_are_refused(broken):
    weights = load_file(broken / WEIGHTS)
    weights.pop("encoder.layers.0.bias")
    save_file(weights, broken / WEIGHTS, {"format": "pt"})
    assert "lacks 1 tensors (encoder.layers.0.bias)" in refusal(broken)


def test_frames_that_no_latents_cover_are_refused(kl_folder):
    with pytest.raises(BadInput, match=r"18x16 do not fit .* multiples of 4"):
        load_autoencoder(str(kl_folder)).encode(noise(1, 1, 3, 16, 18))


@pytest.mark.skipif(not TAESD.is_dir(), reason=f"needs {TAESD}")
def test_a_published_autoencoder_keeps_rendered_clips_at_30_decibels():
    frames, _ = read_video(COLLISIONS / sorted(p.name for p in COLLISIONS.iterdir())[0])
    assert decibels(load_autoencoder(str(TAESD)), frames[:4]) >= 30
