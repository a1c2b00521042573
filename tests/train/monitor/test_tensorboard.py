"""What TensorBoard and the console show: what was measured, the same on one process and on two."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from vidfill.data.shards.format import Example
from vidfill.data.shards.reading import ShardedDataset
from vidfill.data.shards.stream import Stream
from vidfill.errors import BadInput
from vidfill.modeling.cost import measure
from vidfill.modeling.denoiser import Denoiser
from vidfill.train.config import (
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PreviewConfig,
    TrainConfig,
)
from vidfill.train.monitor.held_out import open_held_out
from vidfill.train.monitor.previews import PREVIEW_GAP, open_preview
from vidfill.train.monitor.profiling import Profile, profiled_steps
from vidfill.train.monitor.rates import measure_rate
from vidfill.train.monitor.tags import IMAGES, LAYOUT, SCALARS
from vidfill.train.monitor.tensorboard import Monitor
from vidfill.train.state import (
    TrainState,
    averaged_network,
    make_accelerator,
    make_denoiser,
    make_state,
)
from vidfill.train.step import StepResult, train_step

ONLY_FLOAT16 = {"train/loss_scale"}

Followed = tuple[TrainConfig, list[StepResult]]


@dataclasses.dataclass
class Run:
    """The parts of a run that its monitor is given."""

    config: TrainConfig
    accelerator: Accelerator
    denoiser: Denoiser
    state: TrainState
    stream: Stream

    def monitor(
        self,
        clock: Callable[[], float] = time.monotonic,
        previews: bool = False,
        now: Callable[[], float] = time.time,
    ) -> Monitor:
        preview = open_preview(self.config, self.denoiser, self.accelerator.device)
        shown = preview if previews else None
        parts = self.state, self.denoiser, self.stream, shown, self.accelerator
        return Monitor(self.config, *parts, clock, now)


def begin(config: TrainConfig) -> Run:
    dataset = ShardedDataset(config.shards, "train")
    accelerator = make_accelerator(config)
    denoiser = make_denoiser(config, dataset.manifest)
    state = make_state(config, accelerator, denoiser.network)
    process, processes = accelerator.process_index, accelerator.num_processes
    stream = Stream(dataset, config.batch_size, config.seed, process, processes)
    return Run(config, accelerator, denoiser, state, stream)


def follow(config: TrainConfig) -> list[StepResult]:
    """Train with all that is shown of it: what the loop does, without its checkpoints."""
    run = begin(config)
    held_out = open_held_out(
        config, run.denoiser, run.accelerator.process_index, run.accelerator.num_processes
    )
    assert held_out
    results = []
    with (
        run.monitor(previews=run.accelerator.is_main_process) as monitor,
        contextlib.closing(run.stream.run(run.state.step)) as batches,
    ):
        for _ in range(config.steps):
            results.append(
                train_step(run.state, next(batches), run.denoiser, run.accelerator, config)
            )
            monitor.step(run.state, results[-1])
        averaged = run.denoiser.with_network(averaged_network(run.state))
        monitor.evaluation(run.state.step, held_out.measure(averaged, run.accelerator))
        monitor.preview(run.state.step, averaged)
        monitor.checkpoint(run.state.step, 0.25)
        monitor.written(run.state.step, 0.5)
    return results


def events_of(config: TrainConfig) -> EventAccumulator:
    events = EventAccumulator(str(config.out / "tensorboard"))
    events.Reload()
    return events


def scalars_of(config: TrainConfig) -> dict[str, dict[int, float]]:
    """Each tag's values by step."""
    events = events_of(config)
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def configured(shards: Path, out: Path) -> TrainConfig:
    """The smallest run that shows everything."""
    return TrainConfig(
        str(shards),
        out,
        steps=4,
        batch_size=3,
        log_every=2,
        model=ModelConfig(block_out_channels=(16, 32), head_channels=8, norm_groups=8),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup=2),
        preview=PreviewConfig(clips=1, schedule="ddim:1"),
        evaluation=EvaluationConfig(quantiles=2),
    )


@pytest.fixture(scope="module")
def followed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Followed:
    """A run that was followed, and what its steps measured."""
    config = configured(shards, tmp_path_factory.mktemp("followed") / "run")
    return config, follow(config)


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> TrainConfig:
    return configured(shards, tmp_path / "run")


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """Accelerate keeps one state a process; each test has its own."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def a_step(loss: float, norm: float = 1.0) -> StepResult:
    return StepResult(torch.tensor(loss), norm, 0.1)


def test_what_was_measured_is_what_tensorboard_shows(followed: Followed) -> None:
    config, results = followed
    values = scalars_of(config)
    assert values.keys() == set(SCALARS) - ONLY_FLOAT16 | {"held_out/loss_quantile_2"}
    for step in (2, 4):
        first, second = results[step - 2 : step]
        assert values["train/loss"][step] == pytest.approx(float(first.loss + second.loss) / 2)
        norms = first.gradient_norm, second.gradient_norm
        assert values["train/gradient_norm"][step] == pytest.approx(sum(norms) / 2)
        assert values["train/gradient_norm_largest"][step] == pytest.approx(max(norms))
        assert values["train/learning_rate"][step] == pytest.approx(second.learning_rate)
        assert values["train/epochs"][step] == step * 3 / 4
    assert values["time/checkpoint_seconds"] == {4: 0.25}
    assert values["time/checkpoint_written_seconds"] == {4: 0.5}
    assert values["time/preview_seconds"][4] > 0
    assert values["memory/gigabytes"][4] < 20
    images = events_of(config)
    assert set(images.Tags()["images"]) == set(IMAGES)
    kinds = {
        tag: Image.open(io.BytesIO(images.Images(tag)[0].encoded_image_string)) for tag in IMAGES
    }
    assert (kinds["samples/frames"].format, kinds["samples/film"].format) == ("PNG", "GIF")
    assert kinds["samples/film"].n_frames == 20


def test_the_first_page_shows_what_there_is(followed: Followed) -> None:
    config, _ = followed
    tags = scalars_of(config).keys()
    events = events_of(config)
    (layout,) = events.Tensors("custom_scalars__config__")
    categories = Layout.FromString(layout.tensor_proto.string_val[0]).category
    assert [category.title for category in categories] == list(LAYOUT)
    for category in categories:
        for chart in category.chart:
            for pattern in chart.multiline.tag:
                assert any(re.search(pattern, tag) for tag in tags), pattern


def test_the_configuration_is_there_and_every_value_is_explained(followed: Followed) -> None:
    config, _ = followed
    events = events_of(config)
    (explanation,) = events.Tensors("explanation/text_summary")
    explained = explanation.tensor_proto.string_val[0].decode()
    for tag in [*SCALARS, *IMAGES]:
        assert f"\n| {tag} | " in explained
    (text,) = events.Tensors("configuration/text_summary")
    said = yaml.safe_load(text.tensor_proto.string_val[0])
    assert said["shards"] == str(Path(config.shards).resolve())
    assert said["model"]["block_out_channels"] == [16, 32]
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")


def test_the_weight_norm_is_that_of_all_weights_together(config: TrainConfig) -> None:
    run = begin(config)
    with run.monitor() as monitor:
        run.state.step = 2
        monitor.step(run.state, a_step(1.0))
    flat = torch.cat([parameter.detach().flatten() for parameter in run.state.network.parameters()])
    assert scalars_of(config)["train/weight_norm"][2] == pytest.approx(float(flat.norm()))


def test_a_step_that_was_left_out_is_not_in_the_means(config: TrainConfig) -> None:
    run = begin(config)
    with run.monitor() as monitor:
        for step, loss, norm in ((1, 0.5, 2.0), (2, math.nan, math.nan)):
            run.state.step = step
            monitor.step(run.state, a_step(loss, norm))
        run.state.skipped = 3
        for step in (3, 4):
            run.state.step = step
            monitor.step(run.state, a_step(math.nan, math.inf))
    values = scalars_of(config)
    assert values["train/loss"] == {2: 0.5}
    assert values["train/gradient_norm"] == {2: 2.0}
    assert values["train/skipped_steps"] == {2: 0, 4: 3}


def test_rates_and_shares_of_time_follow_from_the_clock(config: TrainConfig) -> None:
    """Two steps of 2 s, of which data took 0.5 s; 10 s of evaluation; again two steps.

    The run was begun 100 s ago, and 40 s of them went into steps.
    """
    run = begin(config)
    now = 1000.0
    run.state.began, run.state.productive = now - 100, 40.0
    with run.monitor(lambda: now, now=lambda: now) as monitor:
        for step in range(1, 5):
            now += 2
            run.stream.waited += 0.5
            run.state.step = step
            note = monitor.step(run.state, a_step(0.25))
            if step == 2:
                now += 10
                monitor.evaluation(2, {"loss": 1.0})
    values = scalars_of(config)
    assert note == "loss 0.2500, 1.5 clips/s, 25% waiting for data"
    assert run.state.productive == pytest.approx(40 + 4 * 1.5)
    assert values["speed/clips_per_second"] == {2: 1.5, 4: 1.5}
    assert values["speed/seconds_per_step"] == {2: 2, 4: 2}
    assert values["time/data_wait"] == {2: 0.25, 4: 0.25}
    assert values["time/evaluation_seconds"] == {2: 10}
    assert values["time/goodput"] == pytest.approx({2: 43 / 104, 4: 46 / 118})
    assert values["time/lost_to_restarts"] == pytest.approx({2: 60 / 104, 4: 60 / 118})


@pytest.mark.parametrize("hours", [-2, 2])
def test_a_clock_that_is_set_makes_no_share_of_time_absurd(config: TrainConfig, hours: int) -> None:
    """Set once while the run works, and once between two of its lives."""
    run, clocks = begin(config), {"passed": 0.0, "wall": time.time()}
    for life in range(2):
        with run.monitor(lambda: clocks["passed"], now=lambda: clocks["wall"]) as monitor:
            clocks["wall"] += 3600 * hours
            for step in range(2 * life + 1, 2 * life + 3):
                clocks.update({name: clock + 2 for name, clock in clocks.items()})
                run.state.step = step
                monitor.step(run.state, a_step(0.25))
    values = scalars_of(config)
    assert run.state.productive == 8
    for step in (2, 4):
        goodput, lost = (values[f"time/{name}"][step] for name in ("goodput", "lost_to_restarts"))
        assert 0 < goodput <= 1
        assert 0 <= lost < 1
    assert values["speed/seconds_per_step"] == {2: 2, 4: 2}


@pytest.mark.slow
def test_the_share_of_the_peak_counts_three_forward_passes(config: TrainConfig) -> None:
    """A product of two multiply-adds is two operations; latents of the tiny clips are 4x4."""
    config = dataclasses.replace(
        config,
        model=ModelConfig(preset="tiny"),
        preview=PreviewConfig(every=0),
    )
    run = begin(config)
    now = 0.0
    with run.monitor(lambda: now) as monitor:
        peak = monitor._peak
        now, run.state.step = 4.0, 2
        monitor.step(run.state, a_step(1.0))
    # The preset's cost is that of a condition of as many channels as the latents, as here.
    operations = 2 * measure("tiny", 20, 4, 4).multiply_adds
    speed = 3 / 4.0
    shown = scalars_of(config)["speed/share_of_peak"][2]
    assert shown == pytest.approx(3 * operations * speed / peak, rel=1e-6)


def test_a_network_of_matrix_products_alone_could_reach_the_measured_peak() -> None:
    """Within a factor of five, on a machine that others use: the order of magnitude is right."""
    matrix = torch.ones(768, 768)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - began)
    rate = 2 * 768**3 / min(times)
    assert 0.2 < measure_rate(torch.device("cpu"), "float32") / rate < 5


def test_a_continued_run_shows_no_later_events_of_its_earlier_life(config: TrainConfig) -> None:
    config = dataclasses.replace(config, log_every=1)
    for first, losses in ((0, [1.0, 2.0, 3.0, 4.0]), (2, [30.0])):
        run = begin(config)
        run.state.step = first
        with run.monitor() as monitor:
            for step, loss in enumerate(losses, start=first + 1):
                run.state.step = step
                monitor.step(run.state, a_step(loss))
    assert scalars_of(config)["train/loss"] == {1: 1, 2: 2, 3: 30}


def test_a_step_without_logging_costs_under_a_thousandth_of_a_tenth_second(
    config: TrainConfig,
) -> None:
    """Processor time, since others use the machine; the best of five hundreds of steps."""
    run = begin(dataclasses.replace(config, log_every=10**6, steps=10**6))
    result = a_step(1.0)
    costs = []
    with run.monitor() as monitor:
        for _ in range(5):
            began = time.process_time()
            for _ in range(100):
                run.state.step += 1
                monitor.step(run.state, result)
            costs.append((time.process_time() - began) / 100)
    assert min(costs) < 0.001 * 0.1


@pytest.mark.slow
def test_two_processes_show_what_one_does(followed: Followed, tmp_path: Path) -> None:
    """Batches of three clips, which two processes cannot share evenly; over gloo."""
    config, _ = followed
    two = tmp_path / "two"
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from test_tensorboard import configured, follow\n"
        f"follow(configured(Path({config.shards!r}), Path({str(two)!r})))\n"
    )
    subprocess.run(
        [*(sys.executable, "-m", "torch.distributed.run"), "--nproc_per_node=2", str(script)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    ours, theirs = scalars_of(config), scalars_of(dataclasses.replace(config, out=two))
    assert theirs.keys() == ours.keys()
    for tag, values in ours.items():
        if tag.startswith(("train/", "held_out/")):
            assert theirs[tag] == pytest.approx(values, rel=1e-4), tag
    slowest = theirs["speed/slowest_over_mean"]
    assert all(1 <= ratio <= 2 for ratio in slowest.values())
    assert set(theirs["speed/slowest_process"].values()) <= {0, 1}
    clips = theirs["speed/clips_per_second"]
    each = theirs["speed/clips_per_second_per_device"]
    assert {step: 2 * speed for step, speed in each.items()} == pytest.approx(clips)


def test_a_preview_shows_the_truth_outside_the_hole(config: TrainConfig) -> None:
    run = begin(config)
    preview = open_preview(config, run.denoiser, torch.device("cpu"))
    assert preview
    run.state.network.eval()
    (clip,) = preview.draw(run.denoiser)
    example: Example = preview.examples[0]
    width = example.mask.shape[2]
    masked, filled, truth = (
        clip[:, :, n * (width + PREVIEW_GAP) :][:, :, :width] for n in range(3)
    )
    outside = example.mask == 0
    assert example.pixels is not None
    assert np.array_equal(truth, example.pixels)
    assert np.array_equal(filled[outside], truth[outside])
    assert np.array_equal(masked[outside], truth[outside])
    assert (masked[~outside] == example.record["fill"]).all()


def test_the_steps_that_were_asked_for_are_profiled(tmp_path: Path) -> None:
    profile = Profile(profiled_steps("2:4"), tmp_path / "profile")
    for finished in range(6):
        profile.step(finished)
        with torch.profiler.record_function(f"step after {finished}"):
            torch.ones(2) + 1
    profile.end(6)
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "steps-2-4.json.gz"
    names = {
        event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    }
    assert {name for name in names if str(name).startswith("step after")} == {
        "step after 2",
        "step after 3",
    }


def test_a_run_that_ends_early_leaves_what_was_profiled(config: TrainConfig) -> None:
    run = begin(dataclasses.replace(config, profile="1:1000"))
    with run.monitor() as monitor:
        for step in (1, 2, 3):
            run.state.step = step
            monitor.step(run.state, a_step(1.0))
    assert [file.name for file in (config.out / "profile").iterdir()] == ["steps-1-3.json.gz"]


@pytest.mark.parametrize("text", ["5", "5:", "5:5", "6:5", "a:b", "-1:4", "1:2:3", "1.5:3"])
def test_steps_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match=f"profile is '{re.escape(text)}': give .* as 100:105"):
        profiled_steps(text)
    assert not profiled_steps("")
