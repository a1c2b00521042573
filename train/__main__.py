"""`python -m vidfill.train`, and what `accelerate launch -m vidfill.train` starts."""

from ..cli import run

run("train")
