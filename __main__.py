"""`python -m vidfill` is `vidfill`."""

from .cli import run

run()
