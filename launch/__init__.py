"""An Accelerate configuration and a Slurm script; `vidfill.train` itself needs neither."""
