"""`python -m vidfill.sampling.sweep`."""

from ...cli import run

run("sweep")
