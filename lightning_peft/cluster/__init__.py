"""Jobs and sweeps: SLURM, local processes, and the folder in which a sweep stands."""
