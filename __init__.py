"""vidfill: conditional latent video diffusion that fills the holes of a video.

The layers, each a folder; imports point towards what stands above only:

    modeling    autoencoder, blocks, UNet, diffusion process
    data        videos -> masks -> shards -> a deterministic stream      (uses modeling)
    sampling    schedules -> batched sampler -> metrics, sweep, report   (uses data, modeling)
    train       configuration, state, step, loop, checkpoints, demo      (uses all three)
    launch      an Accelerate configuration and a Slurm script
    errors, files, progress, processes, seeding, jobs, options   what every verb shares
    cli         `vidfill <verb>`
"""

__version__ = "0.2.0.dev0"


def __getattr__(name: str) -> object:
    """What is imported when it is first asked for: torch comes with it."""
    if name == "VideoInpaintPipeline":
        from .sampling.pipeline import VideoInpaintPipeline

        return VideoInpaintPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
