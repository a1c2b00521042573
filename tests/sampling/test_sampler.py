from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from vidfill import seeding
from vidfill.data.shards.format import Example
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import Autoencoder
from vidfill.modeling.denoiser import Denoiser
from vidfill.sampling.capacity import CAPACITY, find_capacity, largest_batch
from vidfill.sampling.examples import condition_of, inpaint, known_of
from vidfill.sampling.sampler import Completion, Request, sample
from vidfill.sampling.schedules.language import parse
from vidfill.sampling.schedules.program import compile_schedule

MakeExample = Callable[[str], Example]
MIXED = [
    "ddpm:5+resample(n=2)",
    "ddim:7",
    "ddpm:3(variance=large)",
    "ddim:2+resample(n=1)",
    "ddim:4(eta=0.5)+jump(length=2,times=2)+inject",
    "dpmpp:5+restart(low=0.2,high=0.6,times=1,steps=2)",
    "heun:3+travel(length=1,times=2)+inject",
    "euler:3+ablate_clamp",
]
NFES = [15, 7, 3, 4, 6, 7, 9, 3]
CLIPS = ["a", "bb"]


def run(denoiser: Denoiser, requests: Sequence[Request], capacity: int) -> dict[str, Completion]:
    results = sample(denoiser, requests, capacity=capacity, seed=1)
    return {f"{result.request.key} {result.request.name}": result for result in results}


def requests_for(
    denoiser: Denoiser, make_example: MakeExample, schedules: Sequence[str], clips: Sequence[str]
) -> list[Request]:
    return [
        Request(
            clip,
            schedule,
            compile_schedule(parse(schedule), denoiser.timesteps),
            functools.partial(condition_of, denoiser, make_example(clip)),
            functools.partial(known_of, denoiser, make_example(clip)),
        )
        for clip in clips
        for schedule in schedules
    ]


def assert_same(ours: dict[str, Completion], theirs: dict[str, Completion]) -> None:
    assert ours.keys() == theirs.keys()
    for name, result in ours.items():
        torch.testing.assert_close(result.latents, theirs[name].latents, rtol=1e-4, atol=1e-4)


def test_batched_equals_alone(denoiser: Denoiser, make_example: MakeExample) -> None:
    requests = requests_for(denoiser, make_example, MIXED, CLIPS)
    alone: dict[str, Completion] = {}
    for request in requests:
        alone |= run(denoiser, [request], capacity=1)
    assert len(alone) == len(requests)
    assert_same(run(denoiser, requests, capacity=5), alone)


def test_draws_are_those_of_seed_clip_and_number_whatever_the_batch(
    denoiser: Denoiser, make_example: MakeExample, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_for(denoiser, make_example, MIXED, ["a"])
    generator, drawn = seeding.generator, list[tuple[str | int, ...]]()

    def recording(*parts: str | int) -> torch.Generator:
        drawn.append(parts)
        return generator(*parts)

    monkeypatch.setattr(seeding, "generator", recording)
    by_capacity = []
    for capacity in (1, 3, 8):
        drawn.clear()
        run(denoiser, requests, capacity)
        by_capacity.append(sorted(drawn, key=str))
    assert by_capacity[0] == by_capacity[1] == by_capacity[2]
    # Of ddpm:5+resample(n=2): the start, 2 ups a level, and 3 downs at all levels but the last.
    assert set(by_capacity[0]) == {(1, "a", draw) for draw in range(1 + 10 + 12)}


def test_the_order_of_the_requests_does_not_matter(
    denoiser: Denoiser, make_example: MakeExample
) -> None:
    requests = requests_for(denoiser, make_example, MIXED, CLIPS)
    assert_same(run(denoiser, requests, capacity=4), run(denoiser, requests[::-1], capacity=4))


def test_a_schedule_that_runs_beside_changes_nothing(
    denoiser: Denoiser, make_example: MakeExample
) -> None:
    watched = requests_for(denoiser, make_example, MIXED[:1], CLIPS)
    beside = requests_for(denoiser, make_example, MIXED[1:], [*CLIPS, "dddd"])
    together = run(denoiser, [*beside, *watched], capacity=4)
    alone = run(denoiser, watched, capacity=4)
    assert_same({name: together[name] for name in alone}, alone)


def test_clips_seeds_and_schedules_have_results_of_their_own(
    denoiser: Denoiser, make_example: MakeExample
) -> None:
    same_condition = make_example("a")
    renamed = dataclasses.replace(same_condition, key="b")
    requests = [
        request
        for example in (same_condition, renamed)
        for request in requests_for(denoiser, lambda key, e=example: e, MIXED, [example.key])  # type: ignore[misc]
    ]
    results = [result.latents for result in run(denoiser, requests, capacity=8).values()]
    results += [r.latents for r in sample(denoiser, requests[:1], capacity=1, seed=2)]
    distances = [float((a - b).abs().max()) for i, a in enumerate(results) for b in results[:i]]
    assert min(distances) > 1e-2


def test_counted_network_evaluations_are_the_programs(
    denoiser: Denoiser, make_example: MakeExample, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    denoise = denoiser.denoise

    def counting(latents: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        calls.append(len(latents))
        return denoise(latents, timestep, condition)

    monkeypatch.setattr(denoiser, "denoise", counting)
    requests = requests_for(denoiser, make_example, MIXED, CLIPS)
    told: list[int] = []
    list(sample(denoiser, requests, capacity=5, seed=0, on_evaluations=told.append))
    assert sum(calls) == sum(request.program.nfe for request in requests) == len(CLIPS) * sum(NFES)
    assert calls == told


def test_a_finished_trajectorys_slot_is_taken_by_the_next(
    denoiser: Denoiser, make_example: MakeExample
) -> None:
    # 15 evaluations beside 7 + 3 + 4: with the longest first, two slots need no more than 15 calls.
    requests = requests_for(denoiser, make_example, MIXED[:4], ["a"])
    calls: list[int] = []
    list(sample(denoiser, requests, capacity=2, seed=0, on_evaluations=calls.append))
    assert len(calls) == 15
    assert calls == [2] * 14 + [1]


def test_seconds_are_shares_of_the_networks_time(
    denoiser: Denoiser, make_example: MakeExample
) -> None:
    requests = requests_for(denoiser, make_example, ["ddim:2", "ddim:20"], ["a"])
    short, long = (result.seconds for result in sample(denoiser, requests, capacity=2, seed=0))
    assert 0 < short < long


def test_values_that_are_not_finite_stop_the_run(
    denoiser: Denoiser, make_example: MakeExample
) -> None:
    denoiser.network.conv_out.weight.data.fill_(float("nan"))
    requests = requests_for(denoiser, make_example, ["ddim:2"], ["a"])
    with pytest.raises(BadInput, match="sampling a with ddim:2 gave values that are not finite"):
        run(denoiser, requests, capacity=1)


def test_what_the_hole_hides_does_not_change_the_result(
    denoiser: Denoiser, autoencoder: Autoencoder, make_example: MakeExample
) -> None:
    example = make_example("a")
    assert example.pixels is not None
    hidden = example.mask[..., None] == 1
    pixels = np.where(hidden, 255 - example.pixels, example.pixels)
    another = dataclasses.replace(example, latents=-example.latents, pixels=pixels)
    (_, first), (_, second) = (
        next(inpaint(denoiser, autoencoder, [e], "ddpm:4+resample(n=1)", seed=0, capacity=1))
        for e in (example, another)
    )
    assert (first == second).all()


def test_inpainting_keeps_visible_pixels_and_fills_every_example(
    denoiser: Denoiser, autoencoder: Autoencoder, make_example: MakeExample
) -> None:
    examples = [make_example(clip) for clip in CLIPS]
    filled = {
        example.key: (example, frames)
        for example, frames in inpaint(
            denoiser, autoencoder, examples, "ddim:3", seed=0, capacity=2
        )
    }
    assert sorted(filled) == CLIPS
    for example, frames in filled.values():
        assert frames.dtype == np.uint8
        assert (frames[example.mask == 0] == example.pixels[example.mask == 0]).all()  # type: ignore[index]
        assert (frames[example.mask == 1] != example.pixels[example.mask == 1]).any()  # type: ignore[index]


def test_an_example_without_pixels_is_refused_with_a_remedy(
    denoiser: Denoiser, autoencoder: Autoencoder, make_example: MakeExample
) -> None:
    bare = dataclasses.replace(make_example("a"), pixels=None)
    with pytest.raises(BadInput, match="encode again with --pixels all"):
        list(inpaint(denoiser, autoencoder, [bare], "ddim:1", seed=0, capacity=1))


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp", "heun"])
def test_injected_latents_stand_at_the_end_where_the_mask_shows_them(
    denoiser: Denoiser, make_example: MakeExample, solver: str
) -> None:
    example = make_example("a")
    shown = known_of(denoiser, example).mask.expand(-1, 4, -1, -1) == 0
    assert shown.any() and not shown.all()
    known = torch.from_numpy(example.masked_latents).float()
    schedule = f"{solver}:3+resample(n=1)"
    with_known, plain = (
        run(denoiser, requests_for(denoiser, lambda key: example, [text], ["a"]), capacity=1)
        for text in (f"{schedule}+inject", schedule)
    )
    (injected,), (free,) = with_known.values(), plain.values()
    torch.testing.assert_close(injected.latents[shown], known[shown])
    assert float((free.latents - known)[shown].abs().min()) > 1e-4
    assert float((injected.latents - known)[~shown].abs().min()) > 1e-4


class SmallMemory(Denoiser):
    """Runs out of memory as an accelerator does."""

    most = 0

    def denoise(self, latents: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        if len(latents) > self.most:
            raise torch.OutOfMemoryError
        return latents


@pytest.mark.parametrize("wanted", [1, 5, 64, 1000])
@pytest.mark.parametrize("most", [2, 3, 9, 63, 64, 500])
def test_the_largest_batch_is_the_largest_that_fits_with_an_eighth_to_spare(
    denoiser: Denoiser, make_example: MakeExample, most: int, wanted: int
) -> None:
    small = SmallMemory(denoiser.network, denoiser.config, denoiser.space)
    small.most = most
    found = largest_batch(small, condition_of(denoiser, make_example("a")), wanted)
    assert found == min(wanted, most * 8 // 9)


def test_a_clip_that_does_not_fit_is_refused_with_a_remedy(
    denoiser: Denoiser, make_example: MakeExample
) -> None:
    small = SmallMemory(denoiser.network, denoiser.config, denoiser.space)
    with pytest.raises(BadInput, match="one example does not fit into the memory of cpu"):
        largest_batch(small, condition_of(denoiser, make_example("a")), 4)


def test_no_more_slots_are_taken_than_shorten_the_run(
    denoiser: Denoiser, make_example: MakeExample
) -> None:
    requests = requests_for(denoiser, make_example, ["ddim:20", "ddim:4"], ["a", "bb"])
    assert find_capacity(denoiser, requests) == 3  # 48 evaluations, of which 20 follow each other
    assert find_capacity(denoiser, requests * 20) == CAPACITY
    requests = requests_for(denoiser, make_example, ["ddim:20", "ddim:12"], ["a", "bb", "ccc"])
    assert find_capacity(denoiser, requests) == 6  # of 5 slots one would run 12 and 12
