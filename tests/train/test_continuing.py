"""A run that goes on: on the same shards elsewhere, on no others."""

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
from vidfill.errors import BadInput
from vidfill.train.config import TrainConfig
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
