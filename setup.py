"""The package map: `vidfill` is this folder, its subpackages the folders beside this file."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
LAYERS = ("data", "launch", "modeling", "sampling", "train")
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
ROOMS = [f"{room}{below}" for room in LAYERS for below in ("", ".*")]

setup(
    script_name="setup.py",  # so that a build leaves this file out of the package
    name="vidfill",
    version=VERSION,
    description="Conditional latent video diffusion that fills the holes of a video",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"vidfill": "."},
    packages=["vidfill", *(f"vidfill.{name}" for name in find_packages(include=ROOMS))],
    package_data={
        "vidfill": ["py.typed"],
        "vidfill.modeling": ["weights/*/*", "weights/*/*/*"],
        "vidfill.sampling.report": ["templates/*"],
        "vidfill.launch": ["*.yaml", "*.sbatch", "*.json"],
        "vidfill.train": ["recipes/*.yaml"],
    },
    entry_points={"console_scripts": ["vidfill=vidfill.cli:run"]},
    install_requires=[
        "accelerate>=1.10",
        "annotated-types>=0.7",
        "av>=14",
        "deepspeed>=0.18",
        "diffusers>=0.36",
        "einops>=0.8",
        "filelock>=4",
        "fsspec[http]>=2024.10",
        "huggingface-hub>=0.34",
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "jsonargparse[signatures]>=4.40",
        "markupsafe>=2.1",
        "matplotlib>=3.9",
        "numpy>=1.26",
        "opencv-python-headless>=4.10",
        "packaging>=24",
        "pillow>=10",
        "pyarrow>=18",
        "pydantic>=2.9",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.5",
        "tensorboard>=2.18",
        "torch>=2.7",
        "torchmetrics>=1.6",
        "transformers>=4.56",
        "typing-extensions>=4.12",
        "webdataset>=1.0",
        "xxhash>=3.4",
    ],
    extras_require={
        "bench": [],  # litdata wants another torch: docs/benchmarks.md says how to install it
        "cuda": ["xformers>=0.0.30"],
        "gs": ["gcsfs>=2024.10"],
        "s3": ["s3fs>=2024.10"],
        "test": [
            "beartype>=0.20",
            "build>=1.2",
            "flask>=3.0",  # moto's server
            "flask-cors>=4.0",
            "hypothesis>=6.100",
            "moto[s3]>=5.0",
            "mypy>=1.15",
            "pdoc>=15",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.11",
            "s3fs>=2024.10",
            "scikit-image>=0.25",
            "scipy>=1.11",
            "setuptools>=77",  # builds without a network: what pyproject.toml asks for
        ],
    },
)
