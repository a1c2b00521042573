"""What a run's state holds, on one process; test_processes.py has several."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest
import torch
from vidfill.data.shards.reading import ShardedDataset
from vidfill.modeling.attention import SelfAttention
from vidfill.train.config import ModelConfig, TrainConfig
from vidfill.train.state import (
    TrainState,
    averaged_network,
    kinds,
    make_accelerator,
    make_denoiser,
    make_state,
    read_full,
    write_full,
)


def begin(config: TrainConfig) -> TrainState:
    manifest = ShardedDataset(config.shards, "train").manifest
    return make_state(config, make_accelerator(config), make_denoiser(config, manifest).network)


def test_state_is_whole_before_the_first_step(tiny_config: TrainConfig) -> None:
    state = begin(tiny_config)
    assert kinds(state) == ("weights", "exp_avg", "exp_avg_sq", "average_0", "average_1")
    for parameter in state.network.parameters():
        for kind in kinds(state):
            expected = torch.zeros_like(parameter) if kind.startswith("exp") else parameter
            assert torch.equal(read_full(state, parameter, kind), expected)


def test_what_is_written_is_read_and_nothing_else_changes(tiny_config: TrainConfig) -> None:
    state = begin(tiny_config)
    source = torch.Generator().manual_seed(0)
    written = {
        (parameter, kind): torch.randn(parameter.shape, generator=source)
        for parameter in state.network.parameters()
        for kind in kinds(state)
    }
    for (parameter, kind), value in written.items():
        write_full(state, parameter, kind, value)
    for (parameter, kind), value in written.items():
        assert torch.equal(read_full(state, parameter, kind), value)


def test_an_averaged_network_holds_its_average_and_shares_no_memory(
    tiny_config: TrainConfig,
) -> None:
    config = dataclasses.replace(
        tiny_config,
        model=dataclasses.replace(
            tiny_config.model, attention_backend="reference", gradient_checkpointing=True
        ),
    )
    state = begin(config)
    for parameter in state.network.parameters():
        write_full(state, parameter, "average_1", torch.full_like(parameter, 3))
    drawn = torch.random.get_rng_state()
    network = averaged_network(state, 1)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    names = [name for name, _ in state.network.named_parameters()]
    assert [name for name, _ in network.named_parameters()] == names
    assert all((parameter == 3).all() for parameter in network.parameters())
    for parameter in network.parameters():
        parameter.zero_()
    assert (read_full(state, next(iter(state.network.parameters())), "average_1") == 3).all()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    backends = {one.backend for one in network.modules() if isinstance(one, SelfAttention)}
    assert backends == {"reference"}
    assert network.config == state.network.config


def test_counters_go_round_and_adam_counts_updates(tiny_config: TrainConfig) -> None:
    first, second = begin(tiny_config), begin(tiny_config)
    counted = {"step": 9, "skipped": 2, "scale": 8.0, "scale_age": 5}
    first.set_counters(counted | {"began": 17.25, "productive": 3.5})
    second.set_counters(first.counters())
    assert second.counters() == first.counters()
    assert {float(values["step"]) for values in second.optimizer.state.values()} == {7}


@pytest.mark.parametrize("precision, scale", [("float32", 1), ("bfloat16", 1), ("float16", 65536)])
def test_only_float16_scales_its_loss(
    precision: str, scale: float, tiny_config: TrainConfig
) -> None:
    assert begin(dataclasses.replace(tiny_config, precision=precision)).scale == scale


# Torch's own compiler imports what torch calls deprecated.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
def test_the_same_seed_gives_the_same_weights_however_they_are_trained(
    tiny_config: TrainConfig,
) -> None:
    """Compiled, checkpointed and in reduced precision; parameters keep their names."""
    plain = begin(tiny_config)
    changed = dataclasses.replace(
        tiny_config,
        compile=True,
        precision="bfloat16",
        model=dataclasses.replace(tiny_config.model, gradient_checkpointing=True),
    )
    other = begin(changed)
    assert other.network.gradient_checkpointing
    ours, theirs = plain.network.state_dict(), other.network.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    another = begin(dataclasses.replace(tiny_config, seed=1))
    assert not torch.equal(next(another.network.parameters()), next(plain.network.parameters()))


@pytest.fixture
def determinism() -> Iterator[None]:
    """Torch's own setting again afterwards."""
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("determinism")
def test_determinism_is_asked_for_where_it_is_wanted(tiny_config: TrainConfig) -> None:
    make_accelerator(dataclasses.replace(tiny_config, deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
    make_accelerator(tiny_config)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_blank_has_the_networks_shapes_and_no_memory(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, model=ModelConfig(preset="tiny"))
    state = begin(config)
    assert all(one.is_meta for one in state.blank.parameters())
    shapes = [one.shape for one in state.network.parameters()]
    assert [one.shape for one in state.blank.parameters()] == shapes
