"""Jobs on a cluster: SLURM, and processes that outlive the one that started them."""
