"""`python -m vidfill.train.preflight`: the doctor."""

from ...cli import run

run("doctor")
