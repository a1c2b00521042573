"""What a run shows in TensorBoard: each value and picture, and the layout of the pages."""

from __future__ import annotations

# The scalars, and what TensorBoard's page "Text" says of them.
SCALARS = {
    "train/loss": "The training loss: the mean over the steps since the last value.",
    "train/learning_rate": "Of the last step.",
    "train/gradient_norm": "Over all processes, before clipping: the mean since the last value.",
    "train/gradient_norm_largest": "The largest since the last value.",
    "train/weight_norm": "Of all weights together.",
    "train/skipped_steps": "Steps left out so far because they were not finite.",
    "train/damaged_examples": "Examples left out because they were damaged, since this start.",
    "train/epochs": "How often each training clip was seen.",
    "train/loss_scale": "What the loss is multiplied by in float16.",
    "held_out/loss": "Mean squared error of the averaged network on validation clips, at noise "
    "and timesteps that never change; without the training loss's weights.",
    "held_out/loss_hole": "The same, for latents inside the hole.",
    "held_out/loss_visible": "The same, for latents outside the hole.",
    "held_out/loss_quantile_1": "The same, at the least noisy timesteps; the last is the noisiest.",
    "speed/clips_per_second": "Of all processes together, during steps.",
    "speed/clips_per_second_per_device": "Of one process.",
    "speed/seconds_per_step": "With the wait for data; without checkpoints and evaluations.",
    "speed/share_of_peak": "MFU: operations of the forward and backward passes, divided by those "
    "that the device could do in that time; recomputed ones are not counted.",
    "speed/slowest_process": "The rank with the longest own time: waiting for data and computing "
    "forward passes, without waiting for other processes (except, under ZeRO-3, for weights).",
    "speed/slowest_over_mean": "That process's own time divided by the mean; 1 is balanced.",
    "time/data_wait": "Share of the steps' time spent waiting for data, on the process that waited "
    "longest.",
    "time/goodput": "Share of the time since the run's first start spent in steps that count.",
    "time/lost_to_restarts": "Share of the time since the run's first start that was lost before "
    "this start: waiting in a queue, starting, repeated steps, and the pauses of earlier starts.",
    "time/checkpoint_seconds": "How long the steps waited for a checkpoint.",
    "time/checkpoint_written_seconds": "From the beginning of a checkpoint until it was whole on "
    "disk, while the steps went on.",
    "time/evaluation_seconds": "How long the steps waited for the held-out loss.",
    "time/preview_seconds": "How long the steps waited for the samples.",
    "memory/gigabytes": "The most of any process so far: allocated on its GPU, or resident.",
}

IMAGES = {
    "samples/frames": "Of each validation clip, from the top, the masked, filled and true frames.",
    "samples/film": "Of each validation clip, from the left, the masked, filled and true video.",
}

# TensorBoard's page "Custom Scalars": each chart, and the tags in it as regular expressions.
LAYOUT = {
    "The four that matter": {
        "Loss: training and held out": ["Multiline", ["^train/loss$", "^held_out/loss$"]],
        "Speed: clips per second": ["Multiline", ["^speed/clips_per_second$"]],
        "Time: share in steps, share waiting for data": [
            "Multiline",
            ["^time/goodput$", "^time/data_wait$"],
        ],
        "Gradient norm: mean and largest": ["Multiline", ["^train/gradient_norm"]],
    },
    "Held-out loss": {
        "Inside and outside the hole": ["Multiline", ["^held_out/loss_(hole|visible)$"]],
        "By timestep, 1 the least noisy": ["Multiline", ["^held_out/loss_quantile_"]],
    },
    "Machine": {
        "Share of the peak rate (MFU)": ["Multiline", ["^speed/share_of_peak$"]],
        "Slowest process over the mean": ["Multiline", ["^speed/slowest_over_mean$"]],
        "Memory, GB": ["Multiline", ["^memory/"]],
        "Pauses and checkpoints, seconds": ["Multiline", ["^time/.*_seconds$"]],
    },
}

# The options by which the page "HParams" compares runs.
HPARAMS = (
    "batch_size",
    "seed",
    "precision",
    "zero_stage",
    "model.preset",
    "model.conditioning",
    "optimizer.learning_rate",
    "optimizer.warmup",
    "optimizer.decay",
    "optimizer.weight_decay",
    "diffusion.process",
    "diffusion.target",
    "diffusion.mask_channel",
    "loss.weighting",
    "loss.hole",
    "loss.timesteps",
)
