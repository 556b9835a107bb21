"""Training: stage 1 (reconstruct), stage 2 (align), one loop and its checkpoints."""
