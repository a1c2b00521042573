"""Loads the two frozen networks that judge results, LPIPS's AlexNet and I3D."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ...errors import BadInput

Features = Float[np.ndarray, " features"]

HUB = "hf://"  # prefix of a file on the Hugging Face hub

Network = TypeVar("Network", bound=nn.Module)


def load(network: type[Network], name: str, device: str | torch.device = "cpu") -> Network:
    """A frozen `Lpips` or `I3d` in float32, with the weights of a float16 or float32 file.

    `name` is the file, or hf://OWNER/NAME/FILE for one on the Hugging Face hub.

    Raises:
        BadInput: the file cannot be read, or holds other tensors than the network's.
    """
    try:
        file = name
        if name.startswith(HUB):
            owner, repository, path = name.removeprefix(HUB).split("/", 2)
            file = hf_hub_download(f"{owner}/{repository}", path)
        tensors = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(
            f"cannot load {network.__name__} from {name}: {reason}; give a safetensors file, "
            "or hf://OWNER/NAME/FILE"
        ) from error
    with torch.device("meta"):
        built = network()
    try:
        built.load_state_dict({key: tensors[key].float() for key in tensors}, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1].split())
        raise BadInput(
            f"{name} does not hold {network.__name__}'s tensors ({reason[:80]}…): "
            "docs/metrics.md names them"
        ) from error
    return built.eval().requires_grad_(False).to(device)
