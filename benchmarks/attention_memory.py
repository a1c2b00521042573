"""Peak memory of joint attention, compared with the plain formula, which holds its scores."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any, get_args

import torch
from vidfill.errors import BadInput
from vidfill.modeling.attention import Backend, attend, attention_backend
from vidfill.modeling.settings import Precision
from vidfill.processes import choose_device

from .machine import describe, in_new_process, peak_bytes

EXAMPLES = """examples:
  python -m benchmarks.attention_memory
      20 frames of 16x16 places, 4 heads of 64 channels, as in the paper's network; seconds
  python -m benchmarks.attention_memory --device cuda --precision bfloat16
      on a GPU
"""

REFERENCE = "reference"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes that each backend adds to queries, keys and values; None if it does not work here."""
    inputs = 3 * options.tokens * options.heads * options.channels
    size = getattr(torch, options.precision).itemsize
    return {
        "score_bytes": options.heads * options.tokens**2 * 4,  # the formula's are float32
        "input_bytes": inputs * size,
        "backends": in_new_process(peaks_of_all, vars(options)),
    }


def peaks_of_all(options: dict[str, Any]) -> dict[str, dict[str, int] | None]:
    return {backend: peaks(backend, options) for backend in get_args(Backend)}


def peaks(backend: Backend, options: dict[str, Any]) -> dict[str, int] | None:
    device, dtype = torch.device(options["device"]), getattr(torch, options["precision"])
    try:
        attention_backend(device.type, dtype, backend)
    except BadInput:
        return None

    def inputs(tokens: int) -> list[torch.Tensor]:
        shape = (3, 1, tokens, options["heads"], options["channels"])
        torch.manual_seed(0)
        return [x.requires_grad_() for x in torch.randn(shape, device=device).to(dtype)]

    def train(given: list[torch.Tensor]) -> None:
        attend(*given, backend).square().mean().backward()

    train(inputs(64))  # loads the kernels
    given = inputs(options["tokens"])
    with torch.no_grad():
        forward = peak_bytes(device, lambda: attend(*given, backend))
    return {"forward": forward, "training": peak_bytes(device, lambda: train(given))}


def table(found: dict[str, Any]) -> str:
    lines = [
        "| backend | forward | forward and backward | share of the reference |",
        "| --- | ---: | ---: | ---: |",
    ]
    reference = found["backends"][REFERENCE]["training"]
    for backend, row in found["backends"].items():
        if row is None:
            lines.append(f"| {backend} | does not work here | | |")
        else:
            sizes = " | ".join(f"{row[name] / 2**20:,.0f} MiB" for name in ("forward", "training"))
            lines.append(f"| {backend} | {sizes} | {row['training'] / reference:.1%} |")
    return "\n".join(lines)


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention_memory",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    numbers = {
        "tokens": (5120, "places of all frames"),
        "heads": (4, "attention heads"),
        "channels": (64, "per head"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1…; auto (default: cpu)")
    parser.add_argument("--precision", choices=get_args(Precision), default="float32")
    parser.add_argument("--json", action="store_true", help="print only the figures, as JSON")
    options = parser.parse_args(argv)
    for name in numbers:
        if getattr(options, name) < 1:
            parser.error(f"{name} is {getattr(options, name)}: give 1 or more")
    return options


def main(argv: Sequence[str]) -> int:
    options = parse_options(argv)
    try:
        device = choose_device(options.device)
    except BadInput as error:
        print(f"python -m benchmarks.attention_memory: error: {error}", file=sys.stderr)
        return 2
    options.device = str(device)
    found = measure(options)
    found["environment"] = describe(device)
    found["command"] = shlex.join(["python", "-m", "benchmarks.attention_memory", *argv])
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    print(table(found), end="\n\n")
    scores, inputs = (found[name] / 2**20 for name in ("score_bytes", "input_bytes"))
    print(f"beyond queries, keys and values ({inputs:,.0f} MiB); the scores are {scores:,.0f} MiB")
    print(found["environment"], found["command"], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
