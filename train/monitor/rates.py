"""The rate at which a device can compute, beside which a run's own is set."""

from __future__ import annotations

import time

import torch

from ...modeling.settings import Precision

# Operations a second of NVIDIA's data sheets (nvidia.com/data-center/ a100, h100, h200, l40s,
# grace-hopper-superchip and hgx), which is half of what they give with sparsity: in 16 bits, and in
# TensorFloat-32, which is what torch's convolutions take in float32. The first name that a device's
# begins with.
PEAKS = {
    "NVIDIA B200": (2250e12, 1100e12),
    "NVIDIA GH200": (989e12, 494e12),
    "NVIDIA H200 NVL": (835e12, 417e12),
    "NVIDIA H200": (989e12, 494e12),
    "NVIDIA H100 PCIe": (756e12, 378e12),
    "NVIDIA H100 NVL": (835e12, 417e12),
    "NVIDIA H100": (989e12, 494e12),
    "NVIDIA A100": (312e12, 156e12),
    "NVIDIA L40S": (362e12, 183e12),
}


def peak_rate(device: torch.device, precision: Precision) -> float:
    """Operations a second: the data sheet's of a known GPU, else those of a matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (in_16_bits, in_32_bits) in PEAKS.items():
            if name.startswith(known):
                return in_32_bits if precision == "float32" else in_16_bits
    return measure_rate(device, precision)


def measure_rate(device: torch.device, precision: Precision) -> float:
    """Operations a second of the fastest of some products of square matrices."""
    side = 8192 if device.type == "cuda" else 768
    matrix = torch.ones(side, side, dtype=getattr(torch, precision), device=device)
    return max(2 * side**3 / _time_product(matrix) for _ in range(4))


def _time_product(matrix: torch.Tensor) -> float:
    began = time.perf_counter()
    (matrix @ matrix)[0, 0].item()  # which waits for the device
    return time.perf_counter() - began
