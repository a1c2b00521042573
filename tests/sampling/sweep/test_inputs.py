from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vidfill.data.shards.format import Example
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import Autoencoder
from vidfill.sampling.sweep.inputs import read_schedules
from vidfill.sampling.sweep.run import main, sweep
from vidfill.sampling.sweep.settings import DEFAULT_SCHEDULES, SweepConfig

SHA = "f" * 64


def lengthen(example: Example) -> Example:
    fields = ("latents", "masked_latents", "mask", "pixels")
    twice = {name: np.concatenate([getattr(example, name)] * 2) for name in fields}
    return dataclasses.replace(example, **twice)


@pytest.mark.parametrize(
    ("change", "identity", "message"),
    [
        (
            lambda example: example,
            {"name": "theirs", "sha256": SHA},
            "holds latents of theirs .*the model in .* was trained on ",
        ),
        (lengthen, {}, r"latents of the shape \[6, .*the model in .* was trained on \[3, "),
        (
            lambda example: dataclasses.replace(example, pixels=None),
            {},
            "shard without pixels: encode again with --pixels all",
        ),
    ],
)
def test_shards_that_do_not_fit_the_model_are_refused(
    config: SweepConfig,
    tmp_path: Path,
    examples: list[Example],
    write_shards: Any,
    change: Callable[[Example], Example],
    identity: dict[str, str],
    message: str,
) -> None:
    shards = write_shards(tmp_path / "other", [change(own) for own in examples], **identity)
    with pytest.raises(BadInput, match=message):
        sweep(dataclasses.replace(config, shards=shards))
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedules": "ddim:2 ddin:3"}, "did you mean ddim"),
        ({"schedules": ""}, "schedules is empty: give some"),
        ({"schedules": "ddpm:3 ddpm:3(variance=small)"}, "schedules has ddpm:3 twice"),
        ({"schedules": "ddim:41"}, "trained with 40 timesteps: give at most 40"),
        ({"examples": 4}, "examples is 4; .* holds 3: give at most that, or 0 for all"),
        ({"examples": -1}, "examples is -1: give 0 or more"),
        ({"completions": 0}, "completions is 0: give 1 or more"),
        ({"batch_size": -1}, "batch_size is -1: give 0 or more"),
        ({"keep": -1}, "keep is -1: give 0 or more"),
        ({"masks": "strokes"}, "masks has strokes; .* holds stationary: choose of these"),
        ({"reference": "ddim:9"}, "reference is ddim:9; the schedules are ddim:2 ddpm:3.*choose"),
        ({"i3d": "i3d.safetensors"}, "the clips have 3 frames, and FVD wants at least 10: leave"),
        ({"lpips": "no.safetensors"}, "cannot load Lpips from no.safetensors"),
        ({"split": "test"}, "no encoded split 'test': it has validation"),
        ({"device": "abacus"}, "device is 'abacus', which does not work"),
    ],
)
def test_bad_settings_are_one_clear_message_and_nothing_is_written(
    config: SweepConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        sweep(dataclasses.replace(config, **change))
    assert not config.out.exists()


def test_an_autoencoder_other_than_the_models_is_refused(
    config: SweepConfig, autoencoder: Autoencoder, tmp_path: Path
) -> None:
    next(autoencoder.network.parameters()).data.add_(1)
    autoencoder.network.save_pretrained(tmp_path / "another")
    with pytest.raises(BadInput, match=r"autoencoder is .*another .*the model was trained on"):
        sweep(dataclasses.replace(config, autoencoder=str(tmp_path / "another")))


def test_the_option_of_old_is_named_with_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "shards", "out", "--clips", "3"]) == 2
    assert "--clips is now --examples" in capsys.readouterr().err


def test_the_default_schedules_are_the_papers_n_and_can_be_read() -> None:
    schedules = read_schedules(DEFAULT_SCHEDULES)
    assert " ".join(schedules) == DEFAULT_SCHEDULES
    assert [schedule for schedule in schedules if schedule.startswith("ddpm")] == [
        "ddpm:50",
        *(f"ddpm:50+resample(n={n})" for n in (4, 6, 10)),
    ]
