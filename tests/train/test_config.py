"""A mistake in a training run's options is named in one line, with what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from vidfill import jobs
from vidfill.modeling.settings import PRESETS
from vidfill.train.config import RECIPES, TrainConfig, check, find_recipe
from vidfill.train.loop import main


def parse(*words: str) -> TrainConfig:
    return jobs.parse(TrainConfig, find_recipe(["shards", "run", *words]), verb="train")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.prest", "tiny"], "did you mean model.preset?"),
        (["--learning_rate", "1"], "did you mean optimizer.learning_rate?"),
        (["--precision", "bf16"], "give one of 'float32', 'bfloat16', 'float16'. Got value: bf16"),
        (["--steps", "many"], "give a value of type int. Got value: many"),
        (["--config", "nothing.yaml"], "No such file"),
    ],
)
def test_an_unknown_or_impossible_option_is_named_with_the_nearest_right_one(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["shards", "run", *words])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vidfill train: error: ")
    assert said in line


@pytest.mark.parametrize(
    ("content", "said"),
    [("stepps: 3", "did you mean steps?"), ("model: {prest: x}", "did you mean model.preset?")],
)
def test_a_mistake_in_a_file_is_named_like_one_on_the_command_line(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit):
        main(["shards", "run", "--config", str(file)])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_recipe_is_found_by_its_name_is_possible_and_gives_its_command(name: str) -> None:
    config = parse("--config", name)
    check(config)
    assert config == parse(f"--config={RECIPES / name}.yaml")
    assert config.model.preset in ("", *PRESETS)
    comment = (RECIPES / f"{name}.yaml").read_text().partition("\nsteps")[0]
    assert "vidfill" in comment
    assert "Result" in comment


def test_a_file_of_ones_own_goes_before_a_recipe_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").write_text("steps: 7")
    assert parse("--config", "base").steps == 7


def test_the_papers_recipe_has_ramvids_hyper_parameters() -> None:
    """Its published training script's, as the paper says that it followed them."""
    config = parse("--config", "paper")
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (2e-5, 0)
    assert (config.optimizer.warmup, config.optimizer.decay) == (0, "constant")
    assert (config.optimizer.clip, config.optimizer.ema_decays[0]) == (1, 0.9999)
    assert (config.batch_size, config.steps) == (32, 250_000)
    diffusion = config.diffusion
    assert (diffusion.timesteps, diffusion.beta_schedule) == (1000, "linear")
    assert (diffusion.target, diffusion.normalise, diffusion.mask_channel) == (
        "noise",
        False,
        False,
    )
