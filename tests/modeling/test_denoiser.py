"""A denoiser: what its network sees and predicts, its loss, and the folder that it is kept in."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import SHIPPED_WEIGHTS
from vidfill.modeling.denoiser import Denoiser, LatentSpace, parse_record
from vidfill.modeling.diffusion import add_noise, ddim_step, ddpm_step, expand, target_of, to_flow
from vidfill.modeling.noise import alpha_bars, flow_times, min_snr_weight
from vidfill.modeling.settings import DiffusionConfig, LossConfig
from vidfill.modeling.unet import VideoUNet

EVERY = torch.arange(1000)
CONFIG = DiffusionConfig()
ZERO_SNR = DiffusionConfig(zero_terminal_snr=True, target="v")
FLOW = DiffusionConfig(process="flow", target="flow")
CONFIGS = {
    "linear": CONFIG,
    "scaled linear": DiffusionConfig(beta_schedule="scaled_linear", target="clean"),
    "cosine": DiffusionConfig(beta_schedule="cosine", target="v"),
    "ddpm's flow": DiffusionConfig(target="flow"),
    "zero SNR": ZERO_SNR,
    "zero SNR, clean": DiffusionConfig(zero_terminal_snr=True, target="clean"),
    "zero SNR, flow": DiffusionConfig(zero_terminal_snr=True, target="flow"),
    "flow": FLOW,
    "flow, shifted": DiffusionConfig(process="flow", target="flow", shift=3.0),
    "flow, v": DiffusionConfig(process="flow", target="v"),
    "flow, clean": DiffusionConfig(process="flow", target="clean"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
IDENTITY = {
    "name": "x",
    "sha256": "0123",
    "kind": "AutoencoderTiny",
    "scaling_factor": 1.0,
    "downsampling": 8,
    "channels": 4,
}


def small_denoiser(**changes: Any) -> Denoiser:
    torch.manual_seed(0)
    config = DiffusionConfig(**changes)
    network = VideoUNet(
        block_out_channels=(16, 16),
        head_channels=8,
        norm_groups=8,
        condition_channels=5 if config.mask_channel else 4,
    )
    space = LatentSpace([3, 4, 4, 4], [0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 0.5, 3.0], IDENTITY)
    return Denoiser(network, config, space)


def random_pair(batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, batch, 3, 4, 5, 6), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flows_network_sees_the_noised_latents_of_diffusers(shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    clean, noise = random_pair(batch=1000)
    denoiser = small_denoiser(process="flow", target="flow", shift=shift)
    seen, target = denoiser.training_pair(clean, noise, EVERY)
    expected = theirs.scale_noise(clean, theirs.timesteps.flip(0), noise)
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target, noise - clean)


def test_each_frame_may_have_a_level_of_its_own() -> None:
    clean, noise = random_pair()
    denoiser = small_denoiser(process="flow", target="v")
    timestep = torch.tensor([[3, 500, 999], [0, 1, 2]])
    seen, target = denoiser.training_pair(clean, noise, timestep)
    for frame in range(3):
        alone = denoiser.training_pair(clean[:, [frame]], noise[:, [frame]], timestep[:, frame])
        torch.testing.assert_close((seen[:, [frame]], target[:, [frame]]), alone)


def test_normalising_is_undone_by_denormalising() -> None:
    latents, _ = random_pair()
    denoiser = small_denoiser()
    normalised = denoiser.normalise(latents)
    assert not torch.equal(normalised, latents)
    torch.testing.assert_close(denoiser.denormalise(normalised), latents)
    plain = small_denoiser(normalise=False)
    assert torch.equal(plain.normalise(latents), latents)
    unscaled = small_denoiser(normalise=False, ablate_scale=4.0)
    assert torch.equal(unscaled.normalise(latents), 4 * latents)
    assert torch.equal(unscaled.denormalise(4 * latents), latents)


def test_the_mask_is_a_channel_of_the_condition_only_where_asked() -> None:
    masked = torch.zeros(1, 2, 4, 3, 3)
    hole = torch.ones(1, 2, 1, 3, 3)
    assert small_denoiser().condition(masked, hole).shape[2] == 4
    with_mask = small_denoiser(mask_channel=True).condition(masked, hole)
    assert torch.equal(with_mask[:, :, 4:], hole)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target": "v", "zero_terminal_snr": True, "beta_schedule": "cosine"},
        {"process": "flow", "target": "flow", "shift": 2.0},
    ],
)
def test_saved_denoiser_equals_loaded(changes: dict, tmp_path) -> None:
    denoiser = small_denoiser(mask_channel=True, **changes)
    torch.nn.init.normal_(denoiser.network.conv_out.weight)
    denoiser.save(tmp_path / "model")
    loaded = Denoiser.load(tmp_path / "model")
    latents = torch.randn(2, 3, 4, 4, 4)
    condition = torch.randn(2, 3, 5, 4, 4)
    timestep = torch.tensor([999, 3])
    with torch.no_grad():
        expected = denoiser.denoise(latents, timestep, condition)
        assert torch.equal(loaded.denoise(latents, timestep, condition), expected)
    assert loaded.autoencoder == denoiser.autoencoder
    assert loaded.config == denoiser.config


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path) -> None:
    with pytest.raises(BadInput, match="holds no model"):
        Denoiser.load(tmp_path)


# Training and denoising


@every_config
def test_what_the_network_sees_and_should_predict_gives_back_the_clean_latents(
    config: DiffusionConfig,
) -> None:
    clean, noise = random_pair(batch=1000)
    denoiser = Denoiser(small_denoiser().network, config, LatentSpace([], [], [], {}))
    seen, target = denoiser.training_pair(clean, noise, EVERY)
    denoiser.network = lambda latents, timestep, condition: target  # type: ignore[assignment]
    ab = expand(denoiser.alpha_bar(EVERY))
    noisy = add_noise(clean, noise, ab)
    torch.testing.assert_close(denoiser.denoise(noisy, EVERY, clean), clean)
    torch.testing.assert_close(seen, to_flow(noisy, ab) if config.process == "flow" else noisy)


def test_a_pair_in_float32_has_no_more_than_its_own_rounding() -> None:
    clean, noise = random_pair(batch=1000)
    denoiser = small_denoiser(process="flow", target="v")
    exact = denoiser.training_pair(clean.float().double(), noise.float().double(), EVERY)
    for ours, theirs in zip(
        denoiser.training_pair(clean.float(), noise.float(), EVERY), exact, strict=True
    ):
        assert torch.equal(ours, theirs.float())


def test_the_plain_loss_is_the_mean_squared_error() -> None:
    target, prediction = random_pair().float()
    ours = small_denoiser().loss(
        prediction.bfloat16(), target, torch.tensor([1, 7]), torch.ones(2, 3, 1, 5, 6), LossConfig()
    )
    expected = (prediction.bfloat16().float() - target).square().mean(dim=(1, 2, 3, 4))
    assert torch.equal(ours, expected)


def test_a_weighted_loss_is_the_product_of_its_weights() -> None:
    target, prediction = random_pair()
    hole = torch.zeros(2, 3, 1, 5, 6)
    hole[:, :, :, :2] = 1
    config = LossConfig(weighting="min_snr", gamma=3.0, hole=4.0)
    timestep = torch.tensor([3, 900])
    ours = small_denoiser(target="v").loss(prediction, target, timestep, hole, config)
    errors = (prediction - target).square()
    inside, outside = (
        each.mean(dim=(1, 2, 3, 4)) for each in (errors[..., :2, :], errors[..., 2:, :])
    )
    of_level = min_snr_weight("v", alpha_bars(CONFIG)[timestep], 3.0)
    expected = of_level * (4 * 2 * inside + 3 * outside) / (4 * 2 + 3)
    torch.testing.assert_close(ours, expected)


# A Gaussian: every value of the data is N(MEAN, STD²), so the best prediction is known.

MEAN, STD = 0.7, 0.5


class GaussianNetwork(VideoUNet):
    """Predicts E[target | what it sees], which is a · x_0 + s · ε in the process's own scales."""

    process: DiffusionConfig

    def forward(self, latents: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        ab = expand(alpha_bars(self.process)[timestep])
        signal, spread = ab.sqrt(), (1 - ab).sqrt()
        if self.process.process == "flow":
            time = expand(flow_times(self.process.timesteps, self.process.shift)[timestep])
            signal, spread = 1 - time, time
        surprise = (latents - signal * MEAN) / (signal**2 * STD**2 + spread**2)
        clean, noise = MEAN + signal * STD**2 * surprise, spread * surprise
        return target_of(self.process.target, clean, noise, ab)


def gaussian_denoiser(config: DiffusionConfig) -> Denoiser:
    network = GaussianNetwork(block_out_channels=(16,), head_channels=8, norm_groups=8)
    network.process = config
    return Denoiser(network, config, LatentSpace([], [], [], {}))


@every_config
def test_denoising_a_gaussian_gives_its_posterior_mean(config: DiffusionConfig) -> None:
    denoiser = gaussian_denoiser(config)
    noisy, _ = random_pair(batch=1000)
    ab = expand(denoiser.alpha_bar(EVERY))
    gain = ab.sqrt() * STD**2 / (ab * STD**2 + 1 - ab)
    expected = MEAN + gain * (noisy - ab.sqrt() * MEAN)
    torch.testing.assert_close(denoiser.denoise(noisy, EVERY, noisy), expected)


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        *((name, "ddim") for name in ("linear", "zero SNR", "flow, shifted")),
        *((name, "fixed_large") for name in ("linear", "flow")),
        *((name, "fixed_small") for name in ("zero SNR", "flow")),
    ],
)
def test_sampling_a_gaussian_with_its_exact_denoiser_gives_the_gaussian(
    name: str, solver: str
) -> None:
    denoiser = gaussian_denoiser(dataclasses.replace(CONFIGS[name], timesteps=400))
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, 4, 50, 50)
    # From the noised data, since DDPM's last level is not quite pure noise.
    data, noise = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    latents = add_noise(MEAN + STD * data, noise, alpha_bars(denoiser.config)[-1])
    for level in range(399, -1, -1):
        timestep = torch.tensor([level])
        here, below = (expand(denoiser.alpha_bar(at)) for at in (timestep, timestep - 1))
        clean = denoiser.denoise(latents, timestep, latents)
        if solver == "ddim":
            latents = ddim_step(latents, clean, here, below)
        else:
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            latents = ddpm_step(latents, clean, here, below, noise, solver)  # type: ignore[arg-type]
    count = latents.numel()
    assert abs(latents.mean() - MEAN) < 4 * STD / math.sqrt(count)
    # Steps of a finite size keep the deviation to about a percent.
    assert abs(latents.std() / STD - 1) < 4 / math.sqrt(2 * count) + 0.01


# Models kept


def test_a_record_without_later_fields_loads_with_their_defaults(tmp_path) -> None:
    small_denoiser().save(tmp_path)
    record = json.loads((tmp_path / "denoiser.json").read_text())
    earlier = {"timesteps", "beta_start", "beta_end", "target", "normalise", "mask_channel"}
    record["diffusion"] = {name: record["diffusion"][name] for name in earlier}
    record["diffusion"] |= {"beta_start": 1e-4, "beta_end": 0.02}
    (tmp_path / "denoiser.json").write_text(json.dumps(record))
    loaded = Denoiser.load(tmp_path)
    assert torch.equal(loaded.alpha_bar(EVERY), alpha_bars(CONFIG))


def test_a_record_of_an_impossible_process_is_refused_with_its_folder(tmp_path) -> None:
    small_denoiser().save(tmp_path)
    path = tmp_path / "denoiser.json"
    path.write_text(path.read_text().replace('"process": "ddpm"', '"process": "flow"'))
    with pytest.raises(
        BadInput, match=r"is damaged: denoiser.json: diffusion.target is 'noise': a flow"
    ):
        Denoiser.load(tmp_path)


def test_a_denoiser_of_an_impossible_process_is_refused() -> None:
    with pytest.raises(BadInput, match=r"diffusion\.target is 'noise'"):
        small_denoiser(process="flow")


SHIPPED_RECORD = json.loads((SHIPPED_WEIGHTS / "inpaint" / "model_index.json").read_text())
FIELDS = [(part, name) for part in ("diffusion", "latents") for name in SHIPPED_RECORD[part]]
IDENTITY_FIELDS = [("latents", "autoencoder", name) for name in IDENTITY]
JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
JSON |= st.lists(JSON, max_size=2) | st.dictionaries(st.text(max_size=3), JSON, max_size=2)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("diffusion",), None, "diffusion is None: Input should be an object"),
        (("diffusion", "timesteps"), 1000.0, "diffusion.timesteps is 1000.0: .* valid integer"),
        (("diffusion", "timesteps"), 0, "diffusion.timesteps is 0: .* greater than or equal to 1"),
        (("diffusion", "target"), "velocity", "diffusion.target is 'velocity': .*'v', 'clean' or"),
        (("diffusion", "process"), "edm", "diffusion.process is 'edm': .*'ddpm' or 'flow'"),
        (("diffusion", "unheard"), 1, "field diffusion.unheard is unknown"),
        (("latents", "shape"), [20, 4, 16], "latents.shape is .*: .* at least 4 items"),
        (("latents", "shape"), [20, 4, 16, 0], "latents.shape.3 is 0: .* equal to 1"),
        (("latents", "std"), [1.0, 1.0, 1.0], "latents.std has 3 values, latents.shape 4 channels"),
        (("latents", "std"), [1.0, 1.0, 0.0, 1.0], "latents.std.2 is 0.0: .* greater than 0"),
        (("latents", "mean"), [1.0, math.inf, 0.0, 1.0], "latents.mean.1 is inf: .* less than inf"),
        (("latents", "autoencoder"), [], "latents.autoencoder is .*: Input should be an object"),
        (("latents", "autoencoder", "sha256"), 12, "latents.autoencoder.sha256 is 12: .* string"),
    ],
)
def test_a_record_that_was_altered_is_refused_by_field_and_value(
    place: tuple[str, ...], value: object, said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        parse_record(altered(place, value))


def altered(place: tuple[str, ...], *value: object) -> str:
    """The package's own record with another value in one place, or with none."""
    record = json.loads(json.dumps(SHIPPED_RECORD))
    *path, last = place
    inner = record
    for name in path:
        inner = inner[name]
    inner.pop(last, None)
    if value:
        inner[last] = value[0]
    return json.dumps(record)


@settings(max_examples=20)
@given(place=st.sampled_from(FIELDS + IDENTITY_FIELDS), value=JSON)
def test_whatever_a_record_says_it_is_read_or_refused_in_one_line(
    place: tuple[str, ...], value: object
) -> None:
    for text in (altered(place, value), altered(place)):
        try:
            record = parse_record(text)
        except BadInput as refusal:
            assert "\n" not in str(refusal) and len(str(refusal)) < 300
        else:
            assert type(record.latents.shape[0]) is int and len(record.latents.shape) == 4
            assert all(
                type(value) is float for value in (*record.latents.mean, record.diffusion.shift)
            )


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    end=st.floats(0, 1, exclude_max=True),
    file=st.sampled_from(["denoiser.json", "unet/config.json"]),
)
def test_a_file_that_was_cut_is_refused_with_its_folder(tmp_path, end: float, file: str) -> None:
    small_denoiser().save(tmp_path)
    text = (tmp_path / file).read_text().rstrip()  # without its last newline it would be whole
    (tmp_path / file).write_text(text[: int(len(text) * end)])
    with pytest.raises(BadInput, match=f"the model in {tmp_path} is damaged: ") as refusal:
        Denoiser.load(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("option", ["block_out_channels", "norm_groups", "layers_per_block"])
@pytest.mark.parametrize("value", [None, 0, "x", [], [3], {}])
def test_a_network_that_cannot_be_is_refused_with_its_folder(
    tmp_path, option: str, value: object
) -> None:
    small_denoiser().save(tmp_path)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    with pytest.raises(BadInput, match=f"the model in {tmp_path}") as refusal:
        Denoiser.load(tmp_path)
    assert "\n" not in str(refusal.value)
