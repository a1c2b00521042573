"""The configuration of a training run, one frozen dataclass a part, and of its export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval, Len

from .. import options
from ..data.storage.store import CacheConfig
from ..errors import BadInputEverywhere
from ..modeling.settings import (
    PRESETS,
    AttentionBackend,
    Conditioning,
    DiffusionConfig,
    LossConfig,
    Precision,
    check_diffusion,
)
from ..options import (
    Minutes,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
)
from ..sampling.inpaint.settings import SCHEDULE
from .monitor.profiling import profiled_steps

EXAMPLES = """\
examples:
  vidfill train shards runs/first --steps 5000
  vidfill train shards runs/first --steps 5000 --plan
  vidfill train shards runs/base --config base --optimizer.learning_rate 5e-5
  vidfill train shards runs/tuned --from models/first --optimizer.learning_rate 2e-5
  vidfill launch "train shards runs/eight" --gpus_per_node 8 --out node
  accelerate launch --config_file node.yaml -m vidfill.train shards runs/eight
      on 8 GPUs, as the first command describes them to Accelerate
  accelerate launch --config_file node.yaml -m vidfill.train shards runs/zero --zero_stage 2
  tensorboard --logdir runs/first/tensorboard
"""

EXPORT_EXAMPLES = """\
examples:
  vidfill export runs/first models/first
  vidfill export runs/first models/first-long --ema 0.9999
  vidfill export runs/first models/first-20k --checkpoint step-00020000
  vidfill export runs/first models/first --schedule ddim:50 --sweep sweeps/first
      sets the default schedule, and puts the sweep's figures into the card
"""

DOCTOR_EXAMPLES = """\
examples:
  vidfill doctor shards run --config base
  vidfill launch "train shards run --config base" --gpus_per_node 8 --out node
  accelerate launch --config_file node.yaml -m vidfill.train.preflight \\
      shards run --config base --zero_stage 2
      on 8 GPUs, as the first command describes them to Accelerate
"""

Decay = Annotated[float, Interval(ge=0, lt=1)]  # of an average of the weights, a step


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    preset: str = ""
    """One of docs/model.md's: tiny, mini, small, base, large, ramvid-32 or ramvid-64; empty takes
    the four sizes that follow."""
    block_out_channels: Annotated[tuple[PositiveInt, ...], Len(1)] = (64, 128, 128)
    """Width of each level, channels; each level halves height and width."""
    layers_per_block: PositiveInt = 1
    """Residual blocks of a level on the way down."""
    head_channels: PositiveInt = 32
    """Width of an attention head, channels."""
    norm_groups: PositiveInt = 16
    """Groups of the group normalisation; divides every width."""
    conditioning: Conditioning = "concatenation"
    """How masked latents and mask enter: joined on channels; by cross_attention to their tokens; or
    adaptive, as maps that scale and shift normalised activations."""
    attention_backend: AttentionBackend = "auto"
    """What computes attention: xformers, torch's sdpa, or "auto", the first that works; reference
    holds the scores in memory, for comparisons."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def network_options(self) -> dict[str, Any]:
        """The sizes, as VideoUNet names them."""
        return {name: getattr(self, name) for name in SIZES}


SIZES = ("block_out_channels", "layers_per_block", "head_channels", "norm_groups")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    learning_rate: PositiveFloat = 2e-4
    """The full rate."""
    warmup: NonNegativeInt = 200
    """Optimizer steps of linear rise; 0 starts at the full rate."""
    decay: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a half cosine that ends at 0 with the last step, so that
    other `steps` change it."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; 0 is the paper's setting."""
    clip: PositiveFloat = 1.0
    """The gradient's largest norm."""
    ema_decays: Annotated[tuple[Decay, ...], Len(1)] = (0.9995, 0.9999)
    """Decays, a step, of the averages of the weights that are kept; lower during the first steps.
    The first is the model that is evaluated, shown and loaded; `vidfill export` writes any."""


@dataclass(frozen=True)
class DataConfig:
    """How the shards are read."""

    workers: PositiveInt = 2
    """Threads of each process that prepare batches ahead of the training loop."""
    damaged: Literal["stop", "skip"] = "stop"
    """What a damaged example does: it ends the run, or is left out of its batch and listed in
    OUT/skipped-RANK.jsonl; all others keep their places."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Where the shards behind a URL are kept while they are in use."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The loss on held-out clips, at noise and timesteps that never change."""

    every: NonNegativeInt = 1000
    """Optimizer steps between evaluations; 0 makes none."""
    clips: NonNegativeInt = 64
    """Validation clips, spread over the split; all of them if it has fewer."""
    quantiles: PositiveInt = 4
    """Ranges of timesteps of equal length; each clip is measured once in each."""


@dataclass(frozen=True)
class PreviewConfig:
    """The inpainted validation clips that TensorBoard shows, as frames and as GIF.

    One process makes them while the others wait: keep them few, and the schedule short.
    """

    every: NonNegativeInt = 1000
    """Optimizer steps between previews; 0 makes none."""
    clips: NonNegativeInt = 2
    """Validation clips shown."""
    schedule: str = "ddim:20"
    """The schedule that they are sampled with."""
    autoencoder: str = ""
    """Decodes them; empty takes the one that the shards name."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a conditional video UNet on encoded shards.

    `--config demo`, `paper`, `base` or `collisions` takes a recipe that the package carries; a path
    takes your own YAML file. Options after it override it.

    The same command continues a run that was stopped, on any number of processes and any ZeRO
    stage, wherever its shards lie now. The learning rate, `steps`, evaluation, previews, logging
    and checkpoints may change: what did, and from which step on, is said and recorded.
    """

    ESSENTIAL: ClassVar = (
        "from_",
        "steps",
        "batch_size",
        "precision",
        "zero_stage",
        "plan",
        "plan_gpus",
        "model.preset",
        "optimizer.learning_rate",
    )

    shards: str
    """A folder that `vidfill encode` wrote, or its URL (s3://…, gs://…, https://…)."""
    out: Path
    """The run's folder: checkpoints and TensorBoard events."""
    from_: str = ""
    """Begin with the averaged weights of a model: its folder, a run's, or shipped, the package's
    own; empty draws them from the seed. All else is as this run's options say."""
    steps: PositiveInt = 20_000
    """Optimizer steps in all."""
    batch_size: PositiveInt = 8
    """Examples in a step, over all processes together."""
    seed: Seed = 0
    """Seed of the weights, the order of the examples, the timesteps and the noise."""
    precision: Precision = "float32"
    """Precision of the network's forward pass; weights, moments and averages stay float32. The loss
    of float16 is scaled, and a batch whose gradient overflows is tried again at half the scale."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: 1 shards the optimizer's state over the processes, 2 the gradients too,
    3 the weights too; 0 is plain data parallel training without DeepSpeed."""
    gradient_accumulation: PositiveInt = 1
    """Parts into which a process splits its examples of a step, to save memory."""
    compile: bool = False
    """Compile the network (torch.compile): minutes at the start, faster steps."""
    deterministic: bool = False
    """Use deterministic GPU kernels only, so that a resumed run repeats every bit; slower."""
    max_skipped: NonNegativeInt = 0
    """Steps that may be left out because their loss or gradient is not finite; 0 stops the run at
    the first. Each is listed in OUT/not-finite.jsonl."""
    timeout: Minutes = 10.0
    """Minutes that a process waits for the others before it gives up."""
    trackers: str = "tensorboard"
    """Where figures go, separated by spaces: tensorboard, and others that Accelerate knows and are
    installed, as wandb or mlflow. Pictures go to TensorBoard alone."""
    log_every: PositiveInt = 10
    """Optimizer steps between figures."""
    checkpoint_every: PositiveInt = 1000
    """Optimizer steps between checkpoints; the last step always writes one."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept; older ones are removed once a newer one is whole."""
    profile: str = ""
    """Steps to profile, as "100:105"; their traces go to OUT/profile, for Perfetto."""
    plan: bool = False
    """Measure a few steps here, print what the run needs and how long it takes; start nothing."""
    plan_gpus: NonNegativeInt = 0
    """GPUs that --plan assumes; 0 is one."""
    plan_tflops: str = ""
    """What --plan takes a GPU to do, rather than measure: TFLOP/s, or a GPU's name as in H100,
    which stands for 30% of its data sheet's; empty is 100 where there is no GPU."""
    data: DataConfig = field(default_factory=DataConfig)
    """The stream."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """The diffusion process."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The held-out loss."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    """The preview."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's averaged weights as a model folder, with a model card.

    OUT is a diffusers pipeline that includes the autoencoder. `vidfill inpaint`, `vidfill sweep`,
    `VideoInpaintPipeline.from_pretrained` and `Denoiser.load` read it.
    """

    run: Path
    """The run's folder, which `vidfill train` wrote; the run may still be going on."""
    out: Path
    """The folder to write; it must not exist."""
    ema: float = 0.0
    """The decay of the average to write, one of the run's optimizer.ema_decays; 0 takes the first,
    which the run evaluates and shows."""
    checkpoint: str = ""
    """The checkpoint to take, such as step-00020000; empty takes the newest intact one."""
    autoencoder: str = ""
    """Where the autoencoder is, if it has moved since the shards were encoded: a folder, a name on
    the Hugging Face hub, or shipped, the package's own, which is not written."""
    schedule: str = SCHEDULE
    """The default schedule, as in `vidfill schedule --help`."""
    precision: Literal["float32", "float16"] = "float32"
    """Precision of the weights in the file: float16 halves its size; they are used in float32."""
    sweep: Path | None = None
    """A folder that `vidfill sweep` wrote for this model: the card gets its figures."""


RECIPES = Path(__file__).parent / "recipes"
MARKER = "stopped.json"  # in the run's folder: it ended early, and the same command continues

RATE_OPTIONS = ("optimizer.learning_rate", "optimizer.warmup", "optimizer.decay")
RUN_MAY_CHANGE = (  # options, and whole groups of them, that a run may continue with
    "shards",  # they are known by their manifests, wherever they lie
    "steps",
    "gradient_accumulation",
    "compile",
    "deterministic",
    "max_skipped",
    "timeout",
    "profile",
    "plan",
    "plan_gpus",
    "plan_tflops",
    "evaluation",
    *RATE_OPTIONS,
    "model.attention_backend",
    "model.gradient_checkpointing",
    "trackers",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "data",
    "preview",
    "zero_stage",
)


def check(config: TrainConfig) -> None:
    """Refuse settings that no run can have.

    Raises:
        BadInputEverywhere: Naming the first of them.
    """
    options.check(config)
    if config.compile and config.zero_stage == 3:
        raise BadInputEverywhere(
            "compile is true and zero_stage 3, whose hooks interrupt the compiled network at every "
            "layer: give zero_stage 2, or compile false"
        )
    profiled_steps(config.profile)
    _check_preset(config.model)
    check_diffusion(config.diffusion)


def _check_preset(model: ModelConfig) -> None:
    if not model.preset:
        return
    if model.preset not in PRESETS:
        raise BadInputEverywhere(
            f"model.preset is {model.preset!r}: give one of {', '.join(PRESETS)}"
        )
    for name, size in ModelConfig().network_options().items():
        if getattr(model, name) != size:
            raise BadInputEverywhere(
                f"model.{name} is {getattr(model, name)!r} and model.preset {model.preset!r}, "
                "which has sizes of its own: give one of the two"
            )


def find_recipe(words: Sequence[str]) -> list[str]:
    """A command line with `--config NAME` replaced by the path of the package's recipe NAME.

    A file named NAME takes precedence.
    """
    found = list(words)
    for at, word in enumerate(words):
        option = "--config=" if word.startswith("--config=") else ""
        name = word.removeprefix(option)
        path = RECIPES / f"{name}.yaml"
        is_name = option or (at and words[at - 1] == "--config")
        if is_name and path.is_file() and not Path(name).is_file():
            found[at] = f"{option}{path}"
    return found
