"""The solvers: one entry each in `SOLVERS`, which the language, the program and the sampler read.

The steps import torch only when they are taken, so that a schedule can be described without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .options import Options, Value, one_of, share

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StepInputs:
    """What a step from level a down to b sees: tensors with a row for each trajectory in it."""

    noisy: Tensor
    """The states where the network was evaluated last."""
    clean: Tensor
    """The clean estimates there."""
    noisy_before: Tensor
    """The states where a step with two evaluations began."""
    clean_before: Tensor
    """The clean estimates before `clean`."""
    ab_from: Tensor
    """ᾱ at a."""
    ab_to: Tensor
    """ᾱ at b."""
    ab_before: Tensor
    """ᾱ where `clean_before` was estimated on the way down."""
    draw_noise: Callable[[], Tensor]
    """Draws each trajectory's next noise; zeros, and no draw, for a trajectory that ends clean."""


Step = Callable[[StepInputs, Mapping[str, Value]], "Tensor"]  # takes the solver's options too


def _ddpm(inputs: StepInputs, options: Mapping[str, Value]) -> Tensor:
    from ...modeling.diffusion import ddpm_step

    large, noise = options["variance"] == "large", inputs.draw_noise()
    return ddpm_step(
        *(inputs.noisy, inputs.clean, inputs.ab_from, inputs.ab_to, noise),
        variance="fixed_large" if large else "fixed_small",
    )


def _ddim(inputs: StepInputs, options: Mapping[str, Value]) -> Tensor:
    from ...modeling.diffusion import ddim_step

    eta = float(options.get("eta", 0))
    noise = inputs.draw_noise() if eta else None
    return ddim_step(inputs.noisy, inputs.clean, inputs.ab_from, inputs.ab_to, noise, eta)


def _dpmpp(inputs: StepInputs, options: Mapping[str, Value]) -> Tensor:
    from ...modeling.diffusion import dpmpp_step

    levels = (inputs.ab_from, inputs.ab_to, inputs.ab_before)
    return dpmpp_step(inputs.noisy, inputs.clean, inputs.clean_before, *levels)


def _heun(inputs: StepInputs, options: Mapping[str, Value]) -> Tensor:
    from ...modeling.diffusion import heun_step

    began = (inputs.noisy_before, inputs.clean_before)
    return heun_step(*began, inputs.noisy, inputs.clean, inputs.ab_from, inputs.ab_to)


@dataclass(frozen=True)
class Solver:
    """How a schedule goes down a step."""

    description: str
    options: Options
    step: Step
    """Its step of first order."""
    second_order_step: Step | None = None
    """Its step of second order, taken where possible; never down to the clean state."""
    evaluations: int = 1
    """Network evaluations of a step of second order: with 2 it starts with the first-order step and
    evaluates again where that ends; with 1 it uses the clean estimate of the step before."""

    def order_of_step(self, ends_clean: bool, after_down: bool) -> int:
        """The order of a step, which may follow another step down."""
        possible = not ends_clean and (self.evaluations == 2 or after_down)
        return 2 if self.second_order_step and possible else 1


_SPACING: Options = {"spacing": one_of("trailing", "leading")}

SOLVERS: dict[str, Solver] = {
    "ddpm": Solver(
        "ancestral sampling (Ho et al. 2020); variance=small (the default, the paper's Eq. 3) "
        "or variance=large (RaMViD's)",
        {"variance": one_of("small", "large"), **_SPACING},
        _ddpm,
    ),
    "ddim": Solver(
        "eta=0 is the deterministic sampler (the default), eta=1 ddpm with the small variance "
        "(Song et al. 2021)",
        {"eta": share("0"), **_SPACING},
        _ddim,
    ),
    "dpmpp": Solver(
        "DPM-Solver++ (2M) (Lu et al. 2022b): second order from the last two clean estimates; "
        "first order at the start, after every UP, and down to the clean state",
        _SPACING,
        _ddim,
        second_order_step=_dpmpp,
    ),
    "heun": Solver(
        "Heun's method: second order by two evaluations a step, but one down to the clean state "
        "(as Karras et al. 2022, Algorithm 1, but in the time of a rectified flow)",
        _SPACING,
        _ddim,
        second_order_step=_heun,
        evaluations=2,
    ),
    "euler": Solver(
        "Euler's method: along the line of a rectified flow (Liu et al. 2022), which is ddim's "
        "step in either scale",
        _SPACING,
        _ddim,
    ),
}
