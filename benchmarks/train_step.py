"""One training step of our networks compared with diffusers', on equal input, and the limit."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from vidfill.errors import BadInput
from vidfill.modeling.precision import autocast
from vidfill.modeling.settings import PRESETS, Precision
from vidfill.modeling.unet import VideoUNet, build
from vidfill.processes import choose_device

from . import peers
from .machine import clock, describe, in_new_process, peak_bytes, spread, summarise

EXAMPLES = """examples:
  python -m benchmarks.train_step
      `small` and its peers, a minute or two on two cores
  python -m benchmarks.train_step --threads 1 --processor-time
      the same on one core of a shared machine
  python -m benchmarks.train_step --device cuda --precision bfloat16 --compile
      on a GPU: latents of 32x32, and as many clips as fit
  python -m benchmarks.train_step --device cuda --precision bfloat16 --networks ramvid-32 base
      two networks of ours
  python -m benchmarks.train_step --json > figures.json
      only the figures
"""

# As many levels as `small` has. In diffusers' own proportions most parameters are at the coarse
# levels, where a parameter costs least and, in latents as small as these, sees least.
LEVELS = (64, 96, 160)
PEERS: dict[str, Callable[[int, int], nn.Module]] = {
    **peers.PEERS,
    **{
        f"{name}-{'-'.join(map(str, LEVELS))}": functools.partial(make, widths=LEVELS)
        for name, make in peers.PEERS.items()
    },
}
NETWORKS = (*PRESETS, *PEERS)
CHANNELS = 4
PARTS = ("forward", "backward", "optimizer")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is the same for all networks."""

    device: torch.device
    precision: Precision
    compiled: bool
    threads: int
    processor_time: bool
    batch: int
    frames: int
    latent: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, self.frames, CHANNELS, self.latent, self.latent)


class Training(NamedTuple):
    """A network in training, and its data."""

    network: nn.Module
    predict: Any  # the network, compiled if asked for
    optimizer: torch.optim.Optimizer
    latents: Tensor
    timestep: Tensor
    condition: Tensor
    target: Tensor


class Products(NamedTuple):
    """The matrix products, convolutions and attentions of a step, one entry each."""

    operations: list[int]  # floating-point, as torch's FlopCounterMode counts them
    moved: list[int]  # bytes of inputs and outputs


def start_training(name: str, setting: Setting) -> Training:
    torch.manual_seed(0)
    make = PEERS.get(name, functools.partial(build, name))
    network = make(CHANNELS, CHANNELS).to(setting.device)
    predict = torch.compile(network) if setting.compiled else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    latents, condition, target = torch.randn(3, *setting.shape).to(setting.device)
    timestep = torch.arange(setting.batch, device=setting.device)
    return Training(network, predict, optimizer, latents, timestep, condition, target)


def forward(training: Training, setting: Setting, network: Any) -> Tensor:
    """The loss."""
    with autocast(setting.device, setting.precision):
        prediction = network(training.latents, training.timestep, training.condition)
    return (prediction.float() - training.target).square().mean()


def step(training: Training, setting: Setting) -> dict[str, float]:
    """Train for one step; the seconds of each part."""
    times = [clock(setting.device, setting.processor_time)]
    loss = forward(training, setting, training.predict)
    times.append(clock(setting.device, setting.processor_time))
    loss.backward()
    times.append(clock(setting.device, setting.processor_time))
    training.optimizer.step()
    training.optimizer.zero_grad()
    times.append(clock(setting.device, setting.processor_time))
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return dict(zip(PARTS, seconds, strict=True)) | {"step": times[-1] - times[0]}


# What a step must do, and how fast that could be


class Counter(TorchDispatchMode):
    """Records the products of everything that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.products = Products([], [])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **kwargs or {})
        # Torch has no formula for the CPU's attention; that of the other backends applies.
        name = str(func.overloadpacket).removesuffix("_for_cpu").replace("_for_cpu_", "_")
        formula = FORMULAS.get(name)
        if formula is not None:
            self.products.operations.append(formula(*args, **kwargs or {}, out_val=output))
            tensors = [each for each in tree_leaves((args, output)) if isinstance(each, Tensor)]
            self.products.moved.append(sum(each.nbytes for each in tensors))
        return output


FORMULAS = {str(operator): formula for operator, formula in flop_registry.items()}


def count_products(training: Training, setting: Setting) -> Products:
    """The products of a forward and a backward pass."""
    network = training.network
    if isinstance(network, VideoUNet):
        network.set_attention_backend("sdpa")  # the one with formulas
    forward(training, setting, network)  # attention tests its backend when it first runs
    with Counter() as counter:
        forward(training, setting, network).backward()
    training.optimizer.zero_grad()
    if isinstance(network, VideoUNet):
        network.reset_attention_backend()
    return counter.products


def matrix_rate(setting: Setting) -> float:
    """Operations per second of the fastest of three large matrix products."""
    size = 2048 if setting.device.type == "cpu" else 8192
    dtype = getattr(torch, setting.precision)
    a, b = torch.randn(2, size, size, device=setting.device, dtype=dtype)
    return 2 * size**3 / least_seconds(setting, lambda: a @ b)


def bandwidth(setting: Setting) -> float:
    """Bytes per second, read and written, of the fastest of three large copies."""
    source = torch.zeros(2**28, device=setting.device, dtype=torch.uint8)
    copy = torch.empty_like(source)
    return 2 * source.nbytes / least_seconds(setting, lambda: copy.copy_(source))


def least_seconds(setting: Setting, work: Any) -> float:
    seconds = []
    for _ in range(4):  # the first also allocates memory
        began = clock(setting.device, setting.processor_time)
        work()
        seconds.append(clock(setting.device, setting.processor_time) - began)
    return min(seconds[1:])


# What is measured


def measure(names: Sequence[str], setting: Setting, rounds: int) -> dict[str, Any]:
    trainings = {name: start_training(name, setting) for name in names}
    products = {name: count_products(each, setting) for name, each in trainings.items()}
    for each in trainings.values():  # loads kernels, allocates memory and moments, compiles
        step(each, setting)
    measured = time_rounds(trainings, setting, rounds)
    found: dict[str, Any] = {
        "input": {"clips": setting.batch, "frames": setting.frames, "latent": setting.latent},
        "matrix_rate": summarise([each["matrix_rate"] for each in measured]),
        "bandwidth": summarise([each["bandwidth"] for each in measured]),
        "networks": {
            name: summarise_network(name, training, products[name], measured)
            for name, training in trainings.items()
        },
        "ratios": {
            name: {peer: summarise(ratios(measured, name, peer)) for peer in names if peer in PEERS}
            for name in names
            if name not in PEERS
        },
    }
    trainings.clear()
    torch.cuda.empty_cache()  # the process below needs the memory
    peaks = in_new_process(peaks_of_steps, names, setting)
    for name, peak in peaks.items():
        found["networks"][name]["peak_bytes"] = peak
    return found


def time_rounds(
    trainings: dict[str, Training], setting: Setting, rounds: int
) -> list[dict[str, Any]]:
    """The machine's rates and each network's step; each round starts with a different network."""
    names, measured = list(trainings), []
    for index in range(rounds):
        first = index % len(names)
        turns = [*names[first:], *names[:first]]
        rates = {"matrix_rate": matrix_rate(setting), "bandwidth": bandwidth(setting)}
        measured.append(rates | {name: step(trainings[name], setting) for name in turns})
    return measured


def ratios(measured: Sequence[dict[str, Any]], name: str, peer: str) -> list[float]:
    return [each[name]["step"] / each[peer]["step"] for each in measured]


def summarise_network(
    name: str, training: Training, products: Products, measured: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    operations = sum(products.operations)
    limits = [operations / each["matrix_rate"] for each in measured]
    roofs = [roofline(products, each["matrix_rate"], each["bandwidth"]) for each in measured]
    steps = [each[name]["step"] for each in measured]
    return {
        "parameters": peers.count_parameters(training.network),
        "operations": operations,
        "seconds": {
            part: summarise([each[name][part] for each in measured]) for part in (*PARTS, "step")
        },
        "of_limit": summarise([a / b for a, b in zip(limits, steps, strict=True)]),
        "of_roofline": summarise([a / b for a, b in zip(roofs, steps, strict=True)]),
    }


def roofline(products: Products, rate: float, bytes_per_second: float) -> float:
    """The least seconds for the products, each limited by its operations or by its bytes.

    Everything between the products, and the optimizer, is counted as free.
    """
    pairs = zip(products.operations, products.moved, strict=True)
    return sum(max(count / rate, size / bytes_per_second) for count, size in pairs)


def peaks_of_steps(names: Sequence[str], setting: Setting) -> dict[str, int]:
    """Peak bytes of each network with its gradients and moments, over two steps."""
    torch.set_num_threads(setting.threads)

    def train(name: str) -> None:
        training = start_training(name, setting)
        for _ in range(2):
            step(training, setting)

    train(names[0])  # loads what torch then keeps for all
    return {name: peak_bytes(setting.device, functools.partial(train, name)) for name in names}


def largest_batch(names: Sequence[str], setting: Setting) -> int:
    """The largest power of two of clips with which every network can train on this GPU."""
    while all(fits(name, dataclasses.replace(setting, batch=2 * setting.batch)) for name in names):
        setting = dataclasses.replace(setting, batch=2 * setting.batch)
    return setting.batch


def fits(name: str, setting: Setting) -> bool:
    """Whether it can train uncompiled, which `measure` does too."""
    try:
        training = start_training(name, dataclasses.replace(setting, compiled=False))
        for _ in range(2):
            step(training, dataclasses.replace(setting, compiled=False))
    except torch.OutOfMemoryError:
        return False
    finally:
        training = None
        torch.cuda.empty_cache()
    return True


# What is printed


def table(found: dict[str, Any]) -> str:
    lines = [
        "| network | parameters | operations | forward, s | backward, s | optimizer, s | step, s "
        "| of the limit | of the roofline | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in found["networks"].items():
        cells = [
            name,
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['operations'] / 1e9:.1f} G",
            *(f"{row['seconds'][part][0]:.3f}" for part in PARTS),
            spread(row["seconds"]["step"], "{:.3f}"),
            spread(row["of_limit"], "{:.0%}"),
            spread(row["of_roofline"], "{:.0%}"),
            f"{row['peak_bytes'] / 2**20:,.0f} MiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio_table(found: dict[str, Any]) -> str:
    lines = ["| network | compared with | time of a step / theirs |", "| --- | --- | ---: |"]
    lines += [
        f"| {name} | {peer} | {spread(ratio, '{:.2f}')} |"
        for name, row in found["ratios"].items()
        for peer, ratio in row.items()
    ]
    return "\n".join(lines)


def print_tables(found: dict[str, Any], options: argparse.Namespace) -> None:
    size = found["input"]
    rate, copied = (spread(found[name], "{:.3g}") for name in ("matrix_rate", "bandwidth"))
    kind = "processor" if options.processor_time else "wall"
    print(table(found), ratio_table(found), sep="\n\n", end="\n\n")
    print(
        f"{kind} seconds, median (least–most) of {options.rounds} round(s), ratios within a round\n"
        f"{size['clips']} clip(s) of {size['frames']} frames of {size['latent']}×{size['latent']} "
        f"latents, {options.precision}{', compiled' if options.compile else ''}\n"
        f"{rate} operations/s in matrix products, {copied} bytes/s in copies"
    )
    print(found["environment"], found["command"], sep="\n")


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        metavar="NETWORK",
        default=["small", *PEERS],
        help=f"some of {', '.join(NETWORKS)} (default: small and its peers)",
    )
    cores = len(os.sched_getaffinity(0))
    numbers = {
        "rounds": (7, "times that every network is measured, after an untimed one"),
        "threads": (cores, "of torch, on the CPU"),
        "frames": (20, "per clip"),
        "latent": (None, "height and width of the latents (default: 16, on a GPU 32)"),
        "batch": (None, "clips (default: 1, on a GPU the largest power of two that fits)"),
    }
    for name, (default, text) in numbers.items():
        said = "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}{said}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1…; auto (default: cpu)")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the layers, and of the matrix rate; weights stay float32 (default: float32)",
    )
    parser.add_argument("--compile", action="store_true", help="compile every network")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure processor seconds of this process instead of wall seconds: they exclude most "
        "of the effect of other work on the machine; needs one thread and no GPU",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="also write the figures to FILE; without FILE, print them instead of the tables",
    )
    options = parser.parse_args(argv)
    for name in numbers:
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"{name} is {value}: give 1 or more")
    return options


def make_setting(options: argparse.Namespace) -> Setting:
    device = choose_device(options.device)
    on_gpu = device.type == "cuda"
    torch.set_num_threads(options.threads)
    setting = Setting(
        device=device,
        precision=options.precision,
        compiled=options.compile,
        threads=options.threads,
        processor_time=options.processor_time,
        batch=options.batch or 1,
        frames=options.frames,
        latent=options.latent or (32 if on_gpu else 16),
    )
    if on_gpu and options.batch is None:
        return dataclasses.replace(setting, batch=largest_batch(options.networks, setting))
    return setting


def main(argv: Sequence[str]) -> int:
    options = parse_options(argv)
    try:
        setting = make_setting(options)
    except BadInput as error:
        print(f"python -m benchmarks.train_step: error: {error}", file=sys.stderr)
        return 2
    found = measure(options.networks, setting, options.rounds)
    found["environment"] = describe(setting.device)
    found["command"] = shlex.join(["python", "-m", "benchmarks.train_step", *argv])
    if options.json == "-":
        print(json.dumps(found, indent=1))
        return 0
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    print_tables(found, options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
