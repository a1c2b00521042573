from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from vidfill.data.masks import fill_hole
from vidfill.data.videos import Frames, FrameSize, Masks
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import Autoencoder, latent_mask, to_frames, to_pixels
from vidfill.modeling.denoiser import Denoiser
from vidfill.sampling.inpaint.blending import feather, match_colour, measure_border
from vidfill.sampling.inpaint.boxes import Box, choose_box, choose_size
from vidfill.sampling.inpaint.windows import (
    FilledWindow,
    FillSettings,
    fill_windows,
    hide,
    plan_boxes,
)
from vidfill.sampling.metrics.pixels import composite
from vidfill.sampling.sampler import Known, Request, sample
from vidfill.sampling.schedules.language import parse
from vidfill.sampling.schedules.program import compile_schedule

SCHEDULE = "ddpm:2+resample(n=1)+inject"
LENGTH = 8  # frames of a window


@pytest.fixture
def denoiser(denoiser: Denoiser) -> Denoiser:
    """The tiny one, as if trained on clips of 8 frames of 16×16."""
    space = dataclasses.replace(denoiser.space, shape=[LENGTH, *denoiser.space.shape[1:]])
    return Denoiser(denoiser.network, denoiser.config, space)


def make_settings(denoiser: Denoiser, autoencoder: Autoencoder, **settings: object) -> FillSettings:
    program = compile_schedule(parse(SCHEDULE), denoiser.timesteps)
    return FillSettings(denoiser, autoencoder, program, **settings)  # type: ignore[arg-type]


def make_video(frames: int, height: int = 16, width: int = 16) -> tuple[Frames, Masks]:
    """Noise under a hole that moves."""
    random = np.random.default_rng(frames)
    video = random.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    mask = np.zeros(video.shape[:3], np.uint8)
    for t in range(frames):
        mask[t, 4:10, 2 + t % 4 : 8 + t % 4] = 1
    return video, mask


def run(
    video: Frames, mask: Masks, denoiser: Denoiser, autoencoder: Autoencoder, **settings: object
) -> Frames:
    settings = make_settings(denoiser, autoencoder, **settings)
    windows = fill_windows(zip(video, mask, strict=True), settings)
    return np.stack([frame for window in windows for frame in window.frames[0]])


def plain(video: Frames, mask: Masks, denoiser: Denoiser, autoencoder: Autoencoder) -> Frames:
    """The sampler alone, on a clip of its own length and size."""
    masked_latents = autoencoder.encode(to_pixels(fill_hole(video, mask))[None])
    hole = latent_mask(mask, *masked_latents.shape[-2:])[None]
    request = Request(
        "0",
        SCHEDULE,
        compile_schedule(parse(SCHEDULE), denoiser.timesteps),
        lambda: denoiser.condition(masked_latents, hole)[0],
        lambda: Known(denoiser.normalise(masked_latents)[0], hole[0]),
        range(len(video)),
    )
    [result] = sample(denoiser, [request], capacity=1, seed=3)
    return composite(video, to_frames(autoencoder.decode(result.latents[None])[0]), mask)


def test_one_window_is_what_the_plain_sampler_gives(
    denoiser: Denoiser, autoencoder: Autoencoder
) -> None:
    video, mask = make_video(LENGTH)
    ours = run(video, mask, denoiser, autoencoder, seed=3, feather=0, colour_match=False)
    np.testing.assert_array_equal(ours, plain(video, mask, denoiser, autoencoder))


def test_a_frames_noise_is_that_of_its_seed_number_and_draw(denoiser: Denoiser) -> None:
    # With a clean estimate that is zero everywhere, a step of ddim leaves the noise, shrunk.
    with torch.no_grad():
        for weight in denoiser.network.parameters():
            weight.zero_()
    states = {}

    class Watched(Denoiser):
        def denoise(
            self, latents: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor
        ) -> torch.Tensor:
            states[len(states)] = latents.clone()
            return torch.zeros_like(latents)

    watched = Watched(denoiser.network, denoiser.config, denoiser.space)
    program = compile_schedule(parse("ddpm:2"), watched.timesteps)
    condition = torch.zeros(LENGTH, 5, 4, 4)
    for first, seed in ((0, 1), (3, 1), (3, 2)):
        request = Request("0", "", program, lambda: condition, frames=range(first, first + LENGTH))
        assert len(list(sample(watched, [request], capacity=1, seed=seed))) == 1
    for draw in (0, 1):
        here, later, other_seed = (states[2 * run + draw][0] for run in range(3))
        torch.testing.assert_close(here[3:], later[:-3], rtol=0, atol=0)
        assert not torch.isclose(later, other_seed).all(dim=(1, 2, 3)).any()
        assert len({tuple(frame.flatten().tolist()) for frame in here}) == LENGTH
    assert not torch.isclose(states[0], states[1]).any(dim=-1).all()


@pytest.mark.parametrize(("frames", "overlap"), [(1, 2), (7, 2), (8, 0), (9, 4), (19, 2), (21, 0)])
def test_every_frame_comes_once_and_is_untouched_outside_its_hole(
    denoiser: Denoiser, autoencoder: Autoencoder, frames: int, overlap: int
) -> None:
    video, mask = make_video(frames, 18, 23)
    mask[frames // 2] = 0
    ours = run(video, mask, denoiser, autoencoder, overlap=overlap)
    assert ours.shape == video.shape
    np.testing.assert_array_equal(ours[mask == 0], video[mask == 0])
    holed = mask.any(axis=(1, 2))
    changed = (ours != video).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(changed, holed)


def test_what_is_hidden_does_not_matter(denoiser: Denoiser, autoencoder: Autoencoder) -> None:
    # Larger than the network's clips, so that frames are scaled.
    video, mask = make_video(11, 40, 50)
    mask[:, 5:30, 10:45] = 1
    other = np.where(mask[..., None] == 1, 255 - video, video)
    ours = run(video, mask, denoiser, autoencoder)
    np.testing.assert_array_equal(ours, run(other, mask, denoiser, autoencoder))


def test_finished_frames_are_seen_by_the_next_window(
    denoiser: Denoiser, autoencoder: Autoencoder
) -> None:
    video, mask = make_video(2 * LENGTH - 2)
    other = np.where(mask[..., None] == 1, 255 - video, video)

    def continued(finished: Frames) -> Frames:
        settings = make_settings(denoiser, autoencoder)
        before = FilledWindow(0, [list(finished[:LENGTH])], list(mask[:LENGTH]), [], None)
        rest = zip(video[LENGTH:], mask[LENGTH:], strict=True)
        [window] = fill_windows(rest, settings, before)
        return np.stack(window.frames[0])

    assert (continued(video) != continued(other)).any()


def test_windows_without_a_hole_run_no_network(
    denoiser: Denoiser, autoencoder: Autoencoder
) -> None:
    video, mask = make_video(20)
    counted: list[int] = []
    empty = run(video, mask * 0, denoiser, autoencoder, on_evaluations=counted.append)
    np.testing.assert_array_equal(empty, video)
    assert not counted
    assert not any(plan_boxes(mask * 0, make_settings(denoiser, autoencoder)))
    # Windows begin at 0, 6 and 12; the new frames of the second are 8 to 13.
    mask[:8], mask[14:] = 0, 0
    run(video, mask, denoiser, autoencoder, on_evaluations=counted.append)
    assert sum(counted) == compile_schedule(parse(SCHEDULE), denoiser.timesteps).nfe
    planned = list(plan_boxes(mask, make_settings(denoiser, autoencoder)))
    assert [bool(box) for box in planned] == [False, True, False]


def test_a_mask_that_hides_everything_is_filled(
    denoiser: Denoiser, autoencoder: Autoencoder
) -> None:
    video, mask = make_video(11, 24, 20)
    ours = run(video, mask * 0 + 1, denoiser, autoencoder)
    other = run(255 - video, mask * 0 + 1, denoiser, autoencoder)
    np.testing.assert_array_equal(ours, other)


@pytest.mark.slow
def test_samples_are_the_same_together_and_alone_and_differ(
    denoiser: Denoiser, autoencoder: Autoencoder
) -> None:
    video, mask = make_video(11)
    settings = make_settings(denoiser, autoencoder, samples=(0, 1))
    windows = list(fill_windows(zip(video, mask, strict=True), settings))
    together = [np.concatenate([s.frames[k] for s in windows]) for k in range(2)]
    for number, ours in enumerate(together):
        alone = run(video, mask, denoiser, autoencoder, samples=(number,))
        np.testing.assert_array_equal(ours, alone)
    assert (together[0] != together[1]).any()


def last_frames(windows: Sequence[FilledWindow]) -> FilledWindow:
    """The end of what is finished, as many frames as a window has."""
    taken = [list(itertools.chain(*(s.frames[0] for s in windows)))[-LENGTH:]]
    masks = list(itertools.chain(*(s.masks for s in windows)))[-LENGTH:]
    last = windows[-1]
    return FilledWindow(last.end - len(masks), taken, masks, last.border_steps, last.box)


@pytest.mark.parametrize("stopped", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_continued_equals_uninterrupted(
    denoiser: Denoiser, autoencoder: Autoencoder, stopped: int
) -> None:
    video, mask = make_video(23, 30, 40)
    settings = make_settings(denoiser, autoencoder)

    def pairs(first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from zip(video[first:], mask[first:], strict=True)

    whole = list(fill_windows(pairs(0), settings))
    assert [window.box for window in whole] == list(plan_boxes(mask, settings))
    before = last_frames(whole[:stopped])
    continued = list(fill_windows(pairs(before.end), settings, before))
    assert len(continued) == len(whole) - stopped
    for ours, theirs in zip(continued, whole[stopped:], strict=True):
        assert (ours.first, ours.box) == (theirs.first, theirs.box)
        np.testing.assert_array_equal(np.stack(ours.frames[0]), np.stack(theirs.frames[0]))


def test_no_more_than_two_windows_of_frames_are_held(
    denoiser: Denoiser, autoencoder: Autoencoder
) -> None:
    video, mask = make_video(26)
    given: list[weakref.ref[np.ndarray]] = []

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for pixels, hole in zip(video, mask, strict=True):
            frame = pixels.copy()
            given.append(weakref.ref(frame))
            yield frame, hole

    alive = []
    for window in fill_windows(pairs(), make_settings(denoiser, autoencoder)):
        del window
        alive.append(sum(frame() is not None for frame in given))
    assert max(alive) <= 2 * LENGTH


def test_a_small_hole_is_seen_at_full_size_and_a_large_one_with_its_surroundings() -> None:
    area = FrameSize(128, 128)
    holes = np.zeros((1080, 1920), np.uint8)
    holes[500:520, 1900:1920] = 1
    assert choose_box(holes, area) == Box(446, 1792, 128, 128)
    holes[300:700, 1000:1200] = 1
    # 400 high and 920 wide: twice that, made square, reaches beyond the frame's height.
    assert choose_box(holes, area) == Box(0, 80, 1080, 1840)
    assert choose_size(Box(0, 0, 300, 300), area, 4) == area
    assert choose_size(Box(0, 0, 180, 320), area, 8) == FrameSize(168, 96)


def test_a_box_stays_while_it_serves() -> None:
    area = FrameSize(32, 32)
    holes = np.zeros((200, 300), np.uint8)
    holes[80:120, 80:120] = 1
    box = choose_box(holes, area)
    moved = np.roll(holes, 7, axis=1)
    assert choose_box(moved, area, box) == box
    far = np.roll(holes, 60, axis=1)
    assert choose_box(far, area, box) == choose_box(far, area) != box
    small = np.zeros_like(holes)
    small[100:104, 100:104] = 1
    assert choose_box(small, area, box) == choose_box(small, area) != box


@pytest.mark.parametrize("size", [FrameSize(24, 16), FrameSize(64, 80), FrameSize(40, 30)])
def test_nothing_hidden_has_a_share_in_what_the_network_is_shown(size: FrameSize) -> None:
    video, mask = make_video(3, 30, 40)
    other = np.where(mask[..., None] == 1, 255 - video, video)
    (ours, hidden), (theirs, _) = hide(video, mask, size), hide(other, mask, size)
    np.testing.assert_array_equal(ours, theirs)
    assert hidden.shape == (3, size.height, size.width)
    assert (ours[hidden == 1] == ours[hidden == 1][0]).all()


def test_a_result_that_is_off_by_one_colour_is_matched() -> None:
    video, mask = make_video(4)
    video //= 2
    off = np.array([30, 20, 10], np.uint8)
    np.testing.assert_allclose(match_colour(video + off, video, mask), -off.astype(float))
    smooth = feather(video[0].astype(float) + off, video[0], mask[0], 1000)
    inside = mask[0] == 1
    np.testing.assert_allclose(smooth[inside], video[0][inside], atol=1)
    assert not match_colour(video + off, video, mask * 0 + 1).any()


def test_feathering_reaches_so_far_and_leaves_what_fits() -> None:
    random = np.random.default_rng(0)
    source = random.integers(0, 200, (40, 40, 3), dtype=np.uint8)
    hole = np.zeros((40, 40), np.uint8)
    hole[8:32, 8:32] = 1
    np.testing.assert_allclose(feather(source.astype(float), source, hole, 4), source)
    off = source.astype(float) + 50
    smooth = feather(off, source, hole, 4) - off
    assert not smooth[12:28, 12:28].any()
    np.testing.assert_allclose(smooth[8, 12:28], -50)
    assert (np.diff(smooth[8:13, 20, 0]) > 0).all()


def test_the_seam_counts_steps_across_the_border_alone() -> None:
    mask = np.zeros((1, 5, 5), np.uint8)
    mask[0, 2, 2] = 1
    frames = np.full((1, 5, 5, 3), 100, np.uint8)
    frames[0, 2, 2] = 90
    frames[0, 0, 0] = 0
    assert measure_border(frames, mask) == (4 * 3 * 10.0, 4 * 3)
    assert measure_border(frames, mask * 0).steps == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"overlap": 5}, "overlap is 5; the model's windows have 8 frames: give 0 to 4"),
        ({"feather": -1}, "feather is -1"),
        ({"size": FrameSize(18, 16)}, "size is 18x16: give multiples of 4"),
    ],
)
def test_settings_out_of_range_are_refused(
    denoiser: Denoiser, autoencoder: Autoencoder, settings: dict[str, object], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        make_settings(denoiser, autoencoder, **settings)
