"""A run that goes on: on the same shards elsewhere, on no others, with options that may change."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from vidfill import jobs
from vidfill.errors import BadInput
from vidfill.train.config import RUN_MAY_CHANGE, EvaluationConfig, TrainConfig
from vidfill.train.export import ExportConfig, export
from vidfill.train.loop import train

Edit = Callable[[dict[str, Any]], object]


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and averages of the newest checkpoint."""
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    return {
        f"{file.relative_to(newest)}:{name}": tensor
        for file in newest.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def assert_equal_states(first: Path, second: Path) -> None:
    ours, theirs = state_of(first), state_of(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def edit_json(path: Path, edit: Edit) -> None:
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(shards: Path) -> Iterator[str]:
    """The URL of the shards."""
    handler = functools.partial(Quiet, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.slow
def test_a_run_goes_on_wherever_its_shards_lie(
    tiny_config: TrainConfig, trained: TrainConfig, served: str, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_config.shards, tmp_path / "moved")
    places = [tiny_config.shards, str(moved), f"file://{moved}", served]
    for steps, place in zip((1, 3, 4, 6), places, strict=True):
        train(dataclasses.replace(tiny_config, shards=place, steps=steps))
    assert_equal_states(tiny_config.out, trained.out)


@pytest.mark.parametrize(
    ("split", "edit"),
    [
        ("train", lambda manifest: manifest["masks"].update(seed=9)),
        ("train", lambda manifest: manifest["shards"].update(sha256=["f" * 64])),
        ("train", lambda manifest: manifest.update(latents_std=[9.0] * 4)),
        ("validation", lambda manifest: manifest["masks"].update(seed=9)),
    ],
)
def test_other_shards_of_the_same_name_are_refused(
    tiny_config: TrainConfig, trained: TrainConfig, tmp_path: Path, split: str, edit: Edit
) -> None:
    shutil.copytree(trained.out, tiny_config.out)
    shards = shutil.copytree(tiny_config.shards, tmp_path / "shards")
    config = dataclasses.replace(tiny_config, shards=str(shards), steps=7)
    edit_json(shards / split / "manifest.json", edit)
    with pytest.raises(BadInput, match=rf"\(shards\.{split}\)"):
        train(config)


def test_all_processes_find_the_same_shards(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ("", {"shards": {"train": "f" * 64}})
    monkeypatch.setattr("vidfill.train.loop.gather_object", lambda mine: [*mine, other])
    with pytest.raises(BadInput, match="process 1 found other shards"):
        train(tiny_config)


def with_rate(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **changes))


def newest_state(run: Path) -> dict[str, Any]:
    newest = (run / "checkpoints" / "latest").read_text()
    return json.loads((run / "checkpoints" / newest / "state.json").read_text())


@pytest.mark.slow
def test_options_that_change_are_said_and_recorded_with_their_first_step(
    tiny_config: TrainConfig,
    trained: TrainConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(trained.out, tiny_config.out)
    slower = with_rate(tiny_config, learning_rate=1e-3)
    evaluated = dataclasses.replace(slower, steps=7, evaluation=EvaluationConfig(every=7))
    train(evaluated)
    assert (
        "vidfill train: from step 7 on evaluation.every is 7 (was 1000), "
        "optimizer.learning_rate is 0.001 (was 0.002), steps is 7 (was 6); "
        "this changes the learning rate, and so the result\n"
    ) in capsys.readouterr().err
    train(evaluated)
    assert " (was " not in capsys.readouterr().err
    train(dataclasses.replace(evaluated, steps=8, log_every=4))
    assert "8 on log_every is 4 (was 1), steps is 8 (was 7)\n" in capsys.readouterr().err
    assert newest_state(tiny_config.out)["history"] == [
        {
            "step": 7,
            "changed": {
                "evaluation.every": [1000, 7],
                "optimizer.learning_rate": [2e-3, 1e-3],
                "steps": [6, 7],
            },
        },
        {"step": 8, "changed": {"log_every": [1, 4], "steps": [7, 8]}},
    ]
    events = EventAccumulator(str(tiny_config.out / "tensorboard"))
    events.Reload()
    (*_, shown) = events.Tensors("history/text_summary")
    assert shown.step == 7
    assert b"from step 8 on log_every is 4" in shown.tensor_proto.string_val[0]
    export(ExportConfig(tiny_config.out, tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "- From step 7 on optimizer.learning_rate is 0.001 (was 0.002), steps is 7" in card
    assert "log_every" not in card


@pytest.mark.slow
def test_a_run_under_cosine_decay_resumes_exactly_and_says_what_other_steps_change(
    tiny_config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_rate(tiny_config, decay="cosine")
    train(config)
    shutil.copytree(config.out, tmp_path / "whole")
    shutil.rmtree(config.out / "checkpoints" / "step-00000006")
    train(config)
    assert_equal_states(config.out, tmp_path / "whole")
    assert " (was " not in capsys.readouterr().err
    train(dataclasses.replace(config, steps=7))
    assert "steps is 7 (was 6); this changes the learning rate" in capsys.readouterr().err


def test_what_changes_the_function_or_the_data_may_not_change(
    tiny_config: TrainConfig, trained: TrainConfig
) -> None:
    shutil.copytree(trained.out, tiny_config.out)
    groups = tuple(f"{group}." for group in RUN_MAY_CHANGE)
    record = json.loads((tiny_config.out / "job.json").read_text())
    refused = []
    for name in sorted(options_of(record["config"])):
        if name in (*RUN_MAY_CHANGE, "out") or name.startswith(groups):
            continue
        *parents, last = name.split(".")
        edit_json(
            tiny_config.out / "job.json",
            lambda job, parents=parents, last=last: functools.reduce(
                dict.__getitem__, parents, job["config"]
            ).update({last: "another"}),
        )
        claim = jobs.claim(tiny_config.out, "train", tiny_config, may_change=RUN_MAY_CHANGE)
        with pytest.raises(BadInput, match=f"{name} was 'another', now "), claim:
            pass
        (tiny_config.out / "job.json").write_text(json.dumps(record))
        refused.append(name)
    assert {"seed", "batch_size", "precision", "diffusion.target", "loss.hole"} < set(refused)
    assert {"model.conditioning", "optimizer.clip", "optimizer.ema_decays"} < set(refused)


def options_of(tree: dict[str, Any], prefix: str = "") -> set[str]:
    names: set[str] = set()
    for name, value in tree.items():
        inner = isinstance(value, dict)
        names |= options_of(value, f"{prefix}{name}.") if inner else {prefix + name}
    return names
