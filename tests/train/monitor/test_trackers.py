"""Figures for other trackers than TensorBoard, through Accelerate's own interface."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
from accelerate import tracking
from vidfill.errors import BadInputEverywhere
from vidfill.train.config import TrainConfig
from vidfill.train.loop import train
from vidfill.train.monitor.trackers import other_trackers


class Recorder(tracking.GeneralTracker):
    """Keeps what a tracker is given."""

    name = "recorder"
    requires_logging_directory = False
    said: ClassVar[list[tuple[str, Any]]] = []

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.said.append(("project", run_name))

    @property
    def tracker(self) -> list[tuple[str, Any]]:
        return self.said

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.said.append(("options", values))

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.said.append((f"step {step}", values))

    def finish(self) -> None:
        self.said.append(("finished", {}))


def test_a_tracker_gets_the_options_and_the_figures_of_each_step(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(
        "vidfill.train.monitor.trackers.get_available_trackers", lambda: ["recorder"]
    )
    Recorder.said.clear()
    train(dataclasses.replace(tiny_config, trackers="recorder", steps=2, log_every=1))
    kinds = [kind for kind, _ in Recorder.said]
    assert kinds[:2] == ["project", "options"]
    assert kinds[-1] == "finished"
    said = dict(Recorder.said)
    assert said["options"]["optimizer.learning_rate"] == str(tiny_config.optimizer.learning_rate)
    losses = [values["train/loss"] for kind, values in Recorder.said if "train/loss" in values]
    assert len(losses) == 2
    assert not list(tiny_config.out.glob("tensorboard/events*"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tensorboard waldo", "trackers has 'waldo': give some of "),
        ("comet_ml", "trackers has comet_ml, which is not installed: pip install comet-ml"),
    ],
)
def test_a_tracker_that_cannot_be_had_is_refused(
    tiny_config: TrainConfig, given: str, message: str
) -> None:
    config = dataclasses.replace(tiny_config, trackers=given)
    with pytest.raises(BadInputEverywhere, match=message):
        other_trackers(config)
    with pytest.raises(BadInputEverywhere, match=message):
        train(config)
    assert not config.out.exists()


def test_names_may_be_separated_as_one_likes(tiny_config: TrainConfig) -> None:
    for given in ("tensorboard", "tensorboard, tensorboard", ""):
        assert other_trackers(dataclasses.replace(tiny_config, trackers=given)) == []
