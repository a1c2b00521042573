"""What DeepSpeed is told: for a run, and for `vidfill launch` to show."""

from __future__ import annotations

from typing import Any

from .config import TrainConfig


def deepspeed_config(config: TrainConfig, processes: int) -> dict[str, Any]:
    """DeepSpeed's configuration; the accumulation of gradients is the step's business."""
    return {
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "gradient_clipping": config.optimizer.clip,
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": -(-config.batch_size // processes),
        "steps_per_print": 2**31,
    }
