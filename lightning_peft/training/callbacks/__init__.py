"""Lightning callbacks: adapter checkpoints, throughput, samples, progress."""
