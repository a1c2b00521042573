"""Accelerate configurations and Slurm scripts; `vidfill.train` itself needs none of them."""
