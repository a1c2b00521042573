"""`python -m vidfill.data.encode`."""

from ...cli import run

run("encode")
