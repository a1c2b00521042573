"""What --plan counts is what a run allocates, and it starts nothing."""

from __future__ import annotations

import dataclasses

import pytest
from vidfill.data.shards.reading import ShardedDataset
from vidfill.errors import BadInput
from vidfill.modeling.settings import Precision
from vidfill.train.config import ModelConfig, OptimizerConfig, TrainConfig
from vidfill.train.loop import train
from vidfill.train.preflight.plan import (
    TrainingCost,
    assumed_rate,
    measure_step,
    state_memory,
    traffic,
    training_cost,
    why_not_measured,
)
from vidfill.train.state import make_accelerator, make_denoiser, make_state


@pytest.fixture(scope="module")
def plan(trained: TrainConfig) -> TrainingCost:
    """What the tiny run needs on one GPU."""
    return training_cost(trained, ShardedDataset(trained.shards, "train").manifest, gpus=1)


def test_the_state_counted_is_the_state_allocated(
    tiny_config: TrainConfig, plan: TrainingCost
) -> None:
    manifest = ShardedDataset(tiny_config.shards, "train").manifest
    denoiser = make_denoiser(tiny_config, manifest)
    state = make_state(tiny_config, make_accelerator(tiny_config), denoiser.network)
    weights = list(state.network.parameters())
    others = [
        tensor
        for values in state.optimizer.state.values()
        for name, tensor in values.items()
        if name != "step"
    ]
    assert plan.parameters == sum(tensor.numel() for tensor in weights)
    assert plan.memory["weights"] == sum(tensor.nbytes for tensor in weights)
    assert plan.memory["moments and averages"] == sum(tensor.nbytes for tensor in others)
    assert plan.checkpoint == plan.memory["weights"] + plan.memory["moments and averages"]
    assert "buckets" not in plan.memory
    assert plan.checkpoint < plan.snapshot < 2 * plan.checkpoint  # powers of two


def test_the_checkpoint_counted_is_the_checkpoint_written(
    trained: TrainConfig, plan: TrainingCost
) -> None:
    folder = trained.out / "checkpoints" / "step-00000003"
    written = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    headers = 5 * 16_000  # names and shapes, in each of five files
    assert plan.checkpoint < written < plan.checkpoint + headers


def test_each_zero_stage_shares_out_more_than_the_one_before() -> None:
    """16 bytes a parameter without averages: ZeRO's paper has them at (2 + 2 + K) bytes, K = 12."""
    of_stage = [state_memory(4_000_000, 0, stage, gpus=4) for stage in range(4)]
    for parts in of_stage:
        for passing in ("buckets", "gathered weights"):
            parts.pop(passing, None)
    assert [sum(parts.values()) / 1_000_000 for parts in of_stage] == [16, 11, 8, 5]


@pytest.mark.slow
def test_a_share_is_of_the_gpus_that_were_named(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, batch_size=12, gradient_accumulation=3)
    manifest = ShardedDataset(config.shards, "train").manifest
    one, four = training_cost(config, manifest, 1), training_cost(config, manifest, 4)
    assert (one.clips, one.clips_at_once) == (12, 4)
    assert (four.clips, four.clips_at_once) == (3, 1)
    assert one.memory["activations"] > 2 * four.memory["activations"]
    assert (one.traffic, one.epochs) == (0, four.epochs)


def test_an_exchange_of_many_parts_is_one_of_one_part_many_times() -> None:
    """In ZeRO's paper data parallel training moves 2 weights a step, and stage 3 half more."""
    sizes = [4_000_000, 400]
    one, four = (
        [traffic(sizes, stage, parts, gpus=1000) / sum(sizes) for stage in range(4)]
        for parts in (1, 4)
    )
    assert one == pytest.approx([2, 3, 3, 2], rel=2e-3)
    assert four == pytest.approx([2, 3, 9, 8], rel=2e-3)
    huge = [2_500_000_000]
    assert traffic(huge, 3, 1, gpus=1000) / sum(huge) == pytest.approx(3, rel=2e-3)
    assert all(traffic(sizes, stage, parts=4, gpus=1) == 0 for stage in range(4))


def test_a_processor_measures_only_what_it_can(
    tiny_config: TrainConfig, plan: TrainingCost
) -> None:
    enough = 2 * sum(plan.memory.values())
    assert not why_not_measured(tiny_config, plan, enough, rate=float(plan.operations))
    assert "memory" in why_not_measured(tiny_config, plan, enough // 3, rate=float(plan.operations))
    assert "8.3 minutes" in why_not_measured(tiny_config, plan, enough, rate=plan.operations / 100)
    for change in ({"plan_gpus": 2}, {"plan_tflops": "1"}, {"compile": True}):
        config = dataclasses.replace(tiny_config, **change)
        assert why_not_measured(config, plan, enough, rate=float(plan.operations))


def test_a_step_that_is_measured_writes_nothing_into_the_runs_folder(
    tiny_config: TrainConfig,
) -> None:
    config = dataclasses.replace(
        tiny_config,
        max_skipped=9,
        optimizer=OptimizerConfig(learning_rate=1e30, warmup=0),
    )
    seconds, _ = measure_step(config, ShardedDataset(config.shards, "train"), clips=2)
    assert seconds > 0
    assert not tiny_config.out.exists()


@pytest.mark.slow
def test_recomputed_activations_are_not_kept(tiny_config: TrainConfig, plan: TrainingCost) -> None:
    manifest = ShardedDataset(tiny_config.shards, "train").manifest
    model = dataclasses.replace(tiny_config.model, gradient_checkpointing=True)
    recomputed = training_cost(dataclasses.replace(tiny_config, model=model), manifest, 1)
    assert recomputed.memory["activations"] < 0.7 * plan.memory["activations"]


@pytest.mark.slow
def test_a_plan_is_printed_and_nothing_is_started(
    tiny_config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dataclasses.replace(tiny_config, plan=True, plan_gpus=3))
    said = capsys.readouterr().out
    for word in ("parameters", "memory of a GPU: in all", "epochs", "GPU hours", "on 3 GPU(s)"):
        assert word in said
    assert not tiny_config.out.exists()


@pytest.mark.parametrize(
    ("given", "precision", "rate", "source"),
    [
        ("", "float32", 100, "assumed, for a GPU"),
        ("41.5", "bfloat16", 41.5, "as given"),
        ("H100", "bfloat16", 0.3 * 989, "30% of the H100's 989"),
        ("NVIDIA A100", "float32", 0.3 * 156, "30% of the NVIDIA A100's 156"),
    ],
)
def test_a_gpu_that_is_not_here_is_taken_at_its_word(
    tiny_config: TrainConfig, given: str, precision: Precision, rate: float, source: str
) -> None:
    config = dataclasses.replace(tiny_config, plan_tflops=given, precision=precision)
    assert assumed_rate(config) == (pytest.approx(rate * 1e12), source)


@pytest.mark.parametrize("given", ["fast", "-1", "0", "nan", "inf", "H"])
def test_a_gpu_that_nobody_knows_is_refused(tiny_config: TrainConfig, given: str) -> None:
    with pytest.raises(BadInput, match=r"plan_tflops is .*: give a number, or one of A100, B200"):
        assumed_rate(dataclasses.replace(tiny_config, plan_tflops=given))


def test_epochs_without_number_are_warned_of(
    tiny_config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dataclasses.replace(tiny_config, plan=True, plan_tflops="H100", steps=10**6))
    assert "4 examples 750,000 times" in capsys.readouterr().err


def test_more_gpus_than_clips_are_refused(tiny_config: TrainConfig) -> None:
    with pytest.raises(BadInput, match="give each GPU a clip"):
        train(dataclasses.replace(tiny_config, plan=True, plan_gpus=4))


@pytest.mark.slow
def test_a_preset_is_planned_by_its_sizes(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, model=ModelConfig(preset="mini"))
    manifest = ShardedDataset(config.shards, "train").manifest
    network = make_denoiser(config, manifest).network
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert training_cost(config, manifest, gpus=1).parameters == parameters
