"""Every solver on a Gaussian: each value of the data is N(MEAN, std²), so that the denoiser, the
exact way down and the distribution at every level are known in closed form."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import diffusers.schedulers.scheduling_ddpm
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor
from vidfill import seeding
from vidfill.modeling.denoiser import Denoiser, LatentSpace
from vidfill.modeling.diffusion import ddim_step, ddpm_step, expand
from vidfill.modeling.noise import alpha_bars
from vidfill.modeling.settings import DiffusionConfig
from vidfill.modeling.unet import VideoUNet
from vidfill.sampling.sampler import Known, Request, sample
from vidfill.sampling.schedules.language import parse
from vidfill.sampling.schedules.program import CLEAN, Kind, Program, Transition, compile_schedule

MEAN = 0.7
SHAPE = (4, 4, 32, 32)
SAMPLES = math.prod(SHAPE)
SMALL = (1, 4, 4, 4)

DDPM = DiffusionConfig(normalise=False)
FLOW = DiffusionConfig(normalise=False, process="flow", target="flow", timesteps=3840)
ZERO_SNR = DiffusionConfig(normalise=False, zero_terminal_snr=True, target="v")
COSINE = DiffusionConfig(normalise=False, beta_schedule="cosine", target="v")


@functools.cache
def an_unused_network() -> VideoUNet:
    return VideoUNet(block_out_channels=(32,))


class GaussianDenoiser(Denoiser):
    def __init__(self, std: float, config: DiffusionConfig = DDPM) -> None:
        space = LatentSpace(shape=[], mean=[0.0] * 4, std=[], autoencoder={})
        super().__init__(an_unused_network(), config, space)
        self.std = std

    def denoise(self, latents: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        ab = expand(self.alpha_bar(timestep))
        gain = ab.sqrt() * self.std**2 / self.variance(ab)
        return MEAN + gain * (latents - ab.sqrt() * MEAN)

    def variance(self, ab: Tensor) -> Tensor:
        """Of a state."""
        return ab * self.std**2 + 1 - ab

    def carry(self, state: Tensor, source: int, target: int) -> Tensor:
        """Where the exact way down, or up, takes a state: its distance from the mean only scales
        with the deviation, as every state on the way is Gaussian."""
        ab_from, ab_to = self.alpha_bar(torch.tensor([source, target]))
        scale = (self.variance(ab_to) / self.variance(ab_from)).sqrt()
        return ab_to.sqrt() * MEAN + scale * (state - ab_from.sqrt() * MEAN)


def draw(index: int, shape: Sequence[int] = SHAPE) -> Tensor:
    return torch.randn(tuple(shape), generator=seeding.generator(0, "clip", index)).double()


def run(
    denoiser: Denoiser,
    program: Program | str,
    shape: Sequence[int] = SHAPE,
    known: Known | None = None,
) -> Tensor:
    if isinstance(program, str):
        program = compile_schedule(parse(program), denoiser.timesteps)
    condition = torch.zeros(tuple(shape), dtype=torch.float64)
    request = Request("clip", "", program, lambda: condition, known and (lambda: known))
    (result,) = sample(denoiser, [request], capacity=1, seed=0)
    return result.latents


def sample_gaussian(schedule: str, std: float) -> Tensor:
    return run(GaussianDenoiser(std), schedule)


def program_of(moves: Sequence[Transition], timesteps: int, solver: str = "ddim") -> Program:
    """A walk that no schedule takes: it need not end clean."""
    return Program(parse(f"{solver}:1"), timesteps, tuple(moves))


def test_the_programs_last_level_has_no_noise() -> None:
    assert GaussianDenoiser(std=1.0).alpha_bar(torch.tensor([CLEAN])) == 1


def test_draw_0_is_the_state_that_every_schedule_starts_from() -> None:
    # One step on a Gaussian is linear in its start, so the start can be read off its result.
    ab = alpha_bars(DDPM)[999]
    gain = ab.sqrt() * 0.25 / (ab * 0.25 + 1 - ab)
    expected = MEAN + gain * (draw(0) - ab.sqrt() * MEAN)
    for solver in ("ddim", "ddpm", "dpmpp", "heun", "euler"):
        torch.testing.assert_close(sample_gaussian(f"{solver}:1", std=0.5), expected)


# Step by step beside diffusers, in float64, without clipping, over whole runs. Where steps do not
# divide T, diffusers' DDIM and DDPM go down to other levels than they visit next.


def prepare(theirs: Any, steps: int) -> Any:
    """Their scheduler with tables in float64: their own are in float32."""
    theirs.alphas_cumprod = alpha_bars(DDPM)[: theirs.config.num_train_timesteps]
    theirs.final_alpha_cumprod = theirs.one = torch.tensor(1.0, dtype=torch.float64)
    theirs.set_timesteps(steps)
    return theirs


OF_BETAS: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
UNCLIPPED: dict[str, Any] = {"clip_sample": False, "prediction_type": "sample", **OF_BETAS}


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize(("steps", "eta"), [(1, 0), (10, 0), (50, 0), (500, 0), (50, 0.3), (50, 1)])
def test_ddim_is_diffusers_ddim(steps: int, eta: float, spacing: str) -> None:
    denoiser = GaussianDenoiser(std=0.5)
    theirs = prepare(DDIMScheduler(timestep_spacing=spacing, **UNCLIPPED), steps)
    state = draw(0, SMALL)[None]
    for index, timestep in enumerate(theirs.timesteps):
        clean = denoiser.denoise(state, timestep[None], torch.empty(0))
        noise = draw(1 + index, SMALL)[None] * (index + 1 < steps)
        step = theirs.step(clean, int(timestep), state, eta=eta, variance_noise=noise)
        state = step.prev_sample
    ours = run(denoiser, f"ddim:{steps}(eta={eta},spacing={spacing})", SMALL)
    assert_close(ours, state[0])


# With fixed_large theirs adds noise to the clean state too, unless the last timestep is 0.
@pytest.mark.parametrize(
    ("steps", "variance"), [(1, "small"), (20, "small"), (500, "small"), (1000, "large")]
)
def test_ddpm_is_diffusers_ddpm(steps: int, variance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = GaussianDenoiser(std=0.5)
    kind = f"fixed_{variance}"
    theirs = prepare(
        DDPMScheduler(timestep_spacing="trailing", variance_type=kind, **UNCLIPPED), steps
    )
    noises = itertools.count(1)  # theirs draws by this function: let it be our draws
    monkeypatch.setattr(
        diffusers.schedulers.scheduling_ddpm,
        "randn_tensor",
        lambda *args, **options: draw(next(noises), SMALL)[None],
    )
    state = draw(0, SMALL)[None]
    for timestep in theirs.timesteps:
        clean = denoiser.denoise(state, timestep[None], torch.empty(0))
        state = theirs.step(clean, int(timestep), state).prev_sample
    assert_close(run(denoiser, f"ddpm:{steps}(variance={variance})", SMALL), state[0])


# Theirs hands its tensors to NumPy in a way that torch and NumPy 2 no longer like.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 100, 500])
def test_dpmpp_is_diffusers_dpm_solver_multistep(steps: int) -> None:
    denoiser = GaussianDenoiser(std=0.5)
    theirs = DPMSolverMultistepScheduler(
        timestep_spacing="trailing", prediction_type="sample", **OF_BETAS
    )
    theirs.set_timesteps(steps)
    ab = alpha_bars(DDPM)[theirs.timesteps]
    theirs.sigmas = torch.cat([((1 - ab) / ab).sqrt(), torch.zeros(1, dtype=torch.float64)])
    state = draw(0, SMALL)[None]
    for timestep in theirs.timesteps:
        clean = denoiser.denoise(state, timestep[None], torch.empty(0))
        state = theirs.step(clean, timestep, state).prev_sample
    assert_close(run(denoiser, f"dpmpp:{steps}", SMALL), state[0])


@pytest.mark.parametrize("steps", [2, 10, 40])
@pytest.mark.parametrize(
    ("solver", "peer"),
    [("euler", FlowMatchEulerDiscreteScheduler), ("heun", FlowMatchHeunDiscreteScheduler)],
)
def test_flows_solvers_are_diffusers(solver: str, peer: Any, steps: int) -> None:
    denoiser = GaussianDenoiser(0.5, dataclasses.replace(FLOW, timesteps=steps))
    theirs = peer(num_train_timesteps=steps)
    theirs.set_timesteps(steps)
    flow = draw(0, SMALL)[None]
    for time in theirs.timesteps:
        timestep = time.round().long()[None] - 1
        ab = denoiser.alpha_bar(timestep)
        state = flow.double() * (ab.sqrt() + (1 - ab).sqrt())
        clean = denoiser.denoise(state, timestep, torch.empty(0))
        velocity = (flow - clean) / (time / steps)
        flow = theirs.step(velocity, time, flow).prev_sample
    # Theirs computes in float32, whatever it is given.
    torch.testing.assert_close(
        run(denoiser, f"{solver}:{steps}", SMALL), flow[0].double(), rtol=1e-5, atol=1e-5
    )


def test_ddims_eta_of_1_is_ddpms_small_variance() -> None:
    denoiser = GaussianDenoiser(std=0.5)
    assert_close(run(denoiser, "ddim:50(eta=1)", SMALL), run(denoiser, "ddpm:50", SMALL))


# Exact solutions.


def slopes(errors: Sequence[float]) -> list[float]:
    """By what power of the number of steps errors fall, from each number to its double."""
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


def error_between(denoiser: GaussianDenoiser, solver: str, steps: int) -> float:
    """Of the way from time 3/4 to 1/4 of a flow, of whose whole time `steps` steps make equal
    parts."""
    top, bottom = (share * denoiser.timesteps // 4 - 1 for share in (3, 1))
    moves = [
        move
        for move in compile_schedule(parse(f"{solver}:{steps}"), denoiser.timesteps).transitions
        if top >= move.source > bottom
    ]
    if solver == "dpmpp":
        moves[0] = dataclasses.replace(moves[0], order=1)  # it has no history
    reached = run(denoiser, program_of(moves, denoiser.timesteps, solver), SMALL)
    exact = denoiser.carry(draw(0, SMALL), top, bottom)
    return float((reached - exact).abs().max())


@pytest.mark.parametrize(
    ("solver", "order"), [("ddim", 1), ("euler", 1), ("dpmpp", 2), ("heun", 2)]
)
def test_solvers_converge_to_exact_solutions_at_their_order(solver: str, order: int) -> None:
    denoiser = GaussianDenoiser(2.0, FLOW)
    errors = [error_between(denoiser, solver, steps) for steps in (60, 120, 240)]
    assert slopes(errors) == pytest.approx([order, order], abs=0.1)


def error_of(denoiser: GaussianDenoiser, schedule: str) -> float:
    """Of a whole run, from the noisiest level to the clean one."""
    exact = denoiser.carry(draw(0, SMALL), denoiser.timesteps - 1, CLEAN)
    return float((run(denoiser, schedule, SMALL) - exact).abs().max())


# Whole runs start at pure noise, and end with a step of first order from a level whose noise falls
# with the steps: like their inverse along a flow's time, whose runs keep the order (but for a
# logarithm with dpmpp, whose steps in ln SNR stay long near pure noise); like the root of that in
# DDPM's, so that the last step's error, the square of it, is of first order in many steps.
@pytest.mark.parametrize(
    ("solver", "least"), [("ddim", 0.95), ("euler", 0.95), ("dpmpp", 1.7), ("heun", 1.95)]
)
def test_whole_runs_of_a_flow_converge(solver: str, least: float) -> None:
    denoiser = GaussianDenoiser(2.0, FLOW)
    errors = [error_of(denoiser, f"{solver}:{steps}") for steps in (40, 80, 160)]
    assert min(slopes(errors)) > least


@pytest.mark.parametrize("config", [DDPM, ZERO_SNR, COSINE, FLOW])
@pytest.mark.parametrize("std", [0.5, 2.0])
def test_second_order_solvers_beat_first_order_from_any_noisiest_level(
    config: DiffusionConfig, std: float
) -> None:
    denoiser = GaussianDenoiser(std, config)
    first = error_of(denoiser, "ddim:40")
    assert first < 0.2 * std
    assert error_of(denoiser, "heun:20") < first  # of 39 evaluations
    assert error_of(denoiser, "dpmpp:40") < first / 2


@pytest.mark.parametrize("std", [0.5, 2.0])
@pytest.mark.parametrize("solver", ["ddpm small", "ddpm large", "ddim"])
def test_stochastic_solvers_reach_the_variance_at_first_order(solver: str, std: float) -> None:
    # A step takes x to a·x + b·ε + const, so a state's variance v to a²·v + b².
    denoiser = GaussianDenoiser(std, FLOW)

    def step(noisy: float, noise: float, source: int, target: int) -> Tensor:
        ab_from, ab_to = (denoiser.alpha_bar(torch.tensor([t])) for t in (source, target))
        state, fresh = (torch.full((1, 1, 1, 1, 1), each).double() for each in (noisy, noise))
        clean = denoiser.denoise(state, torch.tensor([source]), torch.empty(0))
        if solver == "ddim":
            return ddim_step(state, clean, ab_from, ab_to, fresh, eta=0.5)
        variance: Any = solver.replace("ddpm ", "fixed_")
        return ddpm_step(state, clean, ab_from, ab_to, fresh, variance)

    def variance_reached(steps: int) -> float:
        variance = torch.ones(1, dtype=torch.float64)
        for move in compile_schedule(parse(f"ddpm:{steps}"), denoiser.timesteps).transitions:
            ends = move.source, move.target
            start = step(0, 0, *ends)
            of_state, of_noise = step(1, 0, *ends) - start, step(0, 1, *ends) - start
            variance = of_state**2 * variance + of_noise**2
        return float(variance)

    errors = [abs(variance_reached(steps) - std**2) for steps in (60, 120, 240)]
    assert slopes(errors) == pytest.approx([1, 1], abs=0.1)


# Distributions.


def assert_gaussian(values: Tensor, std: float, slack: float = 0.0) -> None:
    """Mean and deviation within four standard errors, and `slack` of the deviation."""
    error = std / math.sqrt(SAMPLES)
    assert float(values.mean()) == pytest.approx(MEAN, abs=4 * error)
    assert float(values.std()) == pytest.approx(std, abs=4 * error / math.sqrt(2) + slack * std)


@pytest.mark.parametrize("std", [0.5, 2.0])
@pytest.mark.parametrize(
    "schedule",
    [
        "ddpm:250",
        "ddim:250",
        "ddim:250+resample(n=1)",
        "dpmpp:50+restart(low=0.1,high=0.4,times=2,steps=20)",
        "heun:50+restart(low=0.1,high=0.4,times=2,steps=20)",
    ],
)
def test_many_steps_reproduce_a_gaussians_distribution(schedule: str, std: float) -> None:
    assert_gaussian(sample_gaussian(schedule, std), std, slack=0.03)


@pytest.mark.parametrize(("steps", "n"), [(1, 0), (5, 0), (50, 0), (50, 4), (5, 10)])
def test_large_variance_is_exact_on_unit_gaussians_and_resampling_leaves_it_so(
    steps: int, n: int
) -> None:
    # The reverse step is then exact, and so is the forward one: no level's distribution changes.
    # Only the last DOWN gives the posterior mean in place of a draw: from a variance v of the clean
    # state, UP and DOWN at the last level make ab·(ab·v + 1 − ab).
    last = alpha_bars(DDPM)[round(1000 / steps) - 1].item()
    variance = last
    for _ in range(n):
        variance = last * (last * variance + 1 - last)
    values = sample_gaussian(f"ddpm:{steps}(variance=large)+resample(n={n})", std=1.0)
    assert float(values.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / SAMPLES))


def down(source: int, target: int) -> Transition:
    return Transition(Kind.DOWN, source, target, order=1, evaluations=1)


def up(source: int, target: int, afresh: bool = False) -> Transition:
    return Transition(Kind.UP, source, target, afresh=afresh)


def run_from(
    level: int, moves: Sequence[Transition], denoiser: GaussianDenoiser, solver: str
) -> Tensor:
    """A walk that begins with states of exactly a level's distribution: noised clean ones."""
    clean = MEAN + denoiser.std * draw(1000)
    known = Known(clean, torch.zeros(4, 1, 32, 32))
    start = [down(999, level), Transition(Kind.INJECT, level, level)]
    program = Program(parse(solver), 1000, (*start, *moves))
    return run(denoiser, program, known=known)


def assert_moments(values: Tensor, mean: float, variance: float) -> None:
    """Within four standard errors."""
    assert float(values.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / SAMPLES))
    assert float(values.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / SAMPLES))


@pytest.mark.parametrize(
    "walk", [[799, 499, 799, 499], [799, 199, 399, 599, 799, 199], [499, 99, 899, 99, 899, 499]]
)
def test_markov_up_and_exact_down_leave_a_gaussians_distribution_unchanged(walk: list[int]) -> None:
    # On unit Gaussians ddpm with the large variance is exact: a step draws from q(x_b | x_a).
    moves = [down(a, b) if a > b else up(a, b) for a, b in itertools.pairwise(walk)]
    values = run_from(walk[0], moves, GaussianDenoiser(std=1.0), "ddpm:1(variance=large)")
    assert_moments(values, float(alpha_bars(DDPM)[walk[-1]].sqrt()) * MEAN, 1)


@pytest.mark.parametrize("std", [0.5, 2.0])
@pytest.mark.parametrize(("low", "high"), [(499, 749), (49, 999), (-1, 299)])
def test_markov_up_leads_from_any_levels_distribution_to_a_noisiers(
    low: int, high: int, std: float
) -> None:
    denoiser = GaussianDenoiser(std)
    level = max(low, 0)
    moves = [up(level, high)] if low >= 0 else [Transition(Kind.INJECT, -1, -1), up(-1, high)]
    values = run_from(level, moves, denoiser, "ddim:1")
    ab = alpha_bars(DDPM)[high]
    assert_moments(values, float(ab.sqrt()) * MEAN, float(denoiser.variance(ab)))


@pytest.mark.parametrize("std", [0.5, 2.0])
@pytest.mark.parametrize(("high", "low", "up_to"), [(899, 499, 749), (499, 99, 299), (99, 49, 799)])
def test_time_travels_moments_are_those_derived(
    high: int, low: int, up_to: int, std: float
) -> None:
    """DOWN from c to b, then UP to a from the clean estimate, which was made at c.

    x_c has the mean √ᾱ_c·m and the variance v_c = ᾱ_c·s² + 1 − ᾱ_c. Its clean estimate is
    m + (√ᾱ_c·s²/v_c)·(x_c − √ᾱ_c·m): mean m and variance ᾱ_c·s⁴/v_c = ρ_c·s², where
    ρ_c = ᾱ_c·s²/v_c is the signal's share of v_c. With fresh noise at a that makes

        mean √ᾱ_a·m        variance ᾱ_a·ρ_c·s² + 1 − ᾱ_a

    So time travel keeps the mean, and takes ᾱ_a·(1 − ρ_c)·s² from the variance that noising the
    state would have kept: it narrows what it draws from, the more the noisier c is.
    """
    denoiser = GaussianDenoiser(std)
    ab_c, ab_a = (float(alpha_bars(DDPM)[level]) for level in (high, up_to))
    share = ab_c * std**2 / (ab_c * std**2 + 1 - ab_c)
    values = run_from(high, [down(high, low), up(low, up_to, afresh=True)], denoiser, "ddim:1")
    assert_moments(values, math.sqrt(ab_a) * MEAN, ab_a * share * std**2 + 1 - ab_a)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp", "heun", "euler"])
@pytest.mark.parametrize("afresh", [False, True])
def test_after_going_up_to_pure_noise_nothing_of_the_way_before_is_left(
    solver: str, afresh: bool
) -> None:
    denoiser = GaussianDenoiser(0.5, FLOW)
    top = denoiser.timesteps - 1
    once = compile_schedule(parse(f"{solver}:4"), denoiser.timesteps).transitions
    twice = program_of([*once, up(CLEAN, top, afresh), *once], denoiser.timesteps, solver)
    start, end = draw(0, SMALL), run(denoiser, f"{solver}:4", SMALL)
    # Every value goes the same way: result = a·start + b.
    gain = (end.flatten()[1] - end.flatten()[0]) / (start.flatten()[1] - start.flatten()[0])
    again = end.flatten()[0] + gain * (draw(1, SMALL) - start.flatten()[0])
    assert_close(run(denoiser, twice, SMALL), again)


# What a schedule adds to its solver.


def test_known_latents_are_noised_to_the_level_where_the_mask_shows_them() -> None:
    denoiser = GaussianDenoiser(std=0.5)
    mask = torch.zeros(4, 1, 32, 32)
    mask[..., :16] = 0.25  # hidden in part: not known
    known = Known(torch.full(SHAPE, 3.0), mask)
    moves = [down(999, 499), Transition(Kind.INJECT, 499, 499)]
    values = run(denoiser, program_of(moves, 1000), known=known)
    plain = run(denoiser, program_of(moves[:1], 1000))
    ab = alpha_bars(DDPM)[499]
    torch.testing.assert_close(values[..., :16], plain[..., :16])
    noise = draw(1)[..., 16:]
    torch.testing.assert_close(values[..., 16:], 3 * ab.sqrt() + (1 - ab).sqrt() * noise)


def test_the_ablation_clamps_every_clean_estimate_and_nothing_else_does() -> None:
    plain = sample_gaussian("ddim:1", std=20.0)
    assert float(plain.abs().max()) > 1
    assert (sample_gaussian("ddim:1+ablate_clamp", std=20.0) == plain.clamp(-1, 1)).all()
    for solver in ("ddpm", "dpmpp", "heun"):
        clamped = sample_gaussian(f"{solver}:10+resample(n=1)+ablate_clamp", std=2.0)
        assert float(clamped.abs().max()) <= 1
        assert float(sample_gaussian(f"{solver}:10+resample(n=1)", std=2.0).abs().max()) > 1
