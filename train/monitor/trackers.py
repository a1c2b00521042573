"""Where a run's figures go beside TensorBoard: to the trackers that Accelerate opens.

They get the scalars. Pictures, the layout of the first page and the explanations are TensorBoard's.
"""

from __future__ import annotations

import hashlib
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ... import jobs
from ...errors import BadInputEverywhere
from ..config import TrainConfig

PROJECT = "vidfill"
TENSORBOARD = "tensorboard"  # whose events are written here, not by Accelerate


def names_in(config: TrainConfig) -> list[str]:
    """The trackers that a run was told of, each once."""
    return list(dict.fromkeys(config.trackers.replace(",", " ").split()))


def other_trackers(config: TrainConfig) -> list[str]:
    """The names in `config.trackers` that Accelerate opens.

    Raises:
        BadInputEverywhere: One is unknown, or not installed.
    """
    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    names = names_in(config)
    for name in names:
        if name not in known:
            raise BadInputEverywhere(f"trackers has {name!r}: give some of {', '.join(known)}")
        if name not in installed:
            package = name.replace("_", "-")
            raise BadInputEverywhere(
                f"trackers has {name}, which is not installed: pip install {package}"
            )
    return [name for name in names if name != TENSORBOARD]


def begin(config: TrainConfig, accelerator: Accelerator, began: float) -> None:
    """Open the trackers on the first process, with the run's name and options.

    `began` is when the run first started, by which a tracker that can knows the run again.
    """
    names = [str(name) for name in accelerator.log_with]
    if not names:
        return
    name = config.out.resolve().name
    same = hashlib.sha256(f"{name} {began!r}".encode()).hexdigest()[:16]
    own: dict[str, dict[str, Any]] = {
        "wandb": {"name": name, "id": same, "resume": "allow", "dir": str(config.out)},
        "mlflow": {"run_name": name},
    }
    options = {key: str(value) for key, value in jobs.flatten(jobs.record_of(config)).items()}
    accelerator.init_trackers(PROJECT, options, {n: own[n] for n in names if n in own})
