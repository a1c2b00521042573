from vidfill.sampling.pipeline import VideoInpaintPipeline  # noqa: F401
