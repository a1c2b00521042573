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
from vidfill.launch.launch import LaunchConfig, read_tasks
from vidfill.modeling.denoiser import Denoiser
from vidfill.modeling.settings import DiffusionConfig
from vidfill.train.config import RUN_MAY_CHANGE, EvaluationConfig, ExportConfig, TrainConfig
from vidfill.train.export import export
from vidfill.train.loop import train
from vidfill.train.preflight.doctor import doctor

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


def test_all_processes_find_the_same_shards_and_model(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, what in (("shards", "other shards"), ("from", "another model")):
        gather = lambda mine, name=name: [*mine, mine[0] | {name: "other"}]  # noqa: E731
        monkeypatch.setattr("vidfill.train.loop.gather_object", gather)
        with pytest.raises(BadInput, match=f"process 1 found {what}"):
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
        with pytest.raises(BadInput, match=f"{name.rstrip('_')} was 'another', now "), claim:
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


@pytest.fixture(scope="module")
def model(trained: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `trained` exports."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(ExportConfig(trained.out, folder))
    return folder


@pytest.fixture
def tuned(tiny_config: TrainConfig, model: Path) -> TrainConfig:
    """A run that begins with that model's weights, and takes one step that changes none of them."""
    config = dataclasses.replace(tiny_config, from_=str(model), steps=1, seed=5)
    return with_rate(config, learning_rate=1e-30, warmup=0)


def test_a_run_begins_with_a_models_weights_and_says_so(
    tuned: TrainConfig, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dataclasses.replace(tuned, diffusion=DiffusionConfig(target="v")))
    theirs = Denoiser.load(model)
    sha256 = theirs.fingerprint()["weights"]
    assert (
        f"begun with the weights of {model} ({sha256:.12}); from step 1 on diffusion.target is "
        "'v' (was 'noise'); --diffusion.target \"noise\" trains on as that model was trained\n"
    ) in capsys.readouterr().err
    weights = theirs.network.state_dict()
    for name, tensor in state_of(tuned.out).items():
        kind, _, parameter = name.rpartition(":")
        assert torch.equal(tensor, weights[parameter]) or kind.startswith("exp_avg")
    record = jobs.read_job(tuned.out)
    assert record and record.stands_on
    assert record.stands_on["from"]["weights"] == sha256
    export(ExportConfig(tuned.out, tmp_path / "again"))
    card = (tmp_path / "again" / "README.md").read_text()
    assert f"- Begun with the weights of model ({sha256:.12}); from step 1 on diff" in card
    assert str(model) not in card


@pytest.mark.slow
def test_a_run_that_has_begun_goes_on_without_the_model(
    tuned: TrainConfig, model: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "model"
    config = dataclasses.replace(tuned, from_=str(shutil.copytree(model, moved)))
    with pytest.MonkeyPatch.context() as patch:  # killed before its first checkpoint
        patch.setattr("vidfill.train.loop.make_state", None)
        with pytest.raises(TypeError):
            train(config)
    edit_json(moved / "model_index.json", lambda record: record["latents"].update(std=[9.0] * 4))
    with pytest.raises(BadInput, match=r"\(from\.latents\.std\)"):
        train(config)
    shutil.rmtree(moved)
    shutil.copytree(model, moved)
    train(config)
    shutil.rmtree(moved)
    train(dataclasses.replace(config, steps=2))
    assert "from" in newest_state(config.out)["history"][0]
    with pytest.raises(BadInput, match=r"\(from was '.*model', now ''\)"):
        train(dataclasses.replace(config, from_=""))


UNFIT = [
    (["--from", "nowhere"], "nowhere holds no model"),
    (["--from", "shipped"], "--from is shipped, a network of .*block_out_channels.* another model"),
    (["--diffusion.mask_channel"], "a network of condition_channels 4 .here 5.: give model"),
    (["--model.layers_per_block", "2"], "a network of layers_per_block 1 .here 2.: give"),
    (["--model.head_channels", "4"], "a network of head_channels 8 .here 4.: give"),
    (["--model.conditioning", "adaptive"], "a network of conditioning 'concatenation'"),
]


@pytest.mark.parametrize(("words", "said"), UNFIT)
def test_a_model_that_does_not_fit_is_refused_before_anything_is_written(
    tuned: TrainConfig, model: Path, words: list[str], said: str
) -> None:
    first = [tuned.shards, str(tuned.out), "--from", str(model), *SMALL]
    config = jobs.parse(TrainConfig, [*first, *words], verb="train")
    for job in (train, lambda config: train(dataclasses.replace(config, plan=True))):
        with pytest.raises(BadInput, match=said):
            job(config)
    assert not config.out.exists()


SMALL = [
    *("--model.block_out_channels", "[16,32]", "--model.head_channels", "8"),
    *("--model.norm_groups", "8", "--preview.every", "0", "--batch_size", "3", "--steps", "1"),
]


def test_a_model_of_another_autoencoder_is_refused(
    tuned: TrainConfig, model: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    edit_json(
        other / "model_index.json",
        lambda record: record["latents"]["autoencoder"].update(sha256="f" * 64),
    )
    with pytest.raises(BadInput, match=r"whose sha256 is .* --from is .* whose sha256 is f"):
        train(dataclasses.replace(tuned, from_=str(other)))


def test_the_doctor_and_the_launcher_know_of_the_model(
    tuned: TrainConfig, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor(tuned)
    assert "the weights of" in capsys.readouterr().out
    (task,) = read_tasks(LaunchConfig(f"train shards run --from {model}"))
    assert task.training and task.training.from_ == str(model)
